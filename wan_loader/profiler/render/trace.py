"""A session as a Chrome trace: opens in Perfetto and chrome://tracing. Pure.

One process each, one track a thread or a device stream, whose spans never overlap, and counters: bytes read but not yet
copied, slots of the pinned ring taken, bytes per second from storage, resident memory.
Format: "Trace Event Format" (complete events "X", counters "C", metadata "M"; times in microseconds).
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

from wan_loader.spans import in_flight

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from wan_loader.profiler.analysis.session import Process, Session
    from wan_loader.spans import Mark

__all__ = ["to_trace", "without_overlap"]


def to_trace(session: Session) -> dict[str, Any]:
    """Return the document of `--trace`."""
    events: list[dict[str, Any]] = []
    slot_bytes = session.report.settings.get("slot_bytes")
    for number, process in enumerate(session.processes, 1):
        events += _process_events(number, process)
        events += _counters(number, process, slot_bytes if isinstance(slot_bytes, int) else None)
    other = {"target": session.report.target, "verdict": session.verdict.why}
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": other}


def _process_events(pid: int, process: Process) -> Iterator[dict[str, Any]]:
    title = process.title if process.rank is None else f"rank {process.rank}: {process.title}"
    yield {"ph": "M", "name": "process_name", "pid": pid, "tid": 0, "args": {"name": title}}
    # viewers order tracks by sort_index: the main thread first
    tracks = sorted({s.track for s in process.spans}, key=lambda t: (t != "MainThread", t))
    for tid, track in enumerate(tracks, 1):
        yield {"ph": "M", "name": "thread_name", "pid": pid, "tid": tid, "args": {"name": track or "main"}}
        yield {"ph": "M", "name": "thread_sort_index", "pid": pid, "tid": tid, "args": {"sort_index": tid}}
        for span in without_overlap([s for s in process.spans if s.track == track]):
            args: dict[str, Any] = {"bytes": span.nbytes} if span.nbytes else {}
            if span.nbytes and span.end_ns > span.start_ns:
                args["GB/s"] = round(span.nbytes / (span.end_ns - span.start_ns), 3)
            yield {
                "ph": "X",
                "name": span.label or span.name,
                "cat": span.name,
                "pid": pid,
                "tid": tid,
                "ts": span.start_ns / 1000,
                "dur": (span.end_ns - span.start_ns) / 1000,
                "args": args,
            }


def without_overlap(spans: Sequence[Mark]) -> list[Mark]:
    """Order the spans of one track, each cut where the next one begins: device times are rounded."""
    from dataclasses import replace

    ordered = sorted(spans, key=lambda s: (s.start_ns, s.end_ns))
    cut = [replace(a, end_ns=min(a.end_ns, b.start_ns)) for a, b in pairwise(ordered)]
    return cut + ordered[-1:]


def _counters(pid: int, process: Process, slot_bytes: int | None) -> Iterator[dict[str, Any]]:
    for at_ns, level in in_flight(process.spans):
        yield _counter(pid, "bytes in flight", at_ns, {"bytes": level})
        if slot_bytes:
            yield _counter(pid, "ring slots taken", at_ns, {"slots": -(-level // slot_bytes)})
    for a, b in pairwise(process.samples):
        if b.at_ns > a.at_ns:
            rate = max(0, b.read_bytes - a.read_bytes) / (b.at_ns - a.at_ns)
            yield _counter(pid, "from storage", a.at_ns, {"GB/s": round(rate, 4)})
        yield _counter(pid, "resident memory", b.at_ns, {"bytes": b.resident_bytes})


def _counter(pid: int, name: str, at_ns: int, args: dict[str, Any]) -> dict[str, Any]:
    return {"ph": "C", "name": name, "pid": pid, "tid": 0, "ts": at_ns / 1000, "args": args}
