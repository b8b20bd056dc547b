"""Arithmetic over spans: unions, the phases that the wall time goes to, throughput over time, bytes in flight. Pure.

Phases overlap. `attribute` shares the wall time out so that it adds up: each moment belongs to the phase that sets the
pace then, which is the busiest overall among those at work; waiting counts only where nothing works, and a frame around
others where nothing is known of what happens in it.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from wan_loader.events import Span, busy_ns
from wan_loader.phases import ALL_PHASES, known_phase

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = [
    "Mark",
    "PhaseSummary",
    "attribute",
    "by_label",
    "by_phase",
    "gaps",
    "in_flight",
    "overlap_ns",
    "summarize",
    "throughput",
    "union",
]

SpanT = TypeVar("SpanT", bound=Span)


@dataclass(frozen=True, slots=True)
class PhaseSummary:
    """One phase of a load. `busy_s` is the union of its intervals over all threads and streams."""

    name: str
    busy_s: float
    nbytes: int

    @property
    def gbps(self) -> float:
        """GB/s while busy; 0 where bytes make no sense."""
        return self.nbytes / self.busy_s / 1e9 if self.busy_s > 0 else 0.0


@dataclass(frozen=True, slots=True)
class Mark(Span):
    """A span with a word on what it was: a package, a file, the kind of copy."""

    label: str = ""


def union(spans: Iterable[Span]) -> list[tuple[int, int]]:
    """Merge the spans' intervals; return them in order."""
    merged: list[tuple[int, int]] = []
    for start_ns, end_ns in sorted((s.start_ns, s.end_ns) for s in spans):
        if merged and start_ns <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end_ns))
        elif end_ns > start_ns:
            merged.append((start_ns, end_ns))
    return merged


def overlap_ns(a: Sequence[tuple[int, int]], b: Sequence[tuple[int, int]]) -> int:
    """Return the length of what two merged lists of intervals have in common."""
    total, i, j = 0, 0, 0
    while i < len(a) and j < len(b):
        total += max(0, min(a[i][1], b[j][1]) - max(a[i][0], b[j][0]))
        if a[i][1] < b[j][1]:
            i += 1
        else:
            j += 1
    return total


def gaps(covered: Sequence[tuple[int, int]], start_ns: int, end_ns: int) -> list[tuple[int, int]]:
    """Return the times between two moments that merged intervals leave free."""
    free, at = [], start_ns
    for s, e in covered[max(0, bisect_left(covered, (start_ns, 0)) - 1) :]:
        if s >= end_ns:
            break
        if s > at:
            free.append((at, s))
        at = max(at, e)
    if at < end_ns:
        free.append((at, end_ns))
    return free


def by_phase(spans: Iterable[SpanT]) -> dict[str, list[SpanT]]:
    """Sort the spans by their phase, in the order of `ALL_PHASES`; those of phases that are not known are "other"."""
    groups: dict[str, list[SpanT]] = {name: [] for name in ALL_PHASES}
    for span in spans:
        groups[known_phase(span.name)].append(span)
    return {name: group for name, group in groups.items() if group}


def summarize(spans: Iterable[Span]) -> tuple[PhaseSummary, ...]:
    """Add up busy time and bytes of each phase that occurred; spans of phases that are not known count as "other"."""
    groups = by_phase(spans).items()
    return tuple(PhaseSummary(name, busy_ns(group) / 1e9, sum(s.nbytes for s in group)) for name, group in groups)


def attribute(spans: Iterable[Span], start_ns: int, end_ns: int) -> dict[str, float]:
    """Give each moment of [start, end) to the phase that set the pace then; the rest is "other".

    Args:
        spans: What was recorded, in any order.
        start_ns: Where the time begins that is shared out.
        end_ns: Where it ends.

    Returns:
        Seconds by phase, which add up to the whole.
    """
    merged = {name: union(group) for name, group in by_phase(spans).items()}
    busy = {name: sum(e - s for s, e in intervals) for name, intervals in merged.items()}
    rank = sorted(busy, key=lambda name: (name == "other", name == "wait", -busy[name]))
    # A bit stands for each phase, the lowest for the first in rank: the lowest bit that is set sets the pace.
    owners = {1 << i: name for i, name in enumerate(rank)}
    edges = []
    for bit, name in owners.items():
        for s, e in merged[name]:
            if max(s, start_ns) < min(e, end_ns):
                edges += [(max(s, start_ns), bit), (min(e, end_ns), bit)]
    edges.sort()
    out: dict[str, int] = {}
    active, last = 0, start_ns
    for at, bit in [*edges, (end_ns, 0)]:
        if at > last:
            owner = owners.get(active & -active, "other")
            out[owner] = out.get(owner, 0) + at - last
            last = at
        # merged intervals of a phase do not overlap, so its bit is set at their starts and cleared at their ends
        active ^= bit
    return {name: ns / 1e9 for name, ns in out.items()}


def by_label(spans: Iterable[Span], name: str) -> list[tuple[str, float, int]]:
    """Add up (label, busy seconds, bytes) of one phase, the longest first."""
    grouped: dict[str, list[Mark]] = {}
    for span in spans:
        if span.name == name and isinstance(span, Mark) and span.label:
            grouped.setdefault(span.label, []).append(span)
    rows = [(label, busy_ns(group) / 1e9, sum(s.nbytes for s in group)) for label, group in grouped.items()]
    return sorted(rows, key=lambda row: -row[1])


def throughput(spans: Iterable[Span], end_ns: int, buckets: int = 160) -> list[float]:
    """Return bytes per second in equal slices of [0, end): each span's bytes spread evenly over its time."""
    width = max(1.0, end_ns / buckets)
    out = [0.0] * buckets
    for span in spans:
        length = span.end_ns - span.start_ns
        if not span.nbytes:
            continue
        first, last = int(span.start_ns // width), int(max(span.start_ns, span.end_ns - 1) // width)
        for i in range(max(0, first), min(buckets - 1, last) + 1):
            inside = min(span.end_ns, (i + 1) * width) - max(span.start_ns, i * width)
            out[i] += span.nbytes * (inside / length if length else 1 / (last - first + 1))
    return [nbytes / width * 1e9 for nbytes in out]


def in_flight(spans: Iterable[Span]) -> list[tuple[int, int]]:
    """Return (time, bytes read but not yet copied), at each change. Only where both sides count bytes."""
    # a block counts from the end of its read to the end of its copy
    steps = [(s.end_ns, s.nbytes if s.name == "read" else -s.nbytes) for s in spans if s.name in ("read", "h2d")]
    out: list[tuple[int, int]] = []
    level = 0
    for at, step in sorted(steps):
        level = max(0, level + step)
        out.append((at, level))
    return out
