"""Torch's own threads, which share the work of one call, and how to do without them in a thread of ours."""

from __future__ import annotations

import ctypes
from contextlib import suppress

__all__ = ["UNDIVIDED", "divide_nothing"]

#: Elements, or bytes as such, that torch handles without further threads: half of its at::internal::GRAIN_SIZE.
UNDIVIDED = 16384


def divide_nothing() -> None:
    """Have torch do all work of this thread, and of no other, without further threads; imports torch.

    Those that share a call's work wait for each other awake, and so take the processors from whatever runs beside
    them. Does nothing where torch's threads are not OpenMP's.
    """
    import torch

    torch.get_num_threads()  # torch sets the number of a thread once, when it first asks for it
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).omp_set_num_threads(1)
