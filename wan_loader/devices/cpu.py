"""The device writer of host memory, the twin of the CUDA one: copies at once, converts with torch's own thread pool.

What needs no conversion is best read to its place, and never copied. Runs in the threads that submit, which are few, so
that conversions do not oversubscribe the cores.
"""

from __future__ import annotations

import ctypes
from itertools import groupby
from typing import TYPE_CHECKING

from wan_loader.devices.writer import Destination, PinError
from wan_loader.events import span
from wan_loader.system.forks import is_forked
from wan_loader.system.posix import prefer_huge_pages

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from wan_loader.devices.writer import HostBlock
    from wan_loader.events import Observer
    from wan_loader.plan.blocks import Segment

__all__ = ["CpuWriter"]

#: Destinations from this size on are asked to lie in huge pages.
_HUGE = 4 << 20
#: Bytes that torch handles in one thread, as bytes or as elements: half of its at::internal::GRAIN_SIZE.
_UNDIVIDED = 16384


class CpuWriter:
    """The writer of ordinary host memory, and its only copy stream."""

    can_pin = False

    def __init__(self, observer: Observer | None = None) -> None:
        self._destinations: list[Destination] = []
        self._observer = observer
        self._arrived: list[Segment] = []

    def bind(self, destinations: Sequence[Destination]) -> None:
        """Say where the next storages go; large ones that are to be converted are asked to lie in huge pages."""
        self._destinations += destinations
        for destination in destinations:
            if destination.source_dtype is not None and (nbytes := destination.whole.nbytes) >= _HUGE:
                prefer_huge_pages(destination.address, nbytes)

    def place(self, segment: Segment) -> int | None:
        """Return the place of a segment in its storage, if it stays as it is; else None."""
        destination = self._destinations[segment.storage]
        return None if destination.source_dtype is not None else destination.address + segment.storage_start

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
                        _convert(destination, source, segment)
                    else:
                        ctypes.memmove(destination.address + segment.storage_start, source, segment.nbytes)

    def arrived(self) -> list[Segment]:
        """Return what was submitted since this was last asked."""
        arrived, self._arrived = self._arrived, []
        return arrived

    def finish(self) -> None:
        """Do nothing: everything has arrived already."""


def _convert(destination: Destination, source: int, segment: Segment) -> None:
    import torch

    first, count = segment.storage_start // segment.itemsize, segment.nbytes // segment.itemsize
    raw = torch.frombuffer((ctypes.c_char * segment.nbytes).from_address(source), dtype=torch.uint8)
    assert destination.source_dtype is not None
    _convert_flat(destination.flat[first : first + count], raw, destination.source_dtype)


def _convert_flat(flat: torch.Tensor, raw: torch.Tensor, dtype: torch.dtype) -> None:
    """Convert the bytes of elements of `dtype` into a flat tensor, by `.to`'s rules.

    In a forked process torch's kernels wait for ever for threads that are not there, if the parent had used some: what
    they are given at a time is then too little for them to divide.
    """
    itemsize = raw.nbytes // max(1, flat.numel())
    step = _UNDIVIDED // itemsize if is_forked() else max(1, flat.numel())
    for start in range(0, flat.numel(), step):
        part = raw[start * itemsize : (start + step) * itemsize]
        if part.data_ptr() % itemsize:  # torch's kernels may assume aligned elements
            part = part.clone()
        flat[start : start + step].copy_(part.view(dtype))
