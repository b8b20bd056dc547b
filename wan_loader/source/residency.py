"""Which parts of a checkpoint lie in the page cache: measured, never guessed from the file system's name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from wan_loader.linux import cached_bytes
from wan_loader.plan import PAGE

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from wan_loader.plan import Extent

__all__ = ["Residency"]


@dataclass(frozen=True, slots=True)
class Residency:
    """Asks the kernel about byte ranges of open files."""

    fds: Sequence[int]

    def is_resident(self, file: int, start: int, end: int) -> bool:
        """Whether every page of the range is in the page cache; False also where the kernel cannot say."""
        return self.share(file, start, end) == 1.0

    def share(self, file: int, start: int, end: int) -> float:
        """How much of the range, in whole pages, is in the page cache, from 0 to 1; 0 where the kernel cannot say."""
        try:
            start, end = start // PAGE * PAGE, -(-end // PAGE) * PAGE
            return cached_bytes(self.fds[file], start, end - start) / (end - start)
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
        try:
            return sum(cached_bytes(self.fds[file], start, end - start) for file, start, end in spans)
        except OSError:
            return 0
