"""Which parts of a checkpoint lie in the page cache: measured, never guessed from the file system's name."""

from __future__ import annotations

from bisect import bisect_right
from math import inf
from typing import TYPE_CHECKING

from wan_loader.linux import cached_bytes
from wan_loader.plan import PAGE

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from wan_loader.plan import Extent

__all__ = ["Residency"]


class Residency:
    """Asks the kernel about byte ranges of open files, and remembers what it said of large ones."""

    def __init__(self, fds: Sequence[int]) -> None:
        self._fds = fds
        self._uniform: list[tuple[int, int, int, float]] = []
        """File, start and end of ranges that are there altogether (1.0) or not at all (0.0), in order."""

    def is_resident(self, file: int, start: int, end: int) -> bool:
        """Whether every page of the range is in the page cache; False also where the kernel cannot say."""
        return self.share(file, start, end) == 1.0

    def share(self, file: int, start: int, end: int) -> float:
        """How much of the range, in whole pages, is in the page cache, from 0 to 1; 0 where the kernel cannot say.

        Within a range that `total` found uniform nothing is asked again.
        """
        start, end = _pages(start, end)
        at = bisect_right(self._uniform, (file, start, inf)) - 1
        if at >= 0 and self._uniform[at][0] == file and end <= self._uniform[at][2]:
            return self._uniform[at][3]
        try:
            return cached_bytes(self._fds[file], start, end - start) / (end - start)
        except OSError:
            return 0.0

    def total(self, extents: Iterable[Extent]) -> int:
        """Bytes of all extents that are in the page cache, in whole pages; 0 where the kernel cannot say.

        Extents that touch are asked for together: one system call for a file that is wanted whole.
        """
        spans: list[list[int]] = []
        for file, start, end in sorted((e.file, e.start, e.end) for e in extents):
            if spans and spans[-1][0] == file and start <= spans[-1][2]:
                spans[-1][2] = max(spans[-1][2], end)
            else:
                spans.append([file, start, end])
        uniform, cached = [], 0
        for file, start, end in spans:
            first, last = _pages(start, end)
            try:
                nbytes = cached_bytes(self._fds[file], first, last - first)
            except OSError:
                return 0
            cached += min(nbytes, end - start)
            if nbytes in (0, last - first):
                uniform.append((file, first, last, float(nbytes > 0)))
        self._uniform = uniform
        return cached


def _pages(start: int, end: int) -> tuple[int, int]:
    """Both ends rounded to pages, outwards."""
    return start // PAGE * PAGE, -(-end // PAGE) * PAGE
