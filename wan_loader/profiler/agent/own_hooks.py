"""Hooks on loads of wan_loader itself, which tells an observer of what it does: the recording is one."""

from __future__ import annotations

import functools

from .wrap import patch

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

__all__ = ["hook_own_loads"]


class _Observer:
    """Writes the spans of a load down, and passes them on to the caller's observer."""

    def __init__(self, recorder: Any, other: Any) -> None:
        self._recorder, self._other = recorder, other

    def record(self, span: Any) -> None:
        self._recorder.foreign(span.name, "wan_loader", span.start_ns, span.end_ns, span.nbytes, span.track)
        if self._other is not None:
            self._other.record(span)


def hook_own_loads(recorder: Any, owner: Any) -> None:
    """Give each load the recording as its observer, and note its files."""
    patch(recorder, owner, "__init__", lambda f: _observed(recorder, f))
    patch(recorder, owner, "open", lambda f: _noted(recorder, f))


def _observed(recorder: Any, original: Any) -> Any:
    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        if recorder.on:
            kwargs["observer"] = _Observer(recorder, kwargs.get("observer"))
        original(self, *args, **kwargs)

    return __init__


def _noted(recorder: Any, original: Any) -> Any:
    @functools.wraps(original)
    def open(self: Any, request: Any) -> Any:
        checkpoint = original(self, request)
        if recorder.on:
            for file in checkpoint.files:
                recorder.file(file.path, "wan_loader", False)
        return checkpoint

    return open
