"""The number of reads and the size of the pinned ring: pure decisions from the transports and the machine's limits.

The defaults live here: `_DISK`, `_CACHED` and the others are the sizes of the ring that bytes are staged in.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto
from typing import TYPE_CHECKING, NamedTuple

from wan_loader.errors import HostMemoryError
from wan_loader.plan.blocks import Transport
from wan_loader.system.posix import PAGE

if TYPE_CHECKING:
    from collections.abc import Set

__all__ = [
    "MAX_READS",
    "MAX_RING_BYTES",
    "MIN_BLOCK_BYTES",
    "EngineSettings",
    "TransferMode",
    "block_bytes",
    "conversion_bytes",
    "engine_settings",
    "piecemeal_block_bytes",
    "prefers_mapping",
]

MiB = 1 << 20

MAX_RING_BYTES = 512 * MiB
#: Blocks are the unit of residency and of registration: these for small loads ...
MIN_BLOCK_BYTES = 8 * MiB
#: ... and these at most. Larger ones register no faster.
MAX_BLOCK_BYTES = 32 * MiB
#: For the CPU, where bytes are in place when they are read, blocks are what stands between a load's first bytes and its
#: first tensor: some are read before any is looked at. Small ones, of which the first few are 2 % of a load or less.
_PIECEMEAL_BLOCK_BYTES = 1 * MiB, 8 * MiB


class TransferMode(Enum):
    """The ways to share the bytes of a load among its threads."""

    STAGED = auto()
    """Everything passes through the pinned ring, except for what is mapped: a thread of its own takes that."""
    SHARED = auto()
    """Mapped blocks are taken by both, that thread from the front and the ring from the far end, until they meet."""
    MAPPED_HERE = auto()
    """The calling thread maps too, batch by batch: where there is nothing else to do, and no page that a disk must
    bring: Ctrl-C would wait for it.
    """
    IN_PLACE = auto()
    """Nothing is mapped, and bytes that need no conversion are read to where they belong, where the writer has room for
    that.
    """
    CONVERTED = auto()
    """As `IN_PLACE`, and bytes that need a conversion are read and converted piece by piece, by the same thread: out of
    the page cache into host memory.
    """


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """The threads and the memory that a load may use."""

    threads: int
    """The most reads side by side."""
    slot_bytes: int
    """The size of a slot of the pinned ring: larger blocks are cut to it."""
    n_slots: int
    n_together: int = 1
    """The full slots that are copied to the device with one call, while the link is busy with others."""
    mode: TransferMode = TransferMode.STAGED
    faults_in: bool = True
    """True if pages of mapped blocks are faulted in before they are registered. The driver does so itself, at less
    expense, but under a lock: not for pages that a disk must bring.
    """


class _Ring(NamedTuple):
    """The shape of a pinned ring that keeps one kind of load busy."""

    reads: int
    """The reads side by side."""
    slots: int
    """The slots for each read: one is filled while the other is emptied."""
    slot_bytes: int


#: Some disks give more, the more is asked for at once.
_DISK = _Ring(12, 2, 16 * MiB)
#: What comes from the page cache should stay in the processor's cache, with all other slots, until the GPU has it.
_CACHED = _Ring(10, 3, 4 * MiB)
_BESIDE_MAPPED = _Ring(8, 3, 8 * MiB)
#: To host memory, mostly to their place: slots are then only counted, and not touched.
_CPU = _Ring(8, 3, 16 * MiB)
MAX_READS = max(ring.reads for ring in (_DISK, _CACHED, _BESIDE_MAPPED, _CPU))
#: Copies of this size reach what the link gives; smaller ones are submitted together until they have it.
_COPY_BYTES = 16 * MiB
#: Blocks whose bytes are on the device and not yet converted, at most: those that the ring is bringing, and a few whose
#: conversion is queued.
_CONVERTING_BLOCKS = 8
#: The threads that convert in host memory, at most: further ones would wait for the interpreter.
_CONVERTERS = 16
#: What each converts at a time stays in its processor's cache (docs/design/cpu-casts.md). Where they are many, larger
#: pieces make them wait less for the interpreter.
_PIECE_BYTES = 2 * MiB
_PIECE_BYTES_OF_MANY = 8 * MiB
_MANY = 5

#: So many processors keep the link busy without mapping (measured: docs/design/mapped-and-staged.md).
_UNMAPPED_PROCESSORS = 8


def block_bytes(nbytes: int, at_least: int = MIN_BLOCK_BYTES) -> int:
    """Return the size of the blocks for a load of `nbytes`: small loads get smaller ones, so that stages overlap."""
    size = at_least
    while size < MAX_BLOCK_BYTES and size * 64 < nbytes:
        size *= 2
    return size


def conversion_bytes(converted: int, block_bytes: int) -> int:
    """Return the device memory that conversions of `converted` bytes take while they are under way."""
    return min(_CONVERTING_BLOCKS * block_bytes, -(-converted // block_bytes) * block_bytes)


def piecemeal_block_bytes(nbytes: int) -> int:
    """Return the size of the blocks for a load into host memory of `nbytes` whose tensors are awaited one by one."""
    least, most = _PIECEMEAL_BLOCK_BYTES
    return min(most, block_bytes(nbytes // 8, least))


def prefers_mapping(processors: int) -> bool:
    """Return whether resident pages should be registered with the driver rather than read through the pinned ring.

    Registering takes a tenth of the processor time, but holds locks that slow reading beside it down: on some machines
    by half. Reading alone keeps the link busy from eight processors on (docs/design/mapped-and-staged.md).
    """
    return processors < _UNMAPPED_PROCESSORS


def engine_settings(
    transports: Set[Transport],
    *,
    io: str,
    threads: int | None,
    memory_limit: int,
    processors: int,
    cuda: bool,
    room: int | None = None,
    sharers: int = 1,
    block_bytes: int = MAX_BLOCK_BYTES,
    slot_bytes: int | None = None,
    converts: bool = False,
    cold: bool = False,
    resident: bool = False,
    reads_in_place: bool = False,
) -> EngineSettings:
    """Decide the settings for one load whose blocks travel by these `transports`.

    The pinned ring takes at most `MAX_RING_BYTES` and never more than a quarter of `memory_limit`; where that allows
    fewer slots than reads, there are fewer reads.

    Args:
        transports: All that occur in the plan.
        io: The mode that the plan uses.
        threads: The reads side by side that were asked for; None chooses.
        memory_limit: The bytes that this process may ever have.
        processors: The processors that it may use.
        cuda: The weights go to a CUDA device.
        room: The bytes that all rings of this machine may take together, where that is known to be little.
        sharers: The processes of this machine that load at the same time: together they take what one would, or half of
            the processors if that is more, though no less than one slot each.
        block_bytes: The size of the plan's blocks, and so the most that is read at once.
        slot_bytes: The size of a slot, where what is read at once is given; None chooses.
        converts: Bytes are converted on the way.
        cold: Most of the bytes must come from storage, whatever the transport.
        resident: None of them must.
        reads_in_place: Bytes that need no conversion may be read to their place in memory.

    Raises:
        HostMemoryError: There is no room for a single slot.
    """
    mapped_only = transports <= {Transport.MAPPED}
    converted = converts and reads_in_place and resident and transports <= {Transport.BUFFERED}
    if converted:
        ring = _converters(threads or processors // sharers)
    else:
        ring = _choose_ring(transports, cuda=cuda, cold=cold)
    # a slot larger than a block would stay partly empty
    slot_bytes = slot_bytes or min(ring.slot_bytes, block_bytes)
    share = max(1, min(ring.reads, max(ring.reads, processors // 2) // sharers))
    shares_mapped = cuda and mapped_only and io != "mapped"
    reads = threads or (_reads_beside(processors // sharers) if shares_mapped else share)
    most = min(MAX_RING_BYTES, memory_limit // 4)
    # a block whose ends are not at pages takes one page more than its length
    affordable = (most if room is None else min(most, room)) // (slot_bytes + PAGE)
    if affordable < 1:
        raise HostMemoryError.because(
            f"the pinned ring needs {slot_bytes + PAGE} bytes, more than there is room for, or than a quarter of the "
            f"{memory_limit} bytes of memory that are allowed here",
            "allow more memory",
        )
    # with fewer slots than reads, some reads could never start
    n_slots = min(reads * ring.slots, max(1, affordable // sharers))
    return EngineSettings(
        threads=min(reads, n_slots),
        slot_bytes=slot_bytes,
        n_slots=n_slots,
        n_together=max(1, min(_COPY_BYTES // slot_bytes, n_slots // 2)),
        mode=_mode(
            converted=converted,
            reads_in_place=reads_in_place,
            shares_mapped=shares_mapped,
            maps_here=mapped_only and resident,
        ),
        # resident pages need no disk: then the driver's own faulting is cheaper, and its lock is held for a moment only
        faults_in=not (cuda and resident),
    )


def _mode(*, converted: bool, reads_in_place: bool, shares_mapped: bool, maps_here: bool) -> TransferMode:
    """Return the first mode that is possible."""
    if converted:
        return TransferMode.CONVERTED
    if reads_in_place:
        return TransferMode.IN_PLACE
    if shares_mapped:
        return TransferMode.SHARED
    return TransferMode.MAPPED_HERE if maps_here else TransferMode.STAGED


def _converters(count: int) -> _Ring:
    count = max(1, min(_CONVERTERS, count))
    return _Ring(count, 1, _PIECE_BYTES if count < _MANY else _PIECE_BYTES_OF_MANY)


def _choose_ring(transports: Set[Transport], *, cuda: bool, cold: bool) -> _Ring:
    if not cuda:
        return _CPU
    if Transport.DIRECT in transports or (cold and Transport.MAPPED not in transports):
        return _DISK
    if Transport.MAPPED in transports:
        return _BESIDE_MAPPED
    return _CACHED


def _reads_beside(processors: int) -> int:
    """Return the number of reads beside a thread that maps."""
    return min(_BESIDE_MAPPED.reads, max(1, processors // 2))
