"""What processes read, as the kernel counted it, where no hook saw it: in Python processes, and in all others. Pure."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

from wan_loader.profiler.analysis.roles import name_of, role_of
from wan_loader.profiler.analysis.session import Process, Sample
from wan_loader.profiler.analysis.waiting import busy_windows, unseen_waits
from wan_loader.profiler.watch import Counters
from wan_loader.spans import Mark, gaps, union

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from wan_loader.profiler.program import Recording
    from wan_loader.profiler.watch import SeenProcess

__all__ = ["COUNTED", "OWN_END", "outside_process", "unseen_reads"]

#: The label of reading that is known from counters alone.
COUNTED = "counted by the kernel"
#: The label of what Python does after the program: it takes objects and modules apart.
OWN_END = "Python's own end"
#: Fewer bytes in a window are not the reading of weights.
_WORTH_BYTES = 4 << 20
_SHORT_NS = 200_000_000


def outside_process(seen: SeenProcess, recording: Recording, *, ended: str, needed: bool) -> Process | None:
    """Make a process of what was seen from outside alone; None where it did too little to be worth a line.

    Args:
        seen: What was seen.
        recording: The recording.
        ended: How it ended, where that is known.
        needed: It is worth a line in any case, as it started others.
    """
    zero = recording.start_ns
    direct = seen.pid == recording.pid
    last_ns = recording.end_ns if direct else seen.end_ns or recording.end_ns
    start_ns = zero if direct else seen.start_ns
    reads = tuple(unseen_reads((), seen, recording))
    spans = (*reads, *unseen_waits(reads, seen, recording, reads=bool(seen.files)))
    nbytes = sum(s.nbytes for s in spans)
    if not (needed or nbytes or seen.files or last_ns - start_ns > _SHORT_NS):
        return None
    facts: dict[str, Any] = {"unseen": True}
    if nbytes:
        facts["counted_bytes"] = nbytes
    if seen.files:
        facts["files"] = {
            p: {"nbytes": n, "resident_before": None, "reader": "seen from outside", "mapped": False}
            for p, n in seen.files.items()
        }
    words = list(recording.argv if direct else seen.command)
    counters = [c for c in seen.counters if c.at_ns <= last_ns]
    return Process(
        title=" ".join(words)[:300],
        name=name_of(words)[:100],
        role=role_of(words),
        pid=seen.pid,
        parent=seen.parent,
        start_ns=max(0, start_ns - zero),
        end_ns=max(0, start_ns - zero, last_ns - zero),
        ended=ended,
        spans=spans,
        samples=tuple(Sample(c.at_ns - zero, c.read_bytes, c.resident_bytes) for c in counters),
        busy=busy_windows(seen, zero, start_ns, last_ns),
        facts=facts,
    )


def unseen_reads(spans: Sequence[Mark], seen: SeenProcess, recording: Recording) -> Iterator[Mark]:
    """Yield the reading of a process that its spans do not hold, in the gaps between them.

    A process's counters jump when it has waited for a child, by the child's own: that is taken out.
    """
    zero = recording.start_ns
    covered = union(spans)
    reads = [s for s in spans if s.name == "read"]
    children = [s for s in recording.seen if s.parent == seen.pid and s.end_ns is not None and s.counters]
    # the kernel counts a call when it is over, and what is fetched for it before, so what is recorded is owed by each
    owed_fetched = owed_called = 0
    # read calls also read pipes and sockets; those of children that were too short to be seen are like their siblings'
    of_weights = any(child.files for child in children)
    left = {id(child): max(child.counters[-1].read_bytes, child.counters[-1].called_bytes) for child in children}
    for a, b in pairwise(_from_birth(seen, zero)):
        start_ns, end_ns = max(0, a.at_ns - zero), b.at_ns - zero
        recorded = sum(s.nbytes for s in reads if start_ns <= s.start_ns < end_ns)
        fetched, called = _counted(a, b, children, left, of_weights=of_weights)
        owed_fetched, owed_called = owed_fetched + recorded - fetched, owed_called + recorded - called
        nbytes = max(0, -owed_fetched, -owed_called)
        if nbytes >= _WORTH_BYTES:
            free = gaps(covered, start_ns, end_ns)
            free_ns = sum(e - s for s, e in free)
            for s, e in free:
                yield Mark("read", s, e, nbytes * (e - s) // free_ns, "kernel", COUNTED)
        is_reading = any(s.start_ns < end_ns < s.end_ns for s in reads)
        owed_fetched = max(0, owed_fetched) if is_reading else 0
        owed_called = max(0, owed_called) if is_reading else 0


def _from_birth(seen: SeenProcess, zero: int) -> Sequence[Counters]:
    """Return the counters of a process, which begin at nothing; what it fetched before it had weights is its start.

    Of a process that is older than the recording, only what was seen counts.
    """
    first = seen.counters[:1] if seen.start_ns > zero - _SHORT_NS else ()
    birth = [
        Counters(min(seen.start_ns, c.at_ns), 0 if c.has_weights else c.read_bytes, 0, has_weights=c.has_weights)
        for c in first
    ]
    return [*birth, *seen.counters]


def _counted(
    a: Counters, b: Counters, children: Sequence[SeenProcess], left: dict[int, int], *, of_weights: bool
) -> tuple[int, int]:
    """Return the bytes that a process itself has fetched from storage, and has read by calls, between two looks.

    Args:
        a: The first look.
        b: The second one.
        children: Those that it has waited for.
        left: Bytes of each that have not been taken out yet; is changed.
        of_weights: Read calls are known to read weights, though no file of them is open.
    """
    called = b.called_bytes - a.called_bytes if of_weights or a.has_weights or b.has_weights else 0
    fetched, called = max(0, b.read_bytes - a.read_bytes), max(0, called)
    for child in children:
        # its end is noticed a little later than it happens
        if a.at_ns - _SHORT_NS <= (child.end_ns or 0) <= b.at_ns + _SHORT_NS:
            taken = min(max(fetched, called), left[id(child)])
            left[id(child)] -= taken
            fetched, called = max(0, fetched - taken), max(0, called - taken)
    return fetched, called
