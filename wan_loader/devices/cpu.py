"""The device writer of host memory, the twin of the CUDA one: copies and converts at once, in the thread that submits.

What needs no conversion is best read to its place, and never copied. Destinations are fresh memory, whose first touch
costs most of a conversion's time: `system.fresh_memory` does that.
"""

from __future__ import annotations

import ctypes
from collections import deque
from itertools import groupby
from typing import TYPE_CHECKING

from wan_loader.devices.torch_threads import UNDIVIDED
from wan_loader.devices.writer import Destination, PinError
from wan_loader.events import span
from wan_loader.system.forks import is_forked
from wan_loader.system.fresh_memory import FreshMemory

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from wan_loader.devices.writer import HostBlock
    from wan_loader.events import Observer
    from wan_loader.plan.blocks import Segment

__all__ = ["CpuWriter"]


class CpuWriter:
    """The writer of ordinary host memory, and its only copy stream."""

    can_pin = False

    def __init__(self, observer: Observer | None = None) -> None:
        self._destinations: list[Destination] = []
        self._observer = observer
        self._arrived: deque[Segment] = deque()
        self._memory = FreshMemory()

    def bind(self, destinations: Sequence[Destination]) -> None:
        """Say where the next storages go; large ones get huge pages, as long as those are quickly made."""
        self._destinations += destinations
        for destination in destinations:
            if destination.whole is not None:  # else it is let go of early, and its memory is not fresh for long
                self._memory.add(destination.address, destination.whole.nbytes)

    def place(self, segment: Segment) -> int | None:
        """Return the place of a segment in its storage, if it stays as it is; else None."""
        destination = self._destinations[segment.storage]
        if destination.source_dtype is not None:
            return None
        address = destination.address + segment.storage_start
        self._memory.touch_huge(address, segment.nbytes)
        return address

    def stream(self) -> CpuWriter:
        """Return the writer itself: nothing is kept between copies."""
        return self

    def pin(self, address: int, nbytes: int, *, read_only: bool) -> None:
        """Refuse: there is nothing to register memory with."""
        raise PinError("host memory needs no pinning for the CPU")

    def unpin(self, address: int) -> bool:
        """Return True: there is nothing to undo."""
        return True

    def submit(self, sources: Sequence[HostBlock]) -> None:
        """Copy or convert the blocks now."""
        for source in sources:
            self._carry(source.address - source.block.start, source.block.segments)
            self._arrived += source.block.segments

    def _carry(self, offset: int, segments: Sequence[Segment]) -> None:
        """Copy or convert segments; `offset` more than its place in the file is the address of a byte."""
        for converts, group in groupby(segments, lambda p: self._destinations[p.storage].source_dtype is not None):
            same = list(group)
            with span(self._observer, "cast" if converts else "h2d", sum(p.nbytes for p in same)):
                for segment in same:
                    destination, source = self._destinations[segment.storage], offset + segment.file_start
                    if converts:
                        _convert(destination, source, segment, self._memory)
                    else:
                        place = destination.address + segment.storage_start
                        self._memory.touch_huge(place, segment.nbytes)
                        ctypes.memmove(place, source, segment.nbytes)

    def arrived(self) -> list[Segment]:
        """Return what was submitted since this was last asked."""
        # taken out one by one, while other threads submit
        return [self._arrived.popleft() for _ in range(len(self._arrived))]

    def finish(self) -> None:
        """Do nothing: everything has arrived already."""


def _convert(destination: Destination, source: int, segment: Segment, memory: FreshMemory) -> None:
    import torch

    assert destination.source_dtype is not None
    dtype, count = destination.whole.dtype, segment.nbytes // segment.itemsize
    place = destination.address + segment.storage_start // segment.itemsize * dtype.itemsize
    # where torch divides the work, its threads touch what they write, side by side
    touch = memory.touch if torch.get_num_threads() == 1 else memory.touch_huge
    touch(place, count * dtype.itemsize)
    # tensors of this thread: a mode in which the destinations were made (inference) holds in another
    flat = _bytes_at(place, count * dtype.itemsize).view(dtype)
    _convert_flat(flat, _bytes_at(source, segment.nbytes), destination.source_dtype)


def _bytes_at(address: int, nbytes: int) -> torch.Tensor:
    """Return memory as a tensor that does not own it."""
    import torch

    return torch.frombuffer((ctypes.c_char * nbytes).from_address(address), dtype=torch.uint8)


def _convert_flat(flat: torch.Tensor, raw: torch.Tensor, dtype: torch.dtype) -> None:
    """Convert the bytes of elements of `dtype` into a flat tensor, by `.to`'s rules.

    In a forked process torch's kernels wait for ever for threads that are not there, if the parent had used some: what
    they are given at a time is then too little for them to divide, unless this thread divides nothing.
    """
    import torch

    itemsize = raw.nbytes // max(1, flat.numel())
    divides = is_forked() and torch.get_num_threads() > 1
    step = UNDIVIDED // itemsize if divides else max(1, flat.numel())
    for start in range(0, flat.numel(), step):
        part = raw[start * itemsize : (start + step) * itemsize]
        if part.data_ptr() % itemsize:  # torch's kernels may assume aligned elements
            part = part.clone()
        flat[start : start + step].copy_(part.view(dtype))
