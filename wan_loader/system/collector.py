"""Keeping Python's cycle collector away from what must not be held up."""

from __future__ import annotations

import gc
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["paused_gc"]

#: Python freezes some hundred objects of its own. Programs freeze all they have, which is never less than 4000.
_FROZEN_BY_ITSELF = 2000


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
            if gc.get_freeze_count() < _FROZEN_BY_ITSELF:  # else what the program froze would thaw
                gc.freeze()
                gc.unfreeze()
            gc.enable()
