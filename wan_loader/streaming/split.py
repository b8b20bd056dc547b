"""Which blocks stay on the device and which come each time, and where these come from: pure decisions.

Blocks of each kind are spread evenly among the others: between two that must come over the link there is then as much
computation as can be, to hide the copy behind.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from wan_loader.errors import DeviceMemoryError, OptionError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["SharedBuffers", "Split", "choose_kept", "split_blocks", "spread"]


class SharedBuffers(NamedTuple):
    """Buffers that are there, since another module has them, and what its conversions take."""

    n_buffers: int
    buffer_nbytes: int
    scratch_nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """The blocks that are streamed, by their numbers, and the device memory that all weights take."""

    streamed: tuple[int, ...]
    n_buffers: int
    buffer_nbytes: int
    """The bytes of one buffer."""
    nbytes: int
    """The bytes on the device: what is resident, the buffers, and what conversions take."""
    nbytes_beside: int
    """Those of the buffers, and of what conversions take."""


def spread(count: int, chosen: int) -> list[int]:
    """Return `chosen` of the numbers below `count`, evenly spread, the first of them 0."""
    return [i * count // chosen for i in range(chosen)]


def split_blocks(
    blocks: Sequence[int],
    rest: int,
    *,
    buffers: int,
    scratch: int,
    budget: int | None,
    path: str,
    shared: SharedBuffers | None = None,
) -> Split:
    """Decide which blocks are streamed: as few as the budget allows.

    Args:
        blocks: The bytes of each block on the device; of those with 0, nothing can be streamed.
        rest: The bytes of everything else on the device.
        buffers: The most blocks that are on the device at a time, of those that are streamed.
        scratch: The bytes that conversions take, if any block is streamed.
        budget: The bytes that all weights may take on the device; None: as few as may be.
        path: The checkpoint, for errors.
        shared: The buffers that are used, and counted, in any case; None: as many are made as are needed.

    Raises:
        DeviceMemoryError: The budget is too small even if every block is streamed.
        OptionError: Blocks are larger than the buffers.
    """
    if shared is not None and max(blocks, default=0) > shared.buffer_nbytes:
        raise OptionError.because(
            f"a block takes {max(blocks)} bytes, and the buffers that are to be shared {shared.buffer_nbytes}",
            "stream the module with the larger blocks first, or share nothing",
        )
    candidates = [number for number, nbytes in enumerate(blocks) if nbytes]
    for n_resident in range(len(candidates), -1, -1):
        if budget is None and n_resident:
            continue
        resident = {candidates[i] for i in spread(len(candidates), n_resident)}
        streamed = tuple(number for number in candidates if number not in resident)
        split = _split(blocks, rest, streamed, min(buffers, len(streamed)), scratch, shared)
        if budget is None or split.nbytes <= budget:
            return split
    raise DeviceMemoryError.because(
        f"takes {split.nbytes} bytes on the device with every block streamed, {budget} are allowed",
        f"allow {split.nbytes} or more" + (", or use fewer buffers" if split.n_buffers > 2 else ""),
        path=path,
    )


def _split(
    blocks: Sequence[int],
    rest: int,
    streamed: tuple[int, ...],
    n_buffers: int,
    scratch: int,
    shared: SharedBuffers | None,
) -> Split:
    resident = sum(blocks) - sum(blocks[number] for number in streamed)
    if shared is None:
        largest = max((blocks[number] for number in streamed), default=0)
        beside = n_buffers * largest + (scratch if streamed else 0)
    else:
        largest, n_buffers = shared.buffer_nbytes, min(n_buffers, shared.n_buffers)
        beside = shared.n_buffers * largest + max(scratch if streamed else 0, shared.scratch_nbytes)
    return Split(
        streamed=streamed,
        n_buffers=n_buffers,
        buffer_nbytes=largest,
        nbytes=rest + resident + beside,
        nbytes_beside=beside,
    )


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
