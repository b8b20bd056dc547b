"""Whether a thread is inside our own code: there, functions that we have replaced only pass calls on."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["is_ours", "ours"]

_thread = threading.local()


@contextmanager
def ours() -> Iterator[None]:
    """Mark this thread as inside our own code. May be nested."""
    before = is_ours()
    _thread.inside = True
    try:
        yield
    finally:
        _thread.inside = before


def is_ours() -> bool:
    """Say whether this thread is inside our own code."""
    return getattr(_thread, "inside", False)
