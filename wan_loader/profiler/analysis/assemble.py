"""The making of a session of what was recorded: verdict and advice are drawn here, once, and saved with it. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from wan_loader.loading.report import Bottleneck, IoReport, LoadReport, MemoryReport
from wan_loader.profiler.analysis.advice import advise
from wan_loader.profiler.analysis.commands import Program
from wan_loader.profiler.analysis.notes import program_notes
from wan_loader.profiler.analysis.raised_ceilings import describe_ceilings, raise_ceilings
from wan_loader.profiler.analysis.session import Process, Session, path_spans
from wan_loader.profiler.analysis.story import launchers_of, pace_sentence, subject_of, turns_of
from wan_loader.profiler.analysis.weight_files import device_of, files_of
from wan_loader.sizes import format_count, format_share
from wan_loader.spans import Mark, summarize
from wan_loader.system.machine import machine_card
from wan_loader.verdict import Evidence, judge

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from wan_loader.events import Span
    from wan_loader.profiler.analysis.session import Turn
    from wan_loader.profiler.program import Recording

__all__ = ["Environment", "load_session", "program_session"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """The facts about the machine around a recording."""

    ceilings: Mapping[str, float] = field(default_factory=dict)
    samples: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """All that was measured of each ceiling."""
    measured: tuple[str, ...] = ()
    """The ceilings that were measured for this recording, not before."""
    storage: Mapping[str, Any] = field(default_factory=dict)
    limits: Mapping[str, Any] = field(default_factory=dict)
    """The limits before the recording; `memory_stalled_s` is what was added during it."""
    notes: tuple[str, ...] = ()
    sources: Mapping[str, str] = field(default_factory=dict)
    """The text of files of the program."""


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
    session = _session("load", report, (process,), 0, evidence, around)
    advice = advise(replace(evidence, ceilings=session.ceilings), target=report.target)
    return replace(session, advice=advice)


def program_session(recording: Recording, processes: Sequence[Process], around: Environment) -> Session:
    """Make the session of a program, from the processes that `merge` made of its recording.

    The verdict is about the whole program, from its start to its end. Advice is about what the user can change: not
    about what launchers do.
    """
    end_ns = max(p.end_ns for p in processes)
    turns = turns_of(processes, end_ns)
    subject = subject_of(processes, turns)
    files = files_of(processes)
    nbytes = sum(f.nbytes for f in files.values())
    counts = [f.resident_before for f in files.values()]
    # one file that the kernel tells nothing of makes the sum unknown
    resident = None if None in counts else sum(filter(None, counts))
    device = device_of(processes)
    evidence = Evidence(
        kind="program",
        seconds=end_ns / 1e9,
        spans=path_spans(processes, turns),
        start_ns=0,
        end_ns=end_ns,
        device=device,
        ceilings=around.ceilings,
        cold_bytes=max(0, nbytes - (resident or 0)),
        nbytes_file=nbytes,
        storage=around.storage,
        facts=processes[subject].facts,
        limits=around.limits,
    )
    report = _program_report(recording, processes, subject, evidence, resident)
    around = replace(around, notes=(*around.notes, *program_notes(recording, processes, subject)))
    session = _session("program", report, tuple(processes), subject, evidence, around)
    launchers = launchers_of(processes)
    own = path_spans(processes, [turn for turn in turns if turn.process not in launchers])
    why = "; ".join(filter(None, (session.verdict.why, pace_sentence(processes, turns, subject))))
    verdict = replace(session.verdict, why=why)
    advice = advise(
        replace(evidence, spans=own, ceilings=session.ceilings),
        _program(recording, processes),
        files=files,
        sources=around.sources,
        served=_served(recording, processes, turns),
    )
    report = replace(session.report, bottleneck=Bottleneck(verdict.phase, why))
    return replace(session, report=report, turns=turns, verdict=verdict, advice=advice)


def _program(recording: Recording, processes: Sequence[Process]) -> Program:
    """Describe how a program was started, and where it loads."""
    loading = {p.pid for p in processes if p.facts.get("files") and not p.facts.get("forked")}
    return Program(
        argv=tuple(recording.argv),
        directory=recording.directory,
        own_python=recording.own_python,
        inside=recording.inside,
        loads_in_children=bool(loading - {recording.pid}),
    )


def _served(recording: Recording, processes: Sequence[Process], turns: Sequence[Turn]) -> float:
    """Return the share of imports that are the first process's or a rank's: a stand-by server does those before."""
    rows = [(p, path_spans(processes, [t for t in turns if t.process == i])) for i, p in enumerate(processes)]
    seconds = [(p, sum(s.end_ns - s.start_ns for s in spans if s.name == "import")) for p, spans in rows]
    served = sum(s for p, s in seconds if p.pid == recording.pid or p.rank is not None)
    return served / max(1, sum(s for _, s in seconds))


def _pressure(e: Evidence) -> tuple[str, ...]:
    """Say how long this machine's processes waited for memory, if that was noticeable."""
    stalled = float(e.limits.get("memory_stalled_s") or 0.0)
    return (f"processes of this machine stalled on memory for {stalled:.2f} s meanwhile",) if stalled > 0.1 else ()


def _session(
    kind: str,
    report: LoadReport,
    processes: tuple[Process, ...],
    subject: int,
    evidence: Evidence,
    around: Environment,
) -> Session:
    ceilings, raised = raise_ceilings(evidence)
    details = describe_ceilings(evidence.ceilings, ceilings, around.samples, around.measured)
    raised += _pressure(evidence)
    evidence = replace(evidence, ceilings=ceilings)
    around = replace(around, ceilings=ceilings, notes=(*around.notes, *raised))
    verdict = judge(evidence)
    return Session(
        kind=kind,
        report=replace(report, bottleneck=Bottleneck(verdict.phase, verdict.why)),
        processes=processes,
        subject=subject,
        verdict=verdict,
        ceilings=dict(around.ceilings),
        ceiling_details=details,
        storage={**around.storage, **around.limits},
        notes=around.notes,
    )


def _program_report(
    recording: Recording, processes: Sequence[Process], subject: int, e: Evidence, resident: int | None
) -> LoadReport:
    process, n_files = processes[subject], len(files_of(processes))
    facts = [p.facts for p in processes]
    peak = max(
        [s.resident_bytes for p in processes for s in p.samples] + [_whole(f.get("peak_resident_bytes")) for f in facts]
    )
    card: dict[str, object] = {k: process.facts[k] for k in ("torch", "gpu", "python") if k in process.facts}
    reason = (
        f"{format_count(n_files, 'weight file')}, "
        f"{'unknown how much' if resident is None else format_share(resident, e.nbytes_file)} "
        "in the page cache when opened"
        if e.nbytes_file
        else ""
    )
    return LoadReport(
        command="profile",
        target=" ".join(recording.argv),
        device=e.device,
        dtype=None,
        seconds=e.seconds,
        nbytes_file=e.nbytes_file,
        nbytes_device=sum(s.nbytes for p in processes for s in p.spans if s.name == "h2d" and "host to" in s.label),
        n_tensors=0,
        io=IoReport("as the program does", reason or "no weight file was seen", resident),
        phases=summarize(e.spans),
        bottleneck=Bottleneck("other", ""),
        memory=MemoryReport(peak, 0, max(_whole(f.get("device_peak_bytes")) for f in facts)),
        machine={**machine_card(), **card},
        settings={"env": process.facts.get("env", {})},
        warnings=(),
    )


def _whole(value: object) -> int:
    return value if isinstance(value, int) and value > 0 else 0
