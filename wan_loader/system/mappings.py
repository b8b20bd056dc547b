"""The files that are mapped into this process, and where: what /proc/self/maps says.

A private mapping shows the bytes of its file until this process writes: a written page becomes a copy. Which pages
those are, `own_pages` tells.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["FileMapping", "MappingTable", "parse_mappings", "read_mappings"]


class FileMapping(NamedTuple):
    """Addresses `start` to `end`, which show a file from byte `offset` on."""

    start: int
    end: int
    offset: int
    device: int
    """The device of the file, as the kernel knows it; `stat` names another on some file systems."""
    inode: int
    path: str
    """The path as the kernel names it now: " (deleted)" stands behind a name that is gone, and perhaps behind one that
    ends so. A line feed in it cannot be told from the four characters that stand for it: it is taken for one.
    """
    private: bool
    """True if what this process writes stays its own; else it goes into the file."""
    readable: bool

    def continues(self, before: FileMapping) -> bool:
        """Say whether this mapping goes on where another one ends, in memory and in the file."""
        lies_alike = self.start - self.offset == before.start - before.offset
        return self.start == before.end and lies_alike and self[3:] == before[3:]


class MappingTable:
    """Mappings of files, to be found by their addresses."""

    def __init__(self, mappings: Iterable[FileMapping]) -> None:
        self._mappings = sorted(mappings)
        self._starts = [mapping.start for mapping in self._mappings]

    def find(self, start: int, end: int) -> FileMapping | None:
        """Return the mapping that all addresses from `start` to `end` lie in; None if there is no such one."""
        number = bisect_right(self._starts, start) - 1
        if number < 0 or self._mappings[number].end < end or self._mappings[number].end <= start:
            return None
        return self._mappings[number]


def parse_mappings(text: bytes) -> list[FileMapping]:
    """Read the mappings of files out of the text of /proc/PID/maps. Pure.

    The kernel divides a mapping whose parts have other rights or advice: parts that continue each other are one again.

    Args:
        text: The text. Paths in it are any bytes but line feeds, which stand there as a backslash and 012.

    Raises:
        ValueError: This is some other text.
    """
    found: list[FileMapping] = []
    for line in text.split(b"\n"):
        if (mapping := _parse(line)) is None:
            continue
        if found and mapping.continues(found[-1]):
            found[-1] = found[-1]._replace(end=mapping.end)
        else:
            found.append(mapping)
    return found


# most lines are what they were when they were last read
@lru_cache(maxsize=4096)
def _parse(line: bytes) -> FileMapping | None:
    """Read a line; None for one of memory without a file, which has inode 0 and a name in brackets or none."""
    fields = line.split(None, 5)
    if len(fields) < 6 or fields[4] == b"0":
        return None
    addresses, rights, offset, device, inode, path = fields
    start, _, end = addresses.partition(b"-")
    major, _, minor = device.partition(b":")
    return FileMapping(
        start=int(start, 16),
        end=int(end, 16),
        offset=int(offset, 16),
        device=os.makedev(int(major, 16), int(minor, 16)),
        inode=int(inode),
        path=os.fsdecode(path.replace(rb"\012", b"\n")),
        private=rights[3:4] == b"p",
        readable=rights[:1] == b"r",
    )


def read_mappings() -> MappingTable:
    """Read the mappings of this process. Costs about 2 microseconds each.

    Raises:
        OSError: The system does not tell.
    """
    try:
        return MappingTable(parse_mappings(Path("/proc/self/maps").read_bytes()))
    except ValueError as error:
        raise OSError(f"/proc/self/maps is of another kind: {error}") from error
