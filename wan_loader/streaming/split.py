"""Which blocks stay on the device and which come each time, and where these come from: pure decisions.

Blocks of each kind are spread evenly among the others: between two that must come over the link there is then as much
computation as can be, to hide the copy behind.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from wan_loader.errors import DeviceMemoryError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Split", "choose_kept", "split_blocks", "spread"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """The blocks that are streamed, by their numbers, and the device memory that all weights take."""

    streamed: tuple[int, ...]
    n_buffers: int
    buffer_nbytes: int
    """The bytes of one buffer."""
    nbytes: int
    """The bytes on the device: what is resident, the buffers, and what conversions take."""


def spread(count: int, chosen: int) -> list[int]:
    """Return `chosen` of the numbers below `count`, evenly spread, the first of them 0."""
    return [i * count // chosen for i in range(chosen)]


def split_blocks(
    blocks: Sequence[int], rest: int, *, buffers: int, scratch: int, budget: int | None, path: str
) -> Split:
    """Decide which blocks are streamed: as few as the budget allows.

    Args:
        blocks: The bytes of each block on the device; of those with 0, nothing can be streamed.
        rest: The bytes of everything else on the device.
        buffers: The most blocks that are on the device at a time, of those that are streamed.
        scratch: The bytes that conversions take, if any block is streamed.
        budget: The bytes that all weights may take on the device; None: as few as may be.
        path: The checkpoint, for errors.

    Raises:
        DeviceMemoryError: The budget is too small even if every block is streamed.
    """
    candidates = [number for number, nbytes in enumerate(blocks) if nbytes]
    for n_resident in range(len(candidates), -1, -1):
        if budget is None and n_resident:
            continue
        resident = {candidates[i] for i in spread(len(candidates), n_resident)}
        streamed = tuple(number for number in candidates if number not in resident)
        split = _split(blocks, rest, streamed, min(buffers, len(streamed)), scratch)
        if budget is None or split.nbytes <= budget:
            return split
    raise DeviceMemoryError.because(
        f"takes {split.nbytes} bytes on the device with every block streamed, {budget} are allowed",
        f"allow {split.nbytes} or more" + (", or use fewer buffers" if split.n_buffers > 2 else ""),
        path=path,
    )


def _split(blocks: Sequence[int], rest: int, streamed: tuple[int, ...], n_buffers: int, scratch: int) -> Split:
    largest = max((blocks[number] for number in streamed), default=0)
    resident = sum(blocks) - sum(blocks[number] for number in streamed)
    beside = n_buffers * largest + (scratch if streamed else 0)
    return Split(streamed=streamed, n_buffers=n_buffers, buffer_nbytes=largest, nbytes=rest + resident + beside)


def choose_kept(nbytes: Sequence[int], limit: int) -> set[int]:
    """Return the numbers of blocks that memory is kept for, as many as fit the limit; the others are read each time.

    A set that stays is better than pages that come and go: reading in circles would find none of them in the page
    cache. The first block is among those that are read, if any is: so it is known what reading costs before anything
    runs.

    Args:
        nbytes: The bytes of each streamed block in the files.
        limit: The bytes that may be kept.
    """
    for n_read in range(len(nbytes)):
        read = spread(len(nbytes), n_read)
        if sum(nbytes) - sum(nbytes[number] for number in read) <= limit:
            return set(range(len(nbytes))) - set(read)
    return set()
