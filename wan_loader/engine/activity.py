"""The number of loads of this process that are under way: work that can wait does not compete with them."""

from __future__ import annotations

import os
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["is_idle", "loading", "wait_until_idle"]

_changed = threading.Condition()
_n_loads = 0


def _begin_child() -> None:
    """Begin at zero in a forked process: loads of other threads, one of which may have held the lock, stay behind."""
    global _changed, _n_loads
    _changed, _n_loads = threading.Condition(), 0


os.register_at_fork(after_in_child=_begin_child)


@contextmanager
def loading() -> Iterator[None]:
    """Count the body as a load."""
    global _n_loads
    with _changed:
        _n_loads += 1
    try:
        yield
    finally:
        with _changed:
            _n_loads = max(0, _n_loads - 1)  # 0 before: begun in the process that this one was forked from
            _changed.notify_all()


def is_idle() -> bool:
    """Return whether no load is under way. At once."""
    return _n_loads == 0


def wait_until_idle(timeout_s: float) -> bool:
    """Wait until no load is under way, at most `timeout_s` seconds; return whether none is."""
    with _changed:
        return _changed.wait_for(lambda: _n_loads == 0, timeout_s)
