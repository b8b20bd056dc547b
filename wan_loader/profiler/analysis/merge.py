"""The making of processes with spans of the lines that a program's processes wrote. Pure.

The lines come from inside a foreign program: what does not have the expected form is left out.
"""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, Any

from wan_loader.phases import PHASE_TABLE, known_phase
from wan_loader.profiler.analysis.session import Process, Sample
from wan_loader.spans import Mark

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from wan_loader.profiler.program import Recording

__all__ = ["describe_exit", "main_process", "merge"]

_WORK = frozenset(kind.name for kind in PHASE_TABLE if kind.is_work)


def merge(recording: Recording) -> tuple[Process, ...]:
    """Make one process of each log, in the order in which they started; times count from the start of the program."""
    processes = [p for log in recording.logs if (p := _process(log, recording)) is not None]
    if not any(p.pid == recording.pid for p in processes):
        processes.append(_unseen(recording))
    return tuple(sorted(processes, key=lambda p: (p.start_ns, p.pid)))


def main_process(processes: Sequence[Process]) -> int:
    """Choose the process to report on: the one with the most start-up work, not the launcher that waits for it."""
    return max(range(len(processes)), key=lambda i: _work(processes[i]))


def _work(process: Process) -> tuple[float, bool, float]:
    work = sum(s.end_ns - s.start_ns for s in process.spans if s.name in _WORK)
    imports = sum(s.end_ns - s.start_ns for s in process.spans if s.name == "import")
    # Small differences of work say nothing; between equals, a rank is worth more than its launcher.
    return work // 100_000_000, process.rank is not None, work + imports


def describe_exit(returncode: int) -> str:
    """Say "exit 3", or "killed by SIGTERM"."""
    if returncode >= 0:
        return f"exit {returncode}"
    try:
        return f"killed by {signal.Signals(-returncode).name}"
    except ValueError:
        return f"killed by signal {-returncode}"


def _process(log: Sequence[dict[str, Any]], recording: Recording) -> Process | None:
    begin = next((line["begin"] for line in log if isinstance(line.get("begin"), dict)), None)
    if begin is None or not isinstance(begin.get("pid"), int):
        return None
    end = next((line["end"] for line in log if isinstance(line.get("end"), dict)), None)
    zero, pid = recording.start_ns, begin["pid"]
    direct = pid == recording.pid
    rows = [row for line in log for row in _rows(line.get("spans"))]
    last_ns = max([row[2] for row in rows] + [line["at"] for line in log if isinstance(line.get("at"), int)] + [zero])
    # a process id may have been used by another process before
    samples = [s for s in recording.samples.get(pid, ()) if s.at_ns >= begin.get("started", zero)]
    if end is None:
        # killed: nobody wrote when, so the last sign of life counts
        last_ns = recording.end_ns if direct else max([last_ns, *(s.at_ns for s in samples)])
        rows += _cut_short(log, last_ns)
    elif direct and end.get("why") == "exit":
        last_ns = recording.end_ns
    else:
        last_ns = end.get("at", last_ns)
    start_ns = zero if direct else int(begin.get("started", begin.get("at", zero)))
    return Process(
        title=_title(begin),
        pid=pid,
        start_ns=max(0, start_ns - zero),
        end_ns=max(0, last_ns - zero),
        rank=begin.get("rank") if isinstance(begin.get("rank"), int) else None,
        ended=_ended(direct, recording, end),
        spans=tuple(_marks(rows, zero, last_ns)),
        samples=tuple(Sample(s.at_ns - zero, s.read_bytes, s.resident_bytes) for s in samples if s.at_ns <= last_ns),
        facts=_facts(begin, end, log),
    )


def _rows(value: Any) -> Iterable[list[Any]]:
    """Yield rows of the right form."""
    kinds = (str, int, int, int, str, str)
    for row in value if isinstance(value, list) else ():
        if isinstance(row, list) and len(row) == 6 and all(isinstance(v, k) for v, k in zip(row, kinds, strict=True)):
            yield row


def _cut_short(log: Sequence[dict[str, Any]], last_ns: int) -> list[list[Any]]:
    """Return what was open when the process was killed, as far as it was written."""
    for line in reversed(log):
        if isinstance(line.get("spans"), list):
            innermost = line.get("open") or []
            if not innermost:
                return []
            name, start_ns, label = innermost[-1]
            return [[name, max(start_ns, line["at"]), last_ns, 0, line.get("track", ""), f"{label} (cut short)"]]
    return []


def _marks(rows: Iterable[list[Any]], zero: int, last_ns: int) -> Iterable[Mark]:
    for name, start_ns, end_ns, nbytes, track, label in rows:
        start_ns, end_ns = max(start_ns, zero), min(end_ns, last_ns)
        if end_ns >= start_ns:
            yield Mark(known_phase(name), start_ns - zero, end_ns - zero, max(0, nbytes), track, label)


def _title(begin: dict[str, Any]) -> str:
    words = [str(word) for word in begin.get("argv", [])]
    if words:
        words[0] = words[0].rpartition("/")[2]
    return " ".join(words)[:300] + (" (forked)" if begin.get("forked") else "")


def _ended(direct: bool, recording: Recording, end: dict[str, Any] | None) -> str:
    if direct:
        return describe_exit(recording.returncode)
    return "ended" if end is not None else "killed, or left without cleaning up"


def _facts(begin: dict[str, Any], end: dict[str, Any] | None, log: Sequence[dict[str, Any]]) -> dict[str, Any]:
    facts = {k: begin[k] for k in ("python", "env", "forked") if k in begin}
    files = [line["file"] for line in log if isinstance(line.get("file"), list) and len(line["file"]) == 2]
    ended = (end or {}).get("facts")
    kept = ended if isinstance(ended, dict) else {}
    return {**facts, **kept, "files": {str(path): entry for path, entry in files if isinstance(entry, dict)}}


def _unseen(recording: Recording) -> Process:
    """Make a process of the program itself, where nothing could be recorded inside it."""
    return Process(
        title=" ".join(recording.argv)[:300],
        pid=recording.pid,
        start_ns=0,
        end_ns=recording.end_ns - recording.start_ns,
        ended=describe_exit(recording.returncode),
        facts={"unseen": True},
    )
