"""Forks beside our work: a child has one thread, and the locks of all others, which nobody releases there.

What another thread is importing stays half imported in a child for ever, and whoever imports it there waits for ever.
So a fork waits until imports of ours that can take long are over. What else a child must know is whether it is one:
libraries wait there for threads of their own that stayed behind.
"""

from __future__ import annotations

import os
import threading
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["begin_anew", "is_forked", "start_origin", "started_process", "without_forks"]

#: How long a fork waits at most, whatever others do in their imports.
_PATIENCE_S = 60.0

_importing = threading.RLock()
_held: dict[int, bool] = {}
"""A thread that forks -> whether it got the lock."""
_is_forked = threading.Event()
_client = 0
"""The process that stands for this one, which was forked for it; 0 for any other process."""

os.register_at_fork(after_in_child=_is_forked.set)


def is_forked() -> bool:
    """Return whether this process was forked from one that had imported this."""
    return _is_forked.is_set()


def begin_anew(client: int) -> None:
    """Count this process as one of its own: nothing was left behind where it was forked, for nothing ran there.

    Args:
        client: The process that the user has started, for which this one was forked.
    """
    global _client
    _is_forked.clear()
    _client = client


def start_origin() -> str:
    """Say where what this process has imported comes from: it has "imported" it, or was "forked" with it."""
    return "forked" if _client else "imported"


def started_process() -> int:
    """Return the process that the user has started: this one, or the one that it was forked for."""
    return _client or os.getpid()


@contextmanager
def without_forks() -> Iterator[None]:
    """Let forks of other threads wait while the body imports something."""
    _register()
    with _importing:
        yield


@cache
def _register() -> None:
    """Have forks wait. Hooks run youngest first: those of modules whose locks imports take must be older than ours."""
    import concurrent.futures.thread  # noqa: F401
    import logging  # noqa: F401

    os.register_at_fork(before=_before, after_in_parent=_after, after_in_child=_after_in_child)


def _before() -> None:
    # not for ever: a fork that never comes is worse than a child with a half imported module
    _held[threading.get_ident()] = _importing.acquire(timeout=_PATIENCE_S)


def _after() -> None:
    if _held.pop(threading.get_ident(), False):
        _importing.release()


def _after_in_child() -> None:
    global _importing
    _after()
    _importing = threading.RLock()
