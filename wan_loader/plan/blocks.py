"""The blocks of a load: which bytes of which file go where, in which order, by which transport. No file is touched.

    ByteRange   the wanted bytes of one storage, in a file
    Block       byte ranges that follow each other in one file (small gaps are read and thrown away), cut at multiples
                of the block size; the unit of a transport
    Segment     the bytes of a block that go into one storage

Blocks are made one by one (`plan_blocks`), so that the first can be on their way before the last are planned.

Every wanted byte is in exactly one segment. Where byte ranges are joined, blocks meet at multiples of the block size,
so that O_DIRECT reads and registered pages touch no page twice; only where a converted tensor is misaligned in the file
does a border move by less than one element.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from enum import Enum
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

from wan_loader.errors import OptionError
from wan_loader.system.posix import PAGE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

__all__ = ["MAX_GAP", "Block", "ByteRange", "Segment", "Transport", "apart", "plan_blocks", "split"]

#: Gaps up to this size between byte ranges are read through: cheaper than another request. Zip records are 64 B apart.
MAX_GAP = 64 << 10


class Transport(Enum):
    """The kinds of journey that a block's bytes can make."""

    MAPPED = "mapped"
    DIRECT = "direct"
    BUFFERED = "buffered"


class ByteRange(NamedTuple):
    """Bytes `start` to `end` of file number `file`, to become storage number `storage`."""

    storage: int
    file: int
    start: int
    end: int
    itemsize: int = 1
    """The element size when the bytes are converted on the way (blocks are then cut between elements), else 1."""
    storage_start: int = 0
    """The place in the storage where they belong, counted in bytes of the file."""


class Segment(NamedTuple):
    """`nbytes` at `file_start` of the block's file, to be put at byte `storage_start` of storage number `storage`."""

    storage: int
    storage_start: int
    file_start: int
    nbytes: int
    itemsize: int = 1
    """The element size, as in `ByteRange`."""

    @property
    def file_end(self) -> int:
        """The end of the segment in the file."""
        return self.file_start + self.nbytes


class Block(NamedTuple):
    """Bytes `start` to `end` of one file, and the storages that they go to."""

    transport: Transport
    file: int
    start: int
    end: int
    segments: tuple[Segment, ...]
    whole: Block | None = None
    """The block that this one was cut from, if it is a part: its bytes are converted together."""

    @property
    def nbytes(self) -> int:
        """The bytes to read, gaps included."""
        return self.end - self.start

    @property
    def page_start(self) -> int:
        """`start` rounded down to a page."""
        return self.start // PAGE * PAGE

    @property
    def page_end(self) -> int:
        """`end` rounded up to a page; may lie beyond the end of the file."""
        return -(-self.end // PAGE) * PAGE


def plan_blocks(
    byte_ranges: Iterable[ByteRange],
    *,
    block_bytes: int,
    transport: Callable[[int, int, int], Transport],
    max_gap: int = MAX_GAP,
) -> Iterator[Block]:
    """Plan a load of `byte_ranges`, in their order, one block after the other.

    Costs about 3 microseconds per block and per byte range.

    Args:
        byte_ranges: Those that follow each other in a file, with gaps of at most `max_gap` bytes, are read together, so
            give them in file order unless another order is worth smaller reads.
        block_bytes: The upper bound of a block, a multiple of `PAGE`.
        transport: `transport(file, start, end)` says how bytes travel; it is asked once per block.
        max_gap: The most bytes between two byte ranges that are read and thrown away.

    Yields:
        Blocks, each with its transport.

    Raises:
        OptionError: The block size is no multiple of a page.
    """
    if block_bytes < PAGE or block_bytes % PAGE:
        raise OptionError.because(f"block size {block_bytes} must be a multiple of {PAGE}")
    for block in _adjacent(byte_ranges, max_gap):
        for part in split(block, block_bytes):
            yield part._replace(transport=transport(part.file, part.start, part.end))


def split(block: Block, nbytes: int) -> Iterator[Block]:
    """Cut a block at multiples of `nbytes` in its file, and between elements where they are converted."""
    if block.start // nbytes == (block.end - 1) // nbytes:
        yield block
        return
    segments = deque(block.segments)
    for border in _borders(block, nbytes):
        inside: list[Segment] = []
        # a segment that straddles the border is divided: its rest goes back to the front of the queue
        while segments and segments[0].file_start < border:
            segment = segments.popleft()
            if segment.file_end > border:
                head = border - segment.file_start
                rest, start = segment.nbytes - head, segment.storage_start
                segments.appendleft(Segment(segment.storage, start + head, border, rest, segment.itemsize))
                segment = Segment(segment.storage, start, segment.file_start, head, segment.itemsize)
            inside.append(segment)
        if inside:  # else this stretch lies in a gap
            yield Block(block.transport, block.file, inside[0].file_start, inside[-1].file_end, tuple(inside))


def apart(block: Block, nbytes: int) -> Iterator[Block]:
    """Cut a block so that each segment of `nbytes` or more is a block of its own."""
    for large, group in groupby(block.segments, key=lambda segment: segment.nbytes >= nbytes):
        same = tuple(group)
        for segments in ((segment,) for segment in same) if large else (same,):
            yield Block(block.transport, block.file, segments[0].file_start, segments[-1].file_end, segments)


def _borders(block: Block, nbytes: int) -> Iterable[int]:
    starts = [segment.file_start for segment in block.segments]
    for border in range((block.start // nbytes + 1) * nbytes, block.end, nbytes):
        straddling = block.segments[bisect_left(starts, border) - 1]
        inside = border < straddling.file_end
        # back to the last whole element: a cast cannot take half of one
        yield border - ((border - straddling.file_start) % straddling.itemsize if inside else 0)
    yield block.end


def _adjacent(byte_ranges: Iterable[ByteRange], max_gap: int) -> Iterable[Block]:
    """Join byte ranges that follow each other, as one block each, of any length."""
    segments: list[Segment] = []
    file_before, end_before = -1, 0
    for storage, file, start, end, itemsize, storage_start in byte_ranges:
        # a tensor without elements has no bytes to read
        if start == end:
            continue
        if segments and not (file == file_before and 0 <= start - end_before <= max_gap):
            yield Block(Transport.BUFFERED, file_before, segments[0].file_start, end_before, tuple(segments))
            segments = []
        segments.append(Segment(storage, storage_start, start, end - start, itemsize))
        file_before, end_before = file, end
    if segments:
        yield Block(Transport.BUFFERED, file_before, segments[0].file_start, end_before, tuple(segments))
