"""The parts of files that lie in the page cache: measured, never guessed from the file system's name.

The kernel tells it only to who owns a file or may write it. Of other files, pages are tried: one at a random place in
each window of 8 MiB, by a read that does not wait (RWF_NOWAIT). That is an estimate. Where not even this is possible,
as on many network file systems, it is unknown, which is a value of its own: None.
"""

from __future__ import annotations

import os
import resource
from bisect import bisect_right
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from itertools import pairwise
from math import inf
from typing import TYPE_CHECKING, NamedTuple, Protocol

from wan_loader.system.mounts import mount_of
from wan_loader.system.posix import PAGE, cached_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from wan_loader.types import StrPath

__all__ = ["WINDOW_BYTES", "FileRange", "Knowledge", "PageCache", "Residency", "cached", "describe", "knowledge_of"]

#: In each of these, one page is tried.
WINDOW_BYTES = 8 << 20
#: Windows that are tried first, spread evenly: the others only where these differ, or are there.
_FIRST_TRIES = 16
#: A try that fails makes the disk bring a page. After so many, what was not tried counts as cold.
_MAX_MISSES = 64


class Knowledge(Enum):
    """Degrees of knowing what of some files is in the page cache; the worse, the later."""

    EXACT = ""
    ESTIMATED = "estimated, from single pages: the kernel tells only who owns the files or may write them"
    UNKNOWN = "unknown: the kernel tells only who owns the files or may write them"


def cached(fd: int, start: int, nbytes: int) -> int | None:
    """Return how many bytes of a file range lie in the page cache, in whole pages, at most `nbytes`; None if unknown.

    Estimated where the kernel does not tell. Trying pages leaves a cold file as cold as it was.
    """
    try:
        return cached_bytes(fd, start, nbytes)
    except OSError:
        tried = _try(fd, start, start + nbytes)
        return None if tried is None else tried.nbytes(start, start + nbytes)


def knowledge_of(paths: Iterable[StrPath]) -> Knowledge:
    """Return how well `cached` knows files; those that cannot be opened do not count."""
    worst = Knowledge.EXACT
    for path in paths:
        with suppress(OSError):
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                worst = max(worst, _knowledge(fd), key=list(Knowledge).index)
            finally:
                os.close(fd)
    return worst


def describe(paths: Iterable[StrPath]) -> tuple[str, ...]:
    """Return a warning if it is not known exactly what of these files is in the page cache."""
    knowledge = knowledge_of(paths)
    return () if knowledge is Knowledge.EXACT else (f"how much is in the page cache is {knowledge.value}",)


def _knowledge(fd: int) -> Knowledge:
    nbytes = min(PAGE, os.fstat(fd).st_size)
    try:
        cached_bytes(fd, 0, nbytes)
    except OSError:
        return Knowledge.UNKNOWN if cached(fd, 0, nbytes) is None else Knowledge.ESTIMATED
    return Knowledge.EXACT


class FileRange(Protocol):
    """Bytes `start` to `end` of file number `file`."""

    @property
    def file(self) -> int:
        """The number of the file."""

    @property
    def start(self) -> int:
        """The first byte."""

    @property
    def end(self) -> int:
        """The byte after the last."""


@dataclass(frozen=True, slots=True)
class Residency:
    """The bytes that lay in the page cache when it was asked for: a value, which asks the kernel nothing."""

    windows: tuple[tuple[int, int, int, int], ...] = ()
    """File, start and end in whole pages, and how many bytes between them were there; in this order, without
    overlaps. What lies in no window is cold."""
    knowledge: Knowledge = Knowledge.EXACT

    def share(self, file: int, start: int, end: int) -> float:
        """Return how much of a range, in whole pages, was there, from 0 to 1.

        Exact where the range is made of whole windows, or all or nothing of a window was there.
        """
        start, end = _pages(start, end)
        return self._bytes(file, start, end) / (end - start)

    def total(self, ranges: Iterable[FileRange]) -> int:
        """Return how many bytes of all ranges were there. Ranges that overlap count once."""
        return int(sum(min(self._bytes(f, *_pages(start, end)), end - start) for f, start, end in _merged(ranges)))

    def _bytes(self, file: int, start: int, end: int) -> float:
        found = 0.0
        at = max(0, bisect_right(self.windows, (file, start, inf, inf)) - 1)
        for other, first, last, there in self.windows[at:]:
            if (other, first) >= (file, end):
                break
            if other == file and last > start:
                found += there * (min(last, end) - max(first, start)) / (last - first)
        return found


def _merged(ranges: Iterable[FileRange], max_gap: int = 0) -> list[list[int]]:
    """File, start and end of ranges, those that touch, or nearly so, as one."""
    spans: list[list[int]] = []
    for file, start, end in sorted((r.file, r.start, r.end) for r in ranges if r.end > r.start):
        if spans and spans[-1][0] == file and start <= spans[-1][2] + max_gap:
            spans[-1][2] = max(spans[-1][2], end)
        else:
            spans.append([file, start, end])
    return spans


class PageCache:
    """The kernel's answers about byte ranges of open files."""

    def __init__(self, fds: Sequence[int]) -> None:
        self._fds = fds
        self._tried: dict[int, _Tried | None] = {}
        """Files of which the kernel does not tell; None: unknown."""

    def residency(self, ranges: Iterable[FileRange], *, unit: int, max_gap: int = 0) -> Residency:
        """Ask for all ranges, in whole pages; what is unknown counts as cold.

        Ranges with gaps of at most `max_gap` bytes are asked for together: one system call for a file that is wanted
        whole. Where only some of it is there, each multiple of `unit` bytes is asked for by itself.
        """
        windows: list[tuple[int, int, int, int]] = []
        for file, start, end in _merged(ranges, max_gap):
            first, last = _pages(start, end)
            if windows and windows[-1][0] == file:  # the page between two ranges is the first one's
                first = max(first, windows[-1][2])
            if first >= last:
                continue
            nbytes = self._cached(file, first, last)
            if nbytes in (0, last - first):
                windows.append((file, first, last, nbytes))
                continue
            borders = [first, *range((first // unit + 1) * unit, last, unit), last]
            windows += [(file, a, b, self._cached(file, a, b)) for a, b in pairwise(borders)]
        return Residency(tuple(windows), self.knowledge)

    def share(self, file: int, start: int, end: int) -> float:
        """Ask how much of a range, in whole pages, is there now, from 0 to 1; 0 where that is unknown."""
        start, end = _pages(start, end)
        return self._cached(file, start, end) / (end - start)

    @property
    def knowledge(self) -> Knowledge:
        """The degree to which everything is known that was asked for so far."""
        if None in self._tried.values():
            return Knowledge.UNKNOWN
        return Knowledge.ESTIMATED if self._tried else Knowledge.EXACT

    def _cached(self, file: int, start: int, end: int) -> int:
        if file not in self._tried:
            with suppress(OSError):
                return cached_bytes(self._fds[file], start, end - start)
            self._tried[file] = _try(self._fds[file], 0, os.fstat(self._fds[file]).st_size)
        tried = self._tried[file]
        return 0 if tried is None else tried.nbytes(start, end)


def _pages(start: int, end: int) -> tuple[int, int]:
    """Round both ends to pages, outwards."""
    return start // PAGE * PAGE, -(-end // PAGE) * PAGE


class _Tried(NamedTuple):
    """The results of trying pages."""

    first: int
    """The number of the first window in its file."""
    there: Sequence[bool]
    """One answer for each window: whether its page was there."""

    def nbytes(self, start: int, end: int) -> int:
        """Count the bytes of a range that lie in windows whose page was there."""
        numbers = range(start // WINDOW_BYTES, -(-end // WINDOW_BYTES))
        there = self.there[numbers.start - self.first : numbers.stop - self.first]
        windows = (n * WINDOW_BYTES for n, page_is_there in zip(numbers, there, strict=False) if page_is_there)
        return sum(min(end, window + WINDOW_BYTES) - max(start, window) for window in windows)


def _try(fd: int, start: int, end: int) -> _Tried | None:
    """Try pages of a range of a file; None where the file system does not answer without reading."""
    first, last = start // WINDOW_BYTES, -(-end // WINDOW_BYTES)
    if first == last:
        return _Tried(first, ())
    try:
        with _Tries(fd) as tries:
            bounds = ((max(start, n * WINDOW_BYTES), min(end, (n + 1) * WINDOW_BYTES)) for n in range(first, last))
            return _Tried(first, _answers(tries, list(bounds)))
    except OSError:
        # ramfs and old tmpfs refuse RWF_NOWAIT; a file that lies in memory is never cold
        mount = mount_of(fd)
        return _Tried(first, [True] * (last - first)) if mount is not None and mount.in_memory else None


def _answers(tries: _Tries, ranges: Sequence[tuple[int, int]]) -> list[bool]:
    """Return an answer for each range; between two that are cold, and near each other, nothing is tried."""
    answers: list[bool] = [False] * len(ranges)
    # a coarse grid first, then halves of every gap at whose ends something was there
    grid = sorted({*range(0, len(ranges), -(-len(ranges) // _FIRST_TRIES)), len(ranges) - 1})
    for i in grid:
        answers[i] = tries.is_there(*ranges[i])
    gaps = list(pairwise(grid))
    while gaps:
        low, high = gaps.pop()
        if high - low > 1 and (answers[low] or answers[high]):
            middle = (low + high) // 2
            answers[middle] = tries.is_there(*ranges[middle])
            gaps += [(low, middle), (middle, high)]
    return answers


class _Tries:
    """Reads of single pages that do not wait for the disk; a context manager that undoes what they have caused.

    A page that is not there is brought in by being tried, alone: reading ahead is off meanwhile. Places are random, so
    that one whose page stays does not answer for its window the next time.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._missed: list[int] = []

    def __enter__(self) -> _Tries:
        os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_RANDOM)
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):
            for page in self._missed:
                os.pread(self._fd, 1, page)  # it is on its way, and could not be let go of before
            for page in self._missed:
                os.posix_fadvise(self._fd, page, PAGE, os.POSIX_FADV_DONTNEED)
        with suppress(OSError):
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_NORMAL)

    def is_there(self, start: int, end: int) -> bool:
        """Return whether a random page of a range is in the page cache.

        Raises:
            OSError: The file system does not answer.
        """
        if len(self._missed) >= _MAX_MISSES:
            return False
        first, last = start // PAGE, -(-end // PAGE)
        # not from random: a program that seeded it must find its numbers unchanged
        page = (first + int.from_bytes(os.urandom(4)) % (last - first)) * PAGE
        before = _blocks_read()
        try:
            there = os.preadv(self._fd, [bytearray(1)], page, os.RWF_NOWAIT) == 1
        except BlockingIOError:
            there = False
        if not there or _blocks_read() > before:  # the disk may have been quicker than the kernel's second look
            self._missed.append(page)
            return False
        return True


def _blocks_read() -> int:
    """Return the blocks that this thread has caused to be read from storage, where the kernel counts them."""
    return resource.getrusage(resource.RUSAGE_THREAD).ru_inblock
