"""The making of a session of what was recorded: verdict and advice are drawn here, once, and saved with it. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from wan_loader.loading.report import Bottleneck, IoReport, LoadReport, MemoryReport
from wan_loader.profiler.analysis.advice import advise
from wan_loader.profiler.analysis.merge import describe_exit, main_process
from wan_loader.profiler.analysis.session import Process, Session
from wan_loader.sizes import format_count, format_share
from wan_loader.spans import Mark, by_label, summarize
from wan_loader.system.machine import machine_card
from wan_loader.verdict import Evidence, judge

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from wan_loader.events import Span
    from wan_loader.profiler.program import Recording

__all__ = ["Environment", "load_session", "program_session", "weight_files"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """The facts about the machine around a recording."""

    ceilings: Mapping[str, float] = field(default_factory=dict)
    storage: Mapping[str, Any] = field(default_factory=dict)
    limits: Mapping[str, Any] = field(default_factory=dict)
    """The limits before the recording; `memory_stalled_s` is what was added during it."""
    notes: tuple[str, ...] = ()


def _fresh_bytes(settings: Mapping[str, Any]) -> int:
    """Count what was read into new memory: to its place, or into slots, each for the first time."""
    slots = int(settings.get("n_slots", 0)) * int(settings.get("slot_bytes", 0))
    return slots + int(settings.get("nbytes_straight", 0))


def load_session(report: LoadReport, spans: Sequence[Span], around: Environment, *, fp32_bytes: int = 0) -> Session:
    """Make the session of a load of our own.

    Args:
        report: Its report.
        spans: The spans that its observer recorded.
        around: The machine.
        fp32_bytes: Bytes of fp32 tensors in the files.
    """
    zero = min((s.start_ns for s in spans), default=0)
    marks = tuple(
        Mark(s.name, s.start_ns - zero, s.end_ns - zero, s.nbytes, s.track)
        for s in sorted(spans, key=lambda s: (s.start_ns, s.end_ns))
    )
    process = Process(title=report.target, pid=0, start_ns=0, end_ns=int(report.seconds * 1e9), spans=marks)
    evidence = Evidence(
        kind="load",
        seconds=report.seconds,
        spans=marks,
        start_ns=0,
        end_ns=process.end_ns,
        device=report.device,
        ceilings=around.ceilings,
        # unknown counts as cold, as it does for a load
        cold_bytes=max(0, report.nbytes_file - (report.io.resident_before or 0)),
        nbytes_file=report.nbytes_file,
        fresh_bytes=_fresh_bytes(report.settings),
        dtype=report.dtype,
        fp32_bytes=fp32_bytes,
        storage=around.storage,
        limits=around.limits,
    )
    if viewed := getattr(report.io, "nbytes_viewed", 0):
        note = f"{viewed / 1e9:.2f} GB are views of the file: they are read when they are first used"
        around = replace(around, notes=(*around.notes, note))
    report = replace(report, command="profile", phases=summarize(marks))
    return _session("load", report, (process,), 0, evidence, around)


def weight_files(processes: Sequence[Process]) -> list[str]:
    """List the paths of the weight files that a program opened."""
    return sorted({path for p in processes for path in p.facts.get("files", {}) if path.startswith("/")})


def program_session(recording: Recording, processes: Sequence[Process], around: Environment) -> Session:
    """Make the session of a program, from the processes that `merge` made of its recording."""
    subject = main_process(processes)
    process = processes[subject]
    files = [f for f in process.facts.get("files", {}).values() if isinstance(f, dict)]
    nbytes = sum(int(f.get("nbytes") or 0) for f in files)
    counts = [f.get("resident_before") for f in files]
    # one file that the kernel tells nothing of makes the sum unknown
    resident = None if None in counts else sum(map(int, filter(None, counts)))
    device = "cuda" if any("host to cuda" in s.label for s in process.spans if s.name in ("h2d", "cast")) else "cpu"
    report = _program_report(recording, process, device, nbytes, resident)
    evidence = Evidence(
        kind="program",
        seconds=process.seconds,
        spans=process.spans,
        start_ns=process.start_ns,
        end_ns=process.end_ns,
        device=device,
        ceilings=around.ceilings,
        cold_bytes=max(0, nbytes - (resident or 0)),
        nbytes_file=nbytes,
        storage=around.storage,
        facts=process.facts,
        limits=around.limits,
    )
    around = replace(around, notes=(*around.notes, *_program_notes(recording, processes, process)))
    return _session("program", report, tuple(processes), subject, evidence, around)


def _session(
    kind: str,
    report: LoadReport,
    processes: tuple[Process, ...],
    subject: int,
    evidence: Evidence,
    around: Environment,
) -> Session:
    verdict = judge(evidence)
    return Session(
        kind=kind,
        report=replace(report, bottleneck=Bottleneck(verdict.phase, verdict.why)),
        processes=processes,
        subject=subject,
        verdict=verdict,
        advice=advise(evidence),
        ceilings=dict(around.ceilings),
        storage={**around.storage, **around.limits},
        notes=around.notes,
    )


def _program_report(
    recording: Recording, process: Process, device: str, nbytes: int, resident: int | None
) -> LoadReport:
    peak = max([int(process.facts.get("peak_resident_bytes") or 0), *(s.resident_bytes for s in process.samples)])
    card: dict[str, object] = {k: process.facts[k] for k in ("torch", "gpu", "python") if k in process.facts}
    files = process.facts.get("files", {})
    reason = (
        f"{format_count(len(files), 'weight file')}, "
        f"{'unknown how much' if resident is None else format_share(resident, nbytes)} in the page cache when opened"
        if nbytes
        else ""
    )
    return LoadReport(
        command="profile",
        target=" ".join(recording.argv),
        device=device,
        dtype=None,
        seconds=process.seconds,
        nbytes_file=nbytes,
        nbytes_device=sum(s.nbytes for s in process.spans if s.name == "h2d" and "host to" in s.label),
        n_tensors=0,
        io=IoReport("as the program does", reason or "no weight file was seen", resident),
        phases=summarize(process.spans),
        bottleneck=Bottleneck("other", ""),
        memory=MemoryReport(peak, 0, int(process.facts.get("device_peak_bytes") or 0)),
        machine={**machine_card(), **card},
        settings={"env": process.facts.get("env", {})},
        warnings=(),
    )


def _program_notes(recording: Recording, processes: Sequence[Process], process: Process) -> list[str]:
    notes = []
    if recording.returncode:
        notes.append(f"the program did not end well: {describe_exit(recording.returncode)}")
    if recording.stopped:
        notes.append(f"the program was stopped: {recording.stopped}")
    if process.facts.get("unseen"):
        notes.append(
            "nothing was recorded inside the program: it runs no Python, or ignores PYTHONPATH (python -I, -E)"
        )
    elif not process.facts.get("files"):
        notes.append("no weight file was opened through safetensors or torch.load")
    if any("page faults" in label for label, _, _ in by_label(process.spans, "read")):
        notes.append(
            "files that are mapped are read later, inside copies and conversions: that time is given to reading by the "
            "kernel's counters, and drawn before the operation it was part of"
        )
    seen = sum(s.nbytes for s in process.spans if s.name == "read")
    fetched = process.samples[-1].read_bytes if process.samples else 0
    if fetched > 1.5 * seen + 500_000_000:
        notes.append(f"{(fetched - seen) / 1e9:.1f} GB came from storage outside of what was recorded as reading")
    if not process.samples and not process.facts.get("unseen"):
        notes.append("the kernel's counters of the process could not be read (no /proc, or it was too short)")
    return notes
