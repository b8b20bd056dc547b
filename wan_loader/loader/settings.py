"""How many threads, how much staging: pure decisions from the ways and the machine's limits. Defaults live here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from wan_loader.engine import EngineSettings
from wan_loader.errors import HostMemoryError, OptionError
from wan_loader.plan import PAGE, Way
from wan_loader.types import IO_MODES

if TYPE_CHECKING:
    from collections.abc import Set

__all__ = [
    "MAX_LANES",
    "MAX_STAGING_BYTES",
    "MAX_THREADS",
    "SLOT_BYTES",
    "block_bytes",
    "check_io",
    "check_threads",
    "engine_settings",
    "prefers_mapping",
]

MiB = 1 << 20

MAX_THREADS = 64
MAX_STAGING_BYTES = 512 * MiB
#: Reads of this size keep any storage busy, and the interpreter out of the way.
SLOT_BYTES = 8 * MiB
#: What comes from the page cache should stay in the processor's cache, with all other slots, until the GPU has it.
_CACHED_SLOT_BYTES = 4 * MiB
#: Casts on the GPU that read slots themselves keep the link busy with larger ones only.
_CAST_SLOT_BYTES = 8 * MiB
#: Conversions on the CPU share their work among cores, and less than this is not worth it.
_CPU_SLOT_BYTES = 16 * MiB
#: Blocks are the unit of residency and of registration. Larger ones register no faster.
MAX_BLOCK_BYTES = 32 * MiB

_LANES = 8
#: From the page cache, where the processors' copies are what bounds a load.
MAX_LANES = 10
#: Beside the mapped way, where that was asked for: the most speed for its CPU time.
_LANES_MAPPED = 1
_SLOTS_PER_LANE = 3
#: From the page cache: one slot is filled while the other is fetched. A third only takes room in the processor's cache.
_SLOTS_PER_CACHED_LANE = 2


def block_bytes(nbytes: int, at_least: int = SLOT_BYTES) -> int:
    """Size of the plan's blocks for a load of `nbytes`: small loads get smaller ones, so that stages overlap."""
    size = at_least
    while size < MAX_BLOCK_BYTES and size * 64 < nbytes:
        size *= 2
    return size


def prefers_mapping(processors: int) -> bool:
    """Whether pages that are resident should be registered with the driver rather than read through staging.

    Registering takes a tenth of the processor time, but holds locks that slow staging beside it down: on some machines
    by half. Staging alone keeps the link busy from eight processors on (docs/design/mapped-and-staged.md).
    """
    return processors < _LANES


def check_io(io: str) -> None:
    """`OptionError` unless `io` is one of the modes."""
    if io not in IO_MODES:
        raise OptionError(f"io={io!r}: use one of {', '.join(IO_MODES)}")


def check_threads(threads: int | None) -> None:
    """`OptionError` unless `threads` is a sensible number of reads side by side."""
    if threads is not None and not 1 <= threads <= MAX_THREADS:
        raise OptionError(f"threads={threads}: use 1 to {MAX_THREADS}")


def engine_settings(
    ways: Set[Way],
    *,
    io: str,
    threads: int | None,
    memory_limit: int,
    processors: int,
    cuda: bool,
    sharers: int = 1,
    slot_bytes: int | None = None,
    converts: bool = False,
) -> EngineSettings:
    """Settings for one load whose blocks travel on these `ways`.

    threads: reads side by side that were asked for; None chooses. Staging takes at most `MAX_STAGING_BYTES` and never
    more than a quarter of `memory_limit` (bytes); where that allows fewer slots than reads, there are fewer reads.
    sharers: processes of this machine that load at the same time: together they take what one would, or half of the
    processors if that is more, though no less than one slot each.
    slot_bytes: where the size of what is read at once is given; None chooses.
    converts: whether bytes are converted on the way.
    """
    mapped_only = ways <= {Way.MAPPED}
    cached = cuda and ways <= {Way.BUFFERED}
    slot_bytes = slot_bytes or _slot_bytes(cached=cached, cuda=cuda, converts=converts)
    most = MAX_LANES if cached else _LANES
    share = max(1, min(most, max(most, processors // 2) // sharers))
    lanes = threads or (_lanes_beside(io, processors // sharers) if mapped_only else share)
    affordable = min(MAX_STAGING_BYTES, memory_limit // 4) // (slot_bytes + PAGE)
    if affordable < 1:
        raise HostMemoryError(
            f"staging needs {slot_bytes + PAGE} bytes, more than a quarter of the {memory_limit} bytes of memory that "
            "are allowed here: allow more memory"
        )
    n_slots = min(lanes * (_SLOTS_PER_CACHED_LANE if cached else _SLOTS_PER_LANE), max(1, affordable // sharers))
    return EngineSettings(
        threads=min(lanes, n_slots), slot_bytes=slot_bytes, n_slots=n_slots, may_steal=cuda and mapped_only
    )


def _slot_bytes(*, cached: bool, cuda: bool, converts: bool) -> int:
    if not cuda:
        return _CPU_SLOT_BYTES
    if not cached:
        return SLOT_BYTES
    return _CAST_SLOT_BYTES if converts else _CACHED_SLOT_BYTES


def _lanes_beside(io: str, processors: int) -> int:
    """Beside the mapped way."""
    return _LANES_MAPPED if io == "mapped" else min(_LANES, max(1, processors // 2))
