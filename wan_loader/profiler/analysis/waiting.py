"""The waiting of processes that no hook saw: times without a processor, between what was recorded. Pure."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

from wan_loader.profiler.blocked import STORAGE
from wan_loader.profiler.watch import is_idle
from wan_loader.spans import Mark, gaps, union

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from wan_loader.profiler.program import Recording
    from wan_loader.profiler.watch import Counters, SeenProcess

__all__ = ["busy_windows", "unseen_waits"]


def busy_windows(seen: SeenProcess, zero: int, start_ns: int, last_ns: int) -> tuple[tuple[int, int], ...]:
    """Return the times in which a process used a processor for at least a third of the time.

    Args:
        seen: The process.
        zero: The start of the program, from which the times count.
        start_ns: Nothing before counts.
        last_ns: Nothing after it counts.
    """
    return tuple(
        (a.at_ns - zero, min(b.at_ns, last_ns) - zero)
        for a, b in pairwise(seen.counters)
        if a.at_ns >= start_ns and a.at_ns < last_ns and (b.cpu_ns - a.cpu_ns) * 3 >= b.at_ns - a.at_ns
    )


def unseen_waits(spans: Sequence[Mark], seen: SeenProcess, recording: Recording, *, reads: bool) -> Iterator[Mark]:
    """Yield the times in which a process did nothing, with what it waited for.

    Args:
        spans: What is known to have happened in it.
        seen: The process from outside.
        recording: The recording.
        reads: The process has files of weights, and what comes from storage to it is reading.
    """
    zero = recording.start_ns
    covered = union(s for s in spans if s.name != "other")  # a frame around others tells nothing of its own time
    for start_ns, end_ns, reason in _idle(seen.counters):
        name = "read" if reason == STORAGE and reads else "wait"
        for s, e in gaps(covered, max(0, start_ns - zero), end_ns - zero):
            yield Mark(name, s, e, 0, "kernel", reason)


def _idle(counters: Sequence[Counters]) -> Iterator[tuple[int, int, str]]:
    """Yield the times between looks in which a process used no processor to speak of; equal ones are one."""
    start_ns, end_ns, reason = 0, 0, ""
    for a, b in pairwise(counters):
        # of what has ended nothing is told, nor of what was just about to go on: it waited as before
        now = (b.blocked_by or a.blocked_by) if is_idle(a, b) else ""
        if now == reason and a.at_ns == end_ns:
            end_ns = b.at_ns
            continue
        if reason:
            yield start_ns, end_ns, reason
        start_ns, end_ns, reason = a.at_ns, b.at_ns, now
    if reason:
        yield start_ns, end_ns, reason
