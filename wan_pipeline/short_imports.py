"""Shorter imports: once weights load beside them, they are what a start waits for.

It changes three settings of the process for as long as the body runs, and puts each back.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack, contextmanager
from functools import cache
from importlib import metadata
from typing import TYPE_CHECKING

from wan_loader import paused_gc

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["short_imports"]

#: How long imports may keep the interpreter from a loading thread that wants it, instead of Python's 5 ms: a load asks
#: for it some thousand times, and imports get no slower.
_TURN_S = 0.0001


@contextmanager
def short_imports() -> Iterator[None]:
    """Make the imports in the body shorter, which are of large libraries while other threads load."""
    with ExitStack() as stack:
        for part in (_short_turns, paused_gc, _packages_listed_once):
            stack.enter_context(part())
        yield


@contextmanager
def _short_turns() -> Iterator[None]:
    """Let threads that load have the interpreter sooner."""
    before = sys.getswitchinterval()
    if before <= _TURN_S:
        yield
        return
    sys.setswitchinterval(_TURN_S)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


@contextmanager
def _packages_listed_once() -> Iterator[None]:
    """Read the records of all installed packages once: transformers and diffusers each do, for up to a second."""
    before = metadata.packages_distributions
    metadata.packages_distributions = cache(before)
    try:
        yield
    finally:
        metadata.packages_distributions = before
