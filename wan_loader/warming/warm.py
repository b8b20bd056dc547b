"""Warming the page cache in the foreground: reads until everything asked for is resident, and says what came of it.

The reading is `prewarm`'s: a few threads, one block each, of what is not there yet. Here it is checked first whether
the machine can hold it, watched while it goes on, and measured afterwards, where the kernel tells.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from wan_loader.errors import CheckpointError, HostMemoryError
from wan_loader.events import clock_ns
from wan_loader.sizes import format_bytes
from wan_loader.system.machine import available_memory, memory_limit
from wan_loader.system.threads import default_threads
from wan_loader.warming.evict import resident_bytes
from wan_loader.warming.prewarm import MEMORY_SHARE, Prewarm

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from wan_loader.warming.tree import SourceFile

__all__ = ["Warmed", "warm"]

_TICK_S = 0.1
#: A second one brings back what the kernel has taken away meanwhile.
_PASSES = 2
#: How long an interrupted warm-up waits for a thread that hangs in a read.
_GRACE_S = 0.1
#: Reading stops where less than this share of the machine's memory is left: it would only push other pages out.
_FLOOR_SHARE = 0.03


@dataclass(frozen=True, slots=True)
class Warmed:
    """A warm-up that has ended."""

    nbytes: int
    """Bytes that were asked for."""
    resident_before: int | None
    """Bytes that were in the page cache; None where that is unknown."""
    resident_after: int | None
    """Bytes that are in the page cache now; None where that is unknown."""
    nbytes_read: int
    """Bytes brought in from storage; where it is unknown what was there, all bytes that were read."""
    seconds: float
    warnings: tuple[str, ...]

    @property
    def complete(self) -> bool | None:
        """True if all that was asked for is resident now; None where that is unknown."""
        return None if self.resident_after is None else self.resident_after >= self.nbytes


def warm(
    files: Sequence[SourceFile],
    *,
    threads: int | None = None,
    limit_nbytes: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Warmed:
    """Bring files into the page cache, in the order given, and wait for it.

    Args:
        files: The files, as `list_tree` found them.
        threads: The number of reads side by side; None chooses.
        limit_nbytes: Only the first so many bytes.
        progress: Told (done, total) bytes.

    Raises:
        HostMemoryError: What is missing is more than the machine or the cgroup can hold beside what is in use. Nothing
            was read.
        CheckpointError: A file cannot be read.
    """
    paths = [file.path for file in files]
    wanted = sum(file.nbytes for file in files)
    wanted = wanted if limit_nbytes is None else min(wanted, limit_nbytes)
    before = resident_bytes(paths, first_nbytes=wanted)
    _check_fits(wanted, before or 0)
    start_ns = clock_ns()
    after = before
    read = 0
    warnings: tuple[str, ...] = ()
    for _ in range(_PASSES):
        running = Prewarm(paths, threads=threads or default_threads(), budget_nbytes=wanted, first_nbytes=wanted)
        try:
            warnings = _watch(running, wanted, progress)
        finally:
            running.stop(_GRACE_S)
        if running.failures:
            raise CheckpointError.because(running.failures[0], "check the file and the disk")
        read += running.nbytes_read
        after = resident_bytes(paths, first_nbytes=wanted)
        if after is None or after >= wanted or warnings:
            break
    # measured, where that is possible: what a second pass brings back would be counted twice
    if before is not None and after is not None:
        read = max(0, after - before)
    seconds = (clock_ns() - start_ns) / 1e9
    return Warmed(wanted, before, after, read, seconds, warnings)


def _check_fits(nbytes: int, resident: int) -> None:
    limit, free = memory_limit(), available_memory()
    # pages that are there take nothing from the free memory, of which clean page cache is a part
    missing = max(0, nbytes - resident)
    advice = "warm a part (--limit, or one component), or stage it on a faster disk"
    if nbytes > limit:
        raise HostMemoryError.because(
            f"{format_bytes(nbytes)} never fit into the {format_bytes(limit)} of memory", advice
        )
    if free is not None and missing > free * MEMORY_SHARE:
        raise HostMemoryError.because(
            f"{format_bytes(missing)} are to be read and {format_bytes(free)} of memory are free "
            f"({MEMORY_SHARE:.0%} of that may be filled)",
            f"{advice}, or end other programs",
        )


def _watch(running: Prewarm, total: int, progress: Callable[[int, int], None] | None) -> tuple[str, ...]:
    floor = int(memory_limit() * _FLOOR_SHARE)
    while not running.wait(_TICK_S):
        if progress is not None:
            progress(running.nbytes_read + running.nbytes_resident, total)
        if (free := available_memory()) is not None and free < floor:
            running.stop()
            return (f"stopped early: other programs left {format_bytes(free)} of memory",)
    return ()
