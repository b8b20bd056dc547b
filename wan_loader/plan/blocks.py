"""The plan of a load: which bytes of which file go where, in which order, on which way. Pure: no file is touched.

    extents     one wanted storage each: a byte range of a file
    runs        extents that follow each other in one file (small gaps are read and thrown away)
    blocks      runs cut at multiples of the block size, each with one way to travel
    pieces      the parts of a block that go into one storage

Blocks are made one by one (`plan_blocks`), so that the first can be on their way before the last are planned.

Every wanted byte is in exactly one piece. Inside a run, blocks meet at multiples of the block size, so that O_DIRECT
reads and registered pages touch no page twice; only where a converted tensor is misaligned in the file does a border
move by less than one element.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from enum import Enum
from itertools import groupby
from mmap import PAGESIZE
from typing import TYPE_CHECKING, NamedTuple

from wan_loader.errors import OptionError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

__all__ = ["MAX_GAP", "PAGE", "Block", "Extent", "Piece", "Way", "apart", "plan_blocks", "split"]

PAGE = max(4096, PAGESIZE)
#: Gaps up to this size inside a run are read through: cheaper than another request. Zip records are 64 B apart.
MAX_GAP = 64 << 10


class Way(Enum):
    """How a block's bytes travel."""

    MAPPED = "mapped"
    DIRECT = "direct"
    BUFFERED = "buffered"


class Extent(NamedTuple):
    """Bytes `start` to `end` of file number `file`, to become storage number `storage`."""

    storage: int
    file: int
    start: int
    end: int
    itemsize: int = 1
    """Element size when the bytes are converted on the way (blocks are then cut between elements), else 1."""
    storage_start: int = 0
    """Where in the storage they belong, counted in bytes of the file."""


class Piece(NamedTuple):
    """`nbytes` at `file_start` of the block's file belong at byte `storage_start` of storage number `storage`."""

    storage: int
    storage_start: int
    file_start: int
    nbytes: int
    itemsize: int = 1
    """As in `Extent`."""

    @property
    def file_end(self) -> int:
        """End of the piece in the file."""
        return self.file_start + self.nbytes


class Block(NamedTuple):
    """Bytes `start` to `end` of one file and where they go."""

    way: Way
    file: int
    start: int
    end: int
    pieces: tuple[Piece, ...]

    @property
    def nbytes(self) -> int:
        """Bytes to read, gaps included."""
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
    extents: Iterable[Extent], *, block_bytes: int, way: Callable[[int, int, int], Way], max_gap: int = MAX_GAP
) -> Iterator[Block]:
    """Plan a load of `extents`, in their order, one block after the other.

    block_bytes: upper bound of a block, a multiple of `PAGE`. `way(file, start, end)` says how a range travels; it is
    asked once per block. Extents that follow each other in a file, with gaps of at most `max_gap` bytes, are read
    together, so give them in file order unless another order is worth smaller reads. Costs about 3 microseconds per
    block and per extent.
    """
    if block_bytes < PAGE or block_bytes % PAGE:
        raise OptionError(f"block size {block_bytes} must be a multiple of {PAGE}")
    for run in _runs(extents, max_gap):
        for _, file, start, end, pieces in split(run, block_bytes):
            yield Block(way(file, start, end), file, start, end, pieces)


def split(block: Block, nbytes: int) -> Iterator[Block]:
    """Cut a block at multiples of `nbytes` in its file, and between elements where they are converted."""
    if block.start // nbytes == (block.end - 1) // nbytes:
        yield block
        return
    pieces = deque(block.pieces)
    for border in _borders(block, nbytes):
        inside: list[Piece] = []
        while pieces and pieces[0].file_start < border:
            piece = pieces.popleft()
            if piece.file_end > border:
                head = border - piece.file_start
                rest, start = piece.nbytes - head, piece.storage_start
                pieces.appendleft(Piece(piece.storage, start + head, border, rest, piece.itemsize))
                piece = Piece(piece.storage, start, piece.file_start, head, piece.itemsize)
            inside.append(piece)
        if inside:  # else the part lies in a gap
            yield Block(block.way, block.file, inside[0].file_start, inside[-1].file_end, tuple(inside))


def apart(block: Block, nbytes: int) -> Iterator[Block]:
    """Cut a block so that each piece of `nbytes` or more is a block of its own."""
    for large, group in groupby(block.pieces, key=lambda piece: piece.nbytes >= nbytes):
        same = tuple(group)
        for pieces in ((piece,) for piece in same) if large else (same,):
            yield Block(block.way, block.file, pieces[0].file_start, pieces[-1].file_end, pieces)


def _borders(block: Block, nbytes: int) -> Iterable[int]:
    starts = [piece.file_start for piece in block.pieces]
    for border in range((block.start // nbytes + 1) * nbytes, block.end, nbytes):
        straddling = block.pieces[bisect_left(starts, border) - 1]
        inside = border < straddling.file_end
        yield border - ((border - straddling.file_start) % straddling.itemsize if inside else 0)
    yield block.end


def _runs(extents: Iterable[Extent], max_gap: int) -> Iterable[Block]:
    """Extents that follow each other, as one block each."""
    run: list[Piece] = []
    run_file, run_end = -1, 0
    for storage, file, start, end, itemsize, storage_start in extents:
        if start == end:
            continue
        if run and not (file == run_file and 0 <= start - run_end <= max_gap):
            yield Block(Way.BUFFERED, run_file, run[0].file_start, run_end, tuple(run))
            run = []
        run.append(Piece(storage, storage_start, start, end - start, itemsize))
        run_file, run_end = file, end
    if run:
        yield Block(Way.BUFFERED, run_file, run[0].file_start, run_end, tuple(run))
