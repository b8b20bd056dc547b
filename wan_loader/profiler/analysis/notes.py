"""What could not be known of a program, and why, in sentences. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from wan_loader.profiler.analysis.merge import describe_exit
from wan_loader.profiler.analysis.outside import COUNTED
from wan_loader.sizes import format_bytes, format_count

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from wan_loader.profiler.analysis.session import Process
    from wan_loader.profiler.program import Recording

__all__ = ["program_notes"]


def program_notes(recording: Recording, processes: Sequence[Process], subject: int) -> list[str]:
    """List the notes of a program."""
    notes = []
    if recording.returncode:
        notes.append(f"the program did not end well: {describe_exit(recording.returncode)}")
    if recording.stopped:
        notes.append(f"the program was stopped: {recording.stopped}")
    notes += _of_endings(processes)
    notes += _of_files(processes)
    notes += _of_reading(processes, subject)
    if any(p.facts.get("left_out") for p in processes):
        notes.append("a process recorded more than is kept: its later work is not shown")
    return notes


def _of_endings(processes: Sequence[Process]) -> Iterator[str]:
    # SIGTERM is how pools end their workers
    killed = [p for p in processes if p.ended.startswith("killed by") and p.ended != "killed by SIGTERM"]
    for process in killed[:3]:
        if process.parent is not None:
            yield f"{process.shown} [{process.pid}] was {process.ended}; what it did until then is shown"


def _of_files(processes: Sequence[Process]) -> Iterator[str]:
    if all(p.facts.get("unseen") for p in processes):
        yield "nothing was recorded inside the program: it runs no Python, or ignores PYTHONPATH (python -I, -E)"
    elif not any(p.facts.get("files") for p in processes):
        yield "no weight file was opened by any of its processes"
    for process in processes:
        nbytes = process.facts.get("counted_bytes")
        if process.facts.get("unseen") and nbytes:
            yield (
                f"{process.shown} [{process.pid}] runs no Python of ours: what it read, {format_bytes(nbytes)}, was "
                "counted from outside"
            )


def _of_reading(processes: Sequence[Process], subject: int) -> Iterator[str]:
    process = processes[subject]
    labels = {s.label for s in process.spans if s.name == "read"}
    if any("page faults" in label for label in labels):
        yield (
            "files that are mapped are read later, inside copies and conversions: that time is given to reading by the "
            "kernel's counters, and drawn before the operation it was part of"
        )
    if COUNTED in labels and not process.facts.get("unseen"):
        nbytes = sum(s.nbytes for s in process.spans if s.label == COUNTED)
        yield f"{format_bytes(nbytes)} were read by what has no hook: known from the kernel's counters, 0.1 s exact"
    seen = sum(s.nbytes for s in process.spans if s.name == "read")
    fetched = process.samples[-1].read_bytes if process.samples else 0
    if len(processes) == 1 and fetched > 1.5 * seen + 500_000_000:
        yield f"{format_bytes(fetched - seen)} came from storage outside of what was recorded as reading"
    unwatched = [p for p in processes if not p.samples and not p.facts.get("unseen")]
    if unwatched and process in unwatched:
        yield f"the kernel's counters of {format_count(len(unwatched), 'process', 'processes')} could not be read"
