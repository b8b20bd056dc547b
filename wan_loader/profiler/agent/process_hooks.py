"""Hooks on the ends of processes: of this one, where it skips Python's own end, and of those that it has waited for."""

from __future__ import annotations

import functools
import os

from .wrap import drop_frame, patch

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

__all__ = ["hook_processes"]


def hook_processes(recorder: Any, finish: Callable[[], None]) -> None:
    """Wrap `os._exit`, with which workers of pools end, and what waits for children.

    Args:
        recorder: The recorder.
        finish: Ends the recording.
    """
    patch(recorder, os, "_exit", lambda f: _exit(recorder, f, finish))
    for name in ("waitpid", "wait", "wait3", "wait4"):
        patch(recorder, os, name, lambda f: _waiter(recorder, f))


def _exit(recorder: Any, original: Any, finish: Callable[[], None]) -> Any:
    @functools.wraps(original)
    def _exit(status: Any) -> Any:
        if recorder.on:
            try:
                recorder.facts["status"] = int(status)
                finish()
            except Exception:
                recorder.on = False
        original(status)

    return _exit


def _waiter(recorder: Any, original: Any) -> Any:
    @functools.wraps(original)
    def wait(*args: Any, **kwargs: Any) -> Any:
        if not recorder.on:
            return original(*args, **kwargs)
        flags = [a for a in (*args[-1:], *kwargs.values()) if isinstance(a, int)]
        at_once = original.__name__ != "wait" and any(flag & os.WNOHANG for flag in flags[-1:])
        if not at_once:
            recorder.begin("wait", "for a process")
        try:
            found = original(*args, **kwargs)
            _note(recorder, found)
            return found
        except BaseException as error:
            drop_frame(error)
            raise
        finally:
            if not at_once:
                recorder.end()

    return wait


def _note(recorder: Any, found: Any) -> None:
    try:
        if found[0] > 0:
            recorder.note(child=[found[0], os.waitstatus_to_exitcode(found[1]), recorder.now()])
    except (ValueError, TypeError, LookupError):  # stopped, not ended
        return
