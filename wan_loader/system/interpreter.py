"""Keeping the interpreter away from what must not be held up: its cycle collector, and its turns between threads."""

from __future__ import annotations

import gc
import os
import sys
from contextlib import contextmanager
from threading import Lock
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["freeze_all", "paused_gc", "short_turns"]

#: Python freezes some hundred objects of its own. Programs freeze all they have, which is never less than 4000.
_FROZEN_BY_ITSELF = 2000
#: Seconds that a thread which waits for the interpreter lets another one run. Python's own value is 5 ms.
_TURN_S = 1e-4

_program_froze = False
"""Whether the program was seen to have frozen its objects: they are counted one by one, 18 ms for all of torch's."""

_turns = Lock()
_n_short = 0
"""The bodies of `short_turns` that are being executed, in all threads."""
_turn_before = 0.0


def _begin_child() -> None:
    """Forget the bodies that other threads of the parent are in: they do not end here."""
    global _turns, _n_short
    _turns = Lock()
    if _n_short:
        _n_short = 0
        sys.setswitchinterval(_turn_before)


os.register_at_fork(after_in_child=_begin_child)


@contextmanager
def paused_gc() -> Iterator[None]:
    """Keep the cycle collector away: it walks all of torch's objects, 50 ms at a time, while every thread waits.

    What was made meanwhile counts as long-lived afterwards: else the next object made would have it all looked at,
    for 7 ms.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            _count_as_long_lived()
            gc.enable()


def _count_as_long_lived() -> None:
    """Move all objects to the oldest generation, unless what the program froze would thaw."""
    global _program_froze
    _program_froze = _program_froze or gc.get_freeze_count() >= _FROZEN_BY_ITSELF
    if not _program_froze:
        gc.freeze()
        gc.unfreeze()


def freeze_all() -> None:
    """Freeze what there is for good: neither this process nor its forks look at it again, or count it."""
    global _program_froze
    gc.freeze()
    _program_froze = True


@contextmanager
def short_turns() -> Iterator[None]:
    """Let threads of the body have the interpreter soon: beside one that runs Python, each wait for it takes a turn.

    A load waits some thousand times. With turns of 5 ms, beside one busy thread, its reads and copies come to a sixth
    of what they reach alone (8 GB/s instead of 50); with turns of 0.1 ms they lose nothing.
    """
    global _n_short, _turn_before
    with _turns:
        if _n_short == 0:
            _turn_before = sys.getswitchinterval()
            sys.setswitchinterval(min(_TURN_S, _turn_before))
        _n_short += 1
    try:
        yield
    finally:
        with _turns:
            _n_short = max(0, _n_short - 1)  # 0 before: begun in the process that this one was forked from
            if _n_short == 0:
                sys.setswitchinterval(_turn_before)
