"""The making of processes with spans of the lines that a program's processes wrote, and of what was seen from outside.

Pure. The lines come from inside a foreign program: what does not have the expected form is left out. All processes are
on one clock, which this machine shares.
"""

from __future__ import annotations

import signal
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from wan_loader.phases import known_phase
from wan_loader.profiler.analysis.outside import OWN_END, outside_process, unseen_reads
from wan_loader.profiler.analysis.roles import name_of, role_of
from wan_loader.profiler.analysis.session import Process, Sample
from wan_loader.profiler.analysis.waiting import busy_windows, unseen_waits
from wan_loader.profiler.watch import Counters, SeenProcess
from wan_loader.spans import Mark

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from wan_loader.profiler.program import Recording

__all__ = ["describe_exit", "merge"]

_MOST_NS = 1 << 62


@dataclass(frozen=True, slots=True)
class _Log:
    """The lines of one process, or of one of the programs that it was in turn."""

    lines: Sequence[dict[str, Any]]
    begin: dict[str, Any]
    end: dict[str, Any] | None
    pid: int
    at_ns: int
    """When the recording began in it."""
    next_ns: int | None = None
    """When the process became another program."""
    replaces: bool = False
    """It was another program before."""


def merge(recording: Recording) -> tuple[Process, ...]:
    """Make one process of each log and of what was only seen, in the order in which they started.

    Times count from the start of the program, and end with the recording.
    """
    logs = _logs(recording.logs)
    exits, gone_ns = _exits(recording)
    processes = [_process(log, recording, exits, gone_ns.get(log.pid)) for log in logs]
    known = {log.pid for log in logs}
    over_ns = _over_ns(recording, logs) - recording.start_ns
    outside = [s for s in recording.seen if s.pid not in known]
    if recording.pid not in known and all(s.pid != recording.pid for s in outside):
        processes.append(_unseen(recording))
    parents = {*(s.parent for s in recording.seen), *(p.parent for p in processes), recording.pid}
    for seen in outside:
        ended = exits.get(seen.pid, "")
        if found := outside_process(seen, recording, ended=ended, needed=seen.pid in parents & {recording.pid, *known}):
            processes.append(found)
    processes = [_cut(p, over_ns) for p in processes if p.start_ns <= over_ns]
    return tuple(_named(_one_of_each_rank(sorted(processes, key=lambda p: (p.start_ns, p.pid)))))


def describe_exit(returncode: int) -> str:
    """Say "exit 3", or "killed by SIGTERM"."""
    if returncode >= 0:
        return f"exit {returncode}"
    try:
        return f"killed by {signal.Signals(-returncode).name}"
    except ValueError:
        return f"killed by signal {-returncode}"


def _logs(lines: Iterable[Sequence[dict[str, Any]]]) -> list[_Log]:
    """Find beginning and end of each log; those of one process follow on each other, as it became other programs."""
    logs: list[_Log] = []
    for log in lines:
        begin: dict[str, Any] = next((line["begin"] for line in log if isinstance(line.get("begin"), dict)), {})
        end = next((line["end"] for line in log if isinstance(line.get("end"), dict)), None)
        if _is_moment(begin.get("pid")):
            at_ns = begin["at"] if _is_moment(begin.get("at")) else 0
            logs.append(_Log(log, begin, end, begin["pid"], at_ns))
    logs.sort(key=lambda log: (log.pid, log.at_ns))
    for i, (before, after) in enumerate(pairwise(tuple(logs))):
        if before.pid == after.pid and before.end is None:
            logs[i] = replace(logs[i], next_ns=after.at_ns)
            logs[i + 1] = replace(after, replaces=True)
    return logs


def _is_moment(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _MOST_NS


def _exits(recording: Recording) -> tuple[dict[int, str], dict[int, int]]:
    """Return how processes ended and when they were gone at the latest, as those said that waited for them."""
    exits: dict[int, str] = {}
    gone_ns: dict[int, int] = {}
    for log in recording.logs:
        for line in log:
            child = line.get("child")
            if isinstance(child, list) and len(child) == 3 and all(isinstance(v, int) for v in child):
                exits[child[0]] = describe_exit(child[1])
                gone_ns[child[0]] = child[2]
    if not recording.inside:
        exits[recording.pid] = describe_exit(recording.returncode)
    return exits, gone_ns


def _over_ns(recording: Recording, logs: Iterable[_Log]) -> int:
    """Return when the recording ended: before the program did, where that was asked for."""
    early: list[int] = [
        log.end["at"]
        for log in logs
        if log.end and log.end.get("why") in ("until", "for") and _is_moment(log.end.get("at"))
    ]
    return min([recording.end_ns, *early])


def _process(log: _Log, recording: Recording, exits: dict[int, str], gone_ns: int | None) -> Process:
    zero, pid = recording.start_ns, log.pid
    begin, end = log.begin, log.end
    direct = pid == recording.pid
    seen = _completed(next((s for s in recording.seen if s.pid == pid), None), log)
    rows = [row for line in log.lines for row in _rows(line.get("spans"))]
    signs = [row[2] for row in rows] + [line["at"] for line in log.lines if _is_moment(line.get("at"))]
    started = begin["started"] if _is_moment(begin.get("started")) else log.at_ns
    start_ns = log.at_ns if log.replaces else zero if direct else started
    counters = [c for c in (seen.counters if seen else ()) if c.at_ns >= start_ns]
    last_ns = max([*signs, start_ns, zero])
    if log.next_ns is not None:
        last_ns = log.next_ns
    elif end is not None and end.get("why") != "exit" and _is_moment(end.get("at")):
        last_ns = end["at"]
    elif direct:
        last_ns = recording.end_ns
    elif seen is not None and seen.end_ns is not None:
        last_ns = max(last_ns, min(seen.end_ns, gone_ns or seen.end_ns))  # Python's own end included
    else:
        last_ns = max([last_ns, *(c.at_ns for c in counters)])
    if end is not None and end.get("why") == "exit" and _is_moment(end.get("at")) and end["at"] < last_ns:
        rows.append(["other", end["at"], last_ns, 0, "MainThread", OWN_END])
    if end is None:
        rows += _cut_short(log.lines, last_ns)
    rows = [[name, max(a, start_ns), b, *rest] for name, a, b, *rest in rows if b >= start_ns]
    spans = tuple(_marks(rows, zero, last_ns))
    facts = _facts(begin, end, log.lines)
    if seen is not None:
        facts["files"] = {**{p: _from_outside(n) for p, n in seen.files.items()}, **facts["files"]}
        if facts["files"]:
            spans += tuple(unseen_reads(spans, seen, recording))
        waits = unseen_waits(spans, seen, recording, reads=bool(facts["files"]))
        spans += tuple(_within(waits, start_ns - zero, last_ns - zero))
    argv = [str(word)[:300] for word in begin.get("argv", [])] if isinstance(begin.get("argv"), list) else []
    forked = begin.get("forked") is True
    return Process(
        title=_title(argv, forked=forked),
        name=name_of(argv)[:100],
        role=role_of(argv, forked=forked),
        pid=pid,
        parent=begin["ppid"] if _is_moment(begin.get("ppid")) else None,
        start_ns=max(0, start_ns - zero),
        end_ns=max(0, start_ns - zero, last_ns - zero),
        rank=begin["rank"] if _is_moment(begin.get("rank")) else None,
        ended=_ended(log, exits),
        spans=spans,
        samples=tuple(Sample(c.at_ns - zero, c.read_bytes, c.resident_bytes) for c in counters if c.at_ns <= last_ns),
        busy=busy_windows(seen, zero, start_ns, last_ns) if seen is not None else (),
        facts=facts,
    )


def _completed(seen: SeenProcess | None, log: _Log) -> SeenProcess | None:
    """Add the counters that a process has left at its end: it may have been too short to be looked at."""
    facts = log.end.get("facts") if log.end is not None else None
    last = facts.get("counters") if isinstance(facts, dict) else None
    if not (isinstance(last, list) and len(last) == 3 and all(map(_is_moment, last))):
        return seen
    at_ns, read_bytes, called_bytes = last
    if seen is None:
        seen = SeenProcess(log.pid, 0, log.at_ns, ())
    before = [c for c in seen.counters if c.at_ns < at_ns]
    resident, cpu_ns = (before[-1].resident_bytes, before[-1].cpu_ns) if before else (0, 0)
    end = Counters(at_ns, read_bytes, resident, called_bytes, cpu_ns, has_weights=True)
    return replace(seen, counters=[*before, end])


def _within(spans: Iterable[Mark], start_ns: int, end_ns: int) -> Iterable[Mark]:
    """Cut spans to what lies between two moments."""
    for span in spans:
        if span.start_ns < end_ns and span.end_ns > start_ns:
            yield replace(span, start_ns=max(span.start_ns, start_ns), end_ns=min(span.end_ns, end_ns))


def _from_outside(nbytes: int) -> dict[str, Any]:
    return {"nbytes": nbytes, "resident_before": None, "reader": "seen from outside", "mapped": False}


def _cut(process: Process, over_ns: int) -> Process:
    """Return the process as it was until the end of the recording."""
    if process.end_ns <= over_ns:
        return process
    spans = tuple(
        s if s.end_ns <= over_ns else replace(s, end_ns=over_ns) for s in process.spans if s.start_ns <= over_ns
    )
    samples = tuple(s for s in process.samples if s.at_ns <= over_ns)
    ended = process.ended if process.end_ns - over_ns < 1_000_000 else "still running"
    return replace(process, end_ns=over_ns, spans=spans, samples=samples, ended=ended)


def _one_of_each_rank(processes: list[Process]) -> list[Process]:
    """Leave the rank to the process that was started with it: what that starts inherits the environment."""
    ranks = {p.pid: p.rank for p in processes}
    return [
        replace(p, rank=None) if p.rank is not None and ranks.get(p.parent or -1) == p.rank else p for p in processes
    ]


def _named(processes: list[Process]) -> list[Process]:
    """Call what multiprocessing starts after the script that it belongs to."""
    by_pid = {p.pid: p for p in processes}
    named = []
    for process in processes:
        above: Process | None = process
        for _ in processes:  # ids that were used again may lead in a circle
            if above is None or above.name:
                break
            above = by_pid.get(above.parent or -1)
        named.append(replace(process, name=above.name if above is not None and above.name else process.title[:100]))
    return named


def _rows(value: Any) -> Iterable[list[Any]]:
    """Yield rows of the right form."""
    for row in value if isinstance(value, list) else ():
        if (
            isinstance(row, list)
            and len(row) == 6
            and all(isinstance(row[i], str) for i in (0, 4, 5))
            and all(_is_moment(row[i]) for i in (1, 2, 3))
        ):
            yield row


def _cut_short(log: Sequence[dict[str, Any]], last_ns: int) -> list[list[Any]]:
    """Return what was open when the process was killed, as far as it was written."""
    for line in reversed(log):
        if isinstance(line.get("spans"), list):
            innermost = line.get("open")
            if not isinstance(innermost, list) or not innermost or not _is_moment(line.get("at")):
                return []
            row = innermost[-1]
            if not (isinstance(row, list) and len(row) == 3 and isinstance(row[0], str) and _is_moment(row[1])):
                return []
            start_ns = max(row[1], line["at"])
            return [[row[0], start_ns, max(start_ns, last_ns), 0, str(line.get("track", "")), f"{row[2]} (cut short)"]]
    return []


def _marks(rows: Iterable[list[Any]], zero: int, last_ns: int) -> Iterable[Mark]:
    for name, start_ns, end_ns, nbytes, track, label in rows:
        start_ns, end_ns = max(start_ns, zero), min(end_ns, last_ns)
        if end_ns >= start_ns:
            yield Mark(known_phase(name), start_ns - zero, end_ns - zero, max(0, nbytes), track, label)


def _title(argv: Sequence[str], *, forked: bool) -> str:
    words = list(argv)
    if words:
        words[0] = words[0].rpartition("/")[2]
    return " ".join(words)[:300] + (" (forked)" if forked else "")


def _ended(log: _Log, exits: dict[int, str]) -> str:
    if log.next_ns is not None:
        return "became another program"
    if log.end is not None and log.end.get("why") != "exit":
        return exits.get(log.pid, "still running")
    if log.pid in exits:
        return exits[log.pid]
    facts = log.end.get("facts") if log.end is not None else None
    status = facts.get("status") if isinstance(facts, dict) else None
    if _is_moment(status):
        return f"exit {status}"
    return "ended" if log.end is not None else "killed, or left without cleaning up"


def _facts(begin: dict[str, Any], end: dict[str, Any] | None, log: Sequence[dict[str, Any]]) -> dict[str, Any]:
    facts = {k: begin[k] for k in ("python", "env", "forked") if k in begin}
    files = [line["file"] for line in log if isinstance(line.get("file"), list) and len(line["file"]) == 2]
    ended = (end or {}).get("facts")
    kept = {k: v for k, v in ended.items() if k != "counters"} if isinstance(ended, dict) else {}
    return {**facts, **kept, "files": {str(path): _file(entry) for path, entry in files if isinstance(entry, dict)}}


def _file(entry: dict[str, Any]) -> dict[str, Any]:
    nbytes, resident, site = entry.get("nbytes"), entry.get("resident_before"), entry.get("site")
    return {
        "nbytes": nbytes if _is_moment(nbytes) else 0,
        "resident_before": resident if _is_moment(resident) else None,
        "reader": str(entry.get("reader"))[:100],
        "mapped": entry.get("mapped") is True,
        **({"site": site} if _is_site(site) else {}),
    }


def _is_site(value: Any) -> bool:
    """Say whether this is a file and a line of it."""
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and _is_moment(value[1])


def _unseen(recording: Recording) -> Process:
    """Make a process of the program itself, where nothing could be recorded inside it."""
    return Process(
        title=" ".join(recording.argv)[:300],
        name=name_of(recording.argv)[:100],
        role=role_of(recording.argv),
        pid=recording.pid,
        start_ns=0,
        end_ns=recording.end_ns - recording.start_ns,
        ended=describe_exit(recording.returncode),
        facts={"unseen": True},
    )
