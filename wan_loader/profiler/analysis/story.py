"""The processes of a program as one story: which of them set the pace when, and which waited for it. Pure.

Each moment of the program belongs to one process, so that the times add up to the whole. It is the one at work; among
several, the one that works most overall, since the others wait for it in the end. Where nothing is at work, it is one
in a collective, then one that sleeps or waits for the network, and then one that is not known to wait for another
process.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from wan_loader.phases import PHASE_TABLE
from wan_loader.profiler.analysis.roles import HELPER, LAUNCHER
from wan_loader.profiler.analysis.session import Process, Turn
from wan_loader.profiler.blocked import ALONE, FOR_PROCESS
from wan_loader.sizes import format_seconds
from wan_loader.spans import overlap_ns, union

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = ["Wait", "launchers_of", "pace_sentence", "subject_of", "turns_of", "waits_of"]

_WORK = frozenset(kind.name for kind in PHASE_TABLE if kind.is_work and kind.name != "shard")
_WORTH = 0.05
_WORTH_S = 0.1
_MOST_NAMED = 3


@dataclass(frozen=True, slots=True)
class Wait:
    """How long a process did nothing while another set the pace."""

    process: int
    seconds: float
    together: bool
    """Most of it in a collective."""


@dataclass(frozen=True, slots=True)
class _Times:
    """When a process was at work, and when it is known to have waited; merged intervals."""

    working: list[tuple[int, int]]
    waiting: list[tuple[int, int]]
    """For another process."""
    together: list[tuple[int, int]]
    alone: list[tuple[int, int]]
    """For what is no process of the program: the network, or the end of its sleep."""


def turns_of(processes: Sequence[Process], end_ns: int) -> tuple[Turn, ...]:
    """Share out the time of a program among its processes.

    Args:
        processes: The processes.
        end_ns: The program's end; it begins at 0.

    Returns:
        Turns that follow on each other without gaps.
    """
    if len(processes) == 1:
        return (Turn(0, 0, end_ns),)
    order = sorted(range(len(processes)), key=lambda i: _weight(processes[i]), reverse=True)
    size = len(order)
    edges: list[tuple[int, int]] = []
    for place, number in enumerate(order):
        process, times = processes[number], _times(processes[number])
        # a bit each: the lowest that is set has the turn. At work, in a collective, waiting alone, not known to wait
        # for others, alive
        free = [] if process.role == HELPER else _without(process, times)
        levels = (times.working, times.together, times.alone, free, [(process.start_ns, process.end_ns)])
        for level, intervals in enumerate(levels):
            bit = 1 << (place + level * size)
            for start_ns, until_ns in intervals:
                start_ns, until_ns = max(0, start_ns), min(end_ns, until_ns)
                if start_ns < until_ns:
                    edges += [(start_ns, bit), (until_ns, bit)]
    return _walk(sorted(edges), order, end_ns)


def _walk(edges: Iterable[tuple[int, int]], order: Sequence[int], end_ns: int) -> tuple[Turn, ...]:
    turns: list[Turn] = []
    active, last, owner = 0, 0, order[0]
    for at, bit in [*edges, (end_ns, 0)]:
        if at > last:
            if active:
                owner = order[((active & -active).bit_length() - 1) % len(order)]
            if turns and turns[-1].process == owner:
                turns[-1] = Turn(owner, turns[-1].start_ns, at)
            else:
                turns.append(Turn(owner, last, at))
            last = at
        active ^= bit
    return tuple(turns)


def _weight(process: Process) -> tuple[bool, float, bool, float, int]:
    """Rank a process among those at work at the same time: start-up work first, not the launcher that waits for it."""
    work = sum(s.end_ns - s.start_ns for s in process.spans if s.name in _WORK)
    imports = sum(s.end_ns - s.start_ns for s in process.spans if s.name == "import")
    leads = process.role not in (LAUNCHER, HELPER) and "unseen" not in process.facts
    # small differences of work say nothing; between equals, a rank is worth more than what it has started
    return leads, work // 100_000_000, process.rank is not None, work + imports, -process.pid


def _times(process: Process) -> _Times:
    together = union(s for s in process.spans if s.name == "shard")
    waiting = union(s for s in process.spans if s.name == "shard" or (s.name == "wait" and s.label == FOR_PROCESS))
    # who watches others sleeps between two looks at them
    watches = process.role in (LAUNCHER, HELPER)
    alone = [] if watches else union(s for s in process.spans if s.name == "wait" and s.label in ALONE)
    spans = [(s.start_ns, s.end_ns) for s in process.spans if s.name not in ("wait", "shard", "other")]
    busy = [window for window in process.busy if not overlap_ns([window], waiting)]
    return _Times(_merged([*spans, *busy]), waiting, together, alone)


def _merged(intervals: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for start_ns, end_ns in sorted(intervals):
        if merged and start_ns <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end_ns))
        elif end_ns > start_ns:
            merged.append((start_ns, end_ns))
    return merged


def _without(process: Process, times: _Times) -> list[tuple[int, int]]:
    """Return the life of a process but for its waiting."""
    free, at = [], process.start_ns
    for start_ns, end_ns in times.waiting:
        free.append((at, max(at, min(start_ns, process.end_ns))))
        at = max(at, end_ns)
    return _merged([*free, (at, max(at, process.end_ns))])


def subject_of(processes: Sequence[Process], turns: Sequence[Turn]) -> int:
    """Choose the process to report on: the one that set the pace longest, but no launcher where it started others.

    Many short ones of the same name count as one, of which the longest is reported on.
    """
    paced = _paced_s(processes, turns)
    alike: dict[str, float] = {}
    for process, seconds in zip(processes, paced, strict=True):
        alike[_kind(process)] = alike.get(_kind(process), 0.0) + seconds

    def key(number: int) -> tuple[bool, float, float, int]:
        process = processes[number]
        leads = process.role not in (LAUNCHER, HELPER)
        return leads, alike[_kind(process)], paced[number], -process.start_ns

    return max(range(len(processes)), key=key)


def _paced_s(processes: Sequence[Process], turns: Sequence[Turn]) -> list[float]:
    """Return for each process how long it set the pace."""
    paced = [0.0] * len(processes)
    for turn in turns:
        paced[turn.process] += turn.seconds
    return paced


def _kind(process: Process) -> str:
    """Name a process as all of its kind are named."""
    return process.shown + (f" ({process.role})" if process.role else "")


def launchers_of(processes: Sequence[Process]) -> frozenset[int]:
    """Return the places of those that only start others."""
    parents = {p.parent for p in processes}
    return frozenset(
        i for i, p in enumerate(processes) if p.role == HELPER or (p.role == LAUNCHER and p.pid in parents)
    )


def waits_of(processes: Sequence[Process], turns: Sequence[Turn]) -> tuple[Wait, ...]:
    """Tell how long each process did nothing while another set the pace, the longest first."""
    waits = []
    for number, process in enumerate(processes):
        if process.role == HELPER:
            continue
        times = _times(process)
        others = _merged(
            (max(t.start_ns, process.start_ns), min(t.end_ns, process.end_ns))
            for t in turns
            if t.process != number and t.start_ns < process.end_ns and t.end_ns > process.start_ns
        )
        ns = sum(e - s for s, e in others) - overlap_ns(others, times.working)
        waits.append(Wait(number, ns / 1e9, overlap_ns(others, times.together) * 2 > ns))
    return tuple(sorted((w for w in waits if w.seconds > 0), key=lambda w: -w.seconds))


def pace_sentence(processes: Sequence[Process], turns: Sequence[Turn], subject: int) -> str:
    """Say which process set the pace and what the others waited for; nothing where there is only one."""
    if len(processes) < 2 or not turns:
        return ""
    seconds = (turns[-1].end_ns - turns[0].start_ns) / 1e9
    least = max(_WORTH * seconds, _WORTH_S)
    (first, first_s), *others = _who(processes, turns, subject)
    who = [f"{first} set it for {format_seconds(first_s)}"]
    who += [f"{other} for {format_seconds(other_s)}" for other, other_s in others[:2] if other_s >= least]
    text = " and ".join(who)
    waits = [
        w
        for w in waits_of(processes, turns)
        if w.seconds >= least and w.process != subject and _matters(processes, w, subject)
    ][:_MOST_NAMED]
    if waits:
        text += "; meanwhile " + ", ".join(
            f"{label(processes, w.process)} waited {format_seconds(w.seconds)}"
            + (" (in collectives)" if w.together else "")
            for w in waits
        )
    return text


def _who(processes: Sequence[Process], turns: Sequence[Turn], subject: int) -> list[tuple[str, float]]:
    """Tell (name, seconds) of those that set the pace, the subject first, then the longest; many of a kind as one."""
    paced = _paced_s(processes, turns)
    kinds: dict[str, list[int]] = {}
    for number, process in enumerate(processes):
        if paced[number] or number == subject:
            kinds.setdefault(_kind(process), []).append(number)
    rows = []
    for kind, alike in kinds.items():
        if len(alike) > _MOST_NAMED:
            rows.append((subject not in alike, f"{len(alike)} times {kind}", sum(paced[i] for i in alike)))
        else:
            rows += [(i != subject, label(processes, i), paced[i]) for i in alike]
    return [(name, seconds) for _, name, seconds in sorted(rows, key=lambda row: (row[0], -row[2]))]


def _matters(processes: Sequence[Process], wait: Wait, subject: int) -> bool:
    """Say whether a wait tells something: of what started the subject, of a rank, in a collective."""
    process, parents = processes[wait.process], {p.pid: p.parent for p in processes}
    above = processes[subject].parent
    for _ in processes:
        if above == process.pid:
            return True
        above = parents.get(above or -1)
    return process.rank is not None or wait.together


def label(processes: Sequence[Process], number: int) -> str:
    """Name a process so that it can be told from the others."""
    process = processes[number]
    alike = sum(p.shown == process.shown for p in processes) > 1
    return _kind(process) + (f" [{process.pid}]" if alike else "")
