"""The first touch of fresh memory, which costs more than what is then written to it: in the cheapest way there is.

Where the machine has the memory at hand, a huge page costs a tenth of the small ones that it stands for. A virtual
machine that gives free memory back to its host must fetch it again first, which costs several times as much as small
pages do; and only a try tells. So one is tried after the other, and the first that is slow is the last. Small pages are
made by one call for many (docs/design/cpu-casts.md).
"""

from __future__ import annotations

import ctypes
import mmap
from contextlib import suppress
from functools import cache
from time import thread_time_ns
from typing import TYPE_CHECKING

from wan_loader.system.posix import populate, prefer_huge_pages

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["HUGE_PAGE", "FreshMemory"]

_PAGE = mmap.PAGESIZE
#: The bytes that one table of page addresses describes.
HUGE_PAGE = _PAGE * _PAGE // 8
#: Memory from this size on is worth huge pages.
_MIN_BYTES = 2 * HUGE_PAGE
#: A huge page is slow that costs so many times what small ones would.
_SLOW = 2
_SAMPLES = 4
_SAMPLE_BYTES = 16 * _PAGE


class FreshMemory:
    """Memory that nobody has touched: the destinations of one load. Ranges may be touched by any thread."""

    def __init__(self, clock: Callable[[], int] = thread_time_ns) -> None:
        self._clock = clock
        """The processor time of the calling thread: another that takes the processor away makes no page slow."""
        self._memory: list[tuple[int, int]] = []
        self.is_huge = True
        """False once a huge page was slow."""

    def add(self, address: int, nbytes: int) -> None:
        """Add memory: if it is large, and no huge page was slow yet, it is going to have those."""
        if self.is_huge and nbytes >= _MIN_BYTES:
            self._memory.append((address, nbytes))
            prefer_huge_pages(address, nbytes)

    def touch_huge(self, address: int, nbytes: int) -> None:
        """Have the huge pages that begin in a range be made now, by writing a zero to the first byte of each.

        Where one is slow, all memory that was added has small pages from here on.

        Args:
            address: The start of bytes that are going to be overwritten, and have not been.
            nbytes: Their number.
        """
        for page in range(-(-address // HUGE_PAGE) * HUGE_PAGE, address + nbytes, HUGE_PAGE):
            if not self.is_huge:
                return
            start_ns = self._clock()
            ctypes.memset(page, 0, 1)
            if self._clock() - start_ns > _SLOW * _small_pages_ns():
                self._stop()

    def touch(self, address: int, nbytes: int) -> None:
        """Have all pages of a range be made now. As `touch_huge`; only whole pages get small ones."""
        self.touch_huge(address, nbytes)
        start, end = -(-address // _PAGE) * _PAGE, (address + nbytes) // _PAGE * _PAGE
        if start < end:
            with suppress(OSError):  # whoever writes to it will be told
                populate(start, end - start, write=True)

    def _stop(self) -> None:
        self.is_huge = False
        for address, nbytes in self._memory:
            prefer_huge_pages(address, nbytes, prefer=False)


@cache
def _small_pages_ns() -> int:
    """Measure the processor time of touching as many small pages as make a huge one: a few of them, once a process."""
    found = []
    with mmap.mmap(-1, _SAMPLES * _SAMPLE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        with suppress(OSError):  # a kernel without transparent huge pages: all are small
            memory.madvise(mmap.MADV_NOHUGEPAGE)
        view = ctypes.c_char.from_buffer(memory)
        for i in range(_SAMPLES):
            start_ns = thread_time_ns()
            ctypes.memset(ctypes.addressof(view) + i * _SAMPLE_BYTES, 0, _SAMPLE_BYTES)
            found.append(thread_time_ns() - start_ns)
        del view  # or the mapping could not be closed
    return min(found) * HUGE_PAGE // _SAMPLE_BYTES
