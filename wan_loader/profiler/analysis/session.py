"""A recorded session: all that was measured, as one frozen value that is saved, read back, and rendered.

The saved document is the contract's JSON of `load` and `profile` with added keys. Read back it is untrusted: every
field is checked, and anything damaged or foreign is one `SessionError`. Nothing here measures or prints.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from wan_loader.documents import MOST, Doc, DocumentError, read_json
from wan_loader.errors import SessionError
from wan_loader.loading.report import SCHEMA_VERSION, Bottleneck, IoReport, LoadReport, MemoryReport
from wan_loader.phases import ALL_PHASES, known_phase
from wan_loader.profiler.analysis.commands import joined
from wan_loader.profiler.analysis.edits import Edit
from wan_loader.spans import Mark, PhaseSummary
from wan_loader.verdict import Verdict

if TYPE_CHECKING:
    from collections.abc import Sequence

    from wan_loader.types import StrPath

__all__ = ["Advice", "Process", "Sample", "Session", "Turn", "path_spans", "read_session"]

_MAX_SPANS = 5_000_000
_COMPARE = "`wan-loader compare` shows two of them side by side"
#: Commands whose results are taken for sessions, and what shows those.
_OTHERS = {
    "bench": f"{_COMPARE}, and `wan-loader bench` shows and draws them when it measures",
    "load": _COMPARE,
    "generate": "read it as JSON, or profile the run with `wan-loader profile -- wan-pipeline generate ...`",
}


@dataclass(frozen=True, slots=True)
class Sample:
    """The kernel's counters of a process at one moment."""

    at_ns: int
    read_bytes: int
    """Bytes fetched from storage so far, page faults included."""
    resident_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """One process: times count from the session's start."""

    title: str
    pid: int
    start_ns: int
    end_ns: int
    name: str = ""
    """A short title: the script's name, without Python and directories."""
    role: str = ""
    """The reason why it is there, as `roles` has it; "" for a program of the user's."""
    parent: int | None = None
    """The process id of what started it."""
    rank: int | None = None
    ended: str = ""
    """"exit 0", "killed by SIGTERM", "still running", or empty where it is not known."""
    spans: tuple[Mark, ...] = field(default=(), repr=False)
    samples: tuple[Sample, ...] = field(default=(), repr=False)
    busy: tuple[tuple[int, int], ...] = field(default=(), repr=False, compare=False)
    """Times in which it used a processor, seen from outside; not saved."""
    facts: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def seconds(self) -> float:
        """Seconds from its start to its end."""
        return (self.end_ns - self.start_ns) / 1e9

    @property
    def shown(self) -> str:
        """Its name for people, with its rank where it has one."""
        name = self.name or self.title
        return name if self.rank is None else f"rank {self.rank}: {name}"


@dataclass(frozen=True, slots=True)
class Turn:
    """A time in which one process set the pace of the program."""

    process: int
    """Its place in the list of processes."""
    start_ns: int
    end_ns: int

    @property
    def seconds(self) -> float:
        """How long it was."""
        return (self.end_ns - self.start_ns) / 1e9


@dataclass(frozen=True, slots=True)
class Advice:
    """One thing to change, what speaks for it, and what it would win in this session."""

    rule: str
    text: str
    evidence: str
    gain_s: float
    """What it wins alone."""
    beside_s: float | None = None
    """What it wins beside those that stand before it; None in documents of earlier versions."""
    once: tuple[str, ...] = ()
    """Lines to type, once."""
    command: str = ""
    """The line to type in the place of the one that was profiled; "" if that stays."""
    edits: tuple[Edit, ...] = ()
    """Lines of the program to replace."""
    code: str = ""
    """What to write where no line of the program is known, or instead of the command."""


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Session:
    """One profiled load or program."""

    kind: str
    """"load" or "program"."""
    report: LoadReport
    """The report of the load, or of the whole program, from its start to its end."""
    processes: tuple[Process, ...]
    subject: int = 0
    """The process that the report is about: of a program, the one that set the pace for most of the time."""
    turns: tuple[Turn, ...] = ()
    """Which process set the pace when, from the program's start to its end; empty for a load."""
    verdict: Verdict
    advice: tuple[Advice, ...] = ()
    """The largest gain first; each says what it wins beside those before."""
    ceilings: dict[str, Any] = field(default_factory=dict)
    """Names to GB/s or seconds; absent: not measured."""
    ceiling_details: dict[str, Any] = field(default_factory=dict)
    """Of each ceiling: where it is from, and the least and the most that was measured of it."""
    storage: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    """Sentences that say what could not be known, and why."""

    def __repr__(self) -> str:
        return f"Session({self.kind!r}, {self.report!r}, {len(self.processes)} processes, {self.verdict!r})"

    @property
    def spans(self) -> tuple[Mark, ...]:
        """The spans that the report is about: at each moment those of the process that set the pace."""
        return path_spans(self.processes, self.turns) if self.turns else self.processes[self.subject].spans

    @property
    def together_s(self) -> float:
        """What all advice wins together: less than the sum of what each wins, where they win the same seconds."""
        return sum(a.gain_s if a.beside_s is None else a.beside_s for a in self.advice)

    def together(self) -> dict[str, Any]:
        """Say what to type to follow all advice, edits of the program apart, and what that wins."""
        once = dict.fromkeys(line for a in self.advice for line in a.once)
        return {"gain_s": self.together_s, "once": list(once), "command": joined(a.command for a in self.advice)}

    @property
    def start_ns(self) -> int:
        """The beginning of what the report is about."""
        return self.turns[0].start_ns if self.turns else self.processes[self.subject].start_ns

    @property
    def end_ns(self) -> int:
        """The end of what the report is about."""
        return self.turns[-1].end_ns if self.turns else self.processes[self.subject].end_ns

    def paced_s(self, process: int) -> float:
        """Return how long a process set the pace."""
        return sum(turn.seconds for turn in self.turns if turn.process == process)

    def to_json(self) -> dict[str, Any]:
        """Return the document of `-o` and `--json`."""
        bottleneck = Bottleneck(
            self.verdict.phase,
            self.verdict.why,
            self.verdict.ceiling_gbps,
            _ratio(self.verdict.reached_gbps, self.verdict.ceiling_gbps),
            tuple(a.text for a in self.advice),
        )
        return {
            **replace(self.report, bottleneck=bottleneck).to_json(),
            "kind": self.kind,
            "verdict": _fields(self.verdict),
            "advice": [_advice_json(a) for a in self.advice],
            "together": self.together(),
            "ceilings": self.ceilings,
            "ceiling_details": self.ceiling_details,
            "storage": self.storage,
            "notes": list(self.notes),
            "subject": self.subject,
            "turns": [[t.process, t.start_ns, t.end_ns] for t in self.turns],
            "processes": [_process_json(p) for p in self.processes],
        }


def path_spans(processes: Sequence[Process], turns: Sequence[Turn]) -> tuple[Mark, ...]:
    """Return the spans of each process as far as they lie in its turns, with their share of the bytes."""
    out: list[Mark] = []
    several = len({turn.process for turn in turns}) > 1
    for number in dict.fromkeys(turn.process for turn in turns):
        process = processes[number]
        mine = [(t.start_ns, t.end_ns) for t in turns if t.process == number]
        for span in process.spans:
            # turns are in order: the first that ends behind the span's start
            for i in range(bisect_right(mine, span.start_ns, key=lambda turn: turn[1]), len(mine)):
                start_ns, end_ns = max(span.start_ns, mine[i][0]), min(span.end_ns, mine[i][1])
                if mine[i][0] > span.end_ns:
                    break
                length = span.end_ns - span.start_ns
                nbytes = span.nbytes * (end_ns - start_ns) // length if length else span.nbytes
                track = f"{process.pid} {span.track}" if several else span.track
                out.append(Mark(span.name, start_ns, end_ns, nbytes, track, span.label))
    return tuple(sorted(out, key=lambda s: (s.start_ns, s.end_ns)))


def _ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a is not None and b else None


def _fields(value: Any) -> dict[str, Any]:
    return {name: getattr(value, name) for name in value.__dataclass_fields__}


def _advice_json(advice: Advice) -> dict[str, Any]:
    return {**_fields(advice), "once": list(advice.once), "edits": [_fields(edit) for edit in advice.edits]}


def _process_json(process: Process) -> dict[str, Any]:
    tracks = sorted({s.track for s in process.spans})
    # names once, and numbers in the rows: a session has thousands of spans and a few dozen names
    labels = sorted({s.label for s in process.spans})
    track_at = {name: i for i, name in enumerate(tracks)}
    label_at = {name: i for i, name in enumerate(labels)}
    spans = [
        [ALL_PHASES.index(known_phase(s.name)), s.start_ns, s.end_ns, s.nbytes, track_at[s.track], label_at[s.label]]
        for s in process.spans
    ]
    samples = [[s.at_ns, s.read_bytes, s.resident_bytes] for s in process.samples]
    document = {k: v for k, v in _fields(process).items() if k not in ("spans", "samples", "busy")}
    return {**document, "names": ALL_PHASES, "tracks": tracks, "labels": labels, "spans": spans, "samples": samples}


def read_session(path: StrPath) -> Session:
    """Read a saved session.

    Raises:
        SessionError: The file is missing, damaged, or something else.
    """
    document = read_json(path, "not a saved session")
    _refuse_others(path, document)
    try:
        return _session(Doc(document))
    except DocumentError as error:
        raise SessionError.because(f"is not a session saved by `wan-loader profile -o`: {error}", path=path) from None


def _refuse_others(path: StrPath, document: dict[str, Any]) -> None:
    """Refuse the document of another command, and say what shows it.

    Raises:
        SessionError: It is one.
    """
    if "processes" in document or document.get("command") not in list(_OTHERS):
        return
    command = document["command"]
    saved = "not a session saved by `wan-loader profile -o`"
    raise SessionError.because(f"is a result of `{command}`, {saved}", _OTHERS[command], path=path)


def _session(doc: Doc) -> Session:
    if doc.whole("schema_version") != SCHEMA_VERSION:
        raise DocumentError(f"schema_version is {doc.whole('schema_version')}, this version reads {SCHEMA_VERSION}")
    processes = tuple(_process(p) for p in doc.docs("processes"))
    subject = doc.whole("subject")
    if not 0 <= subject < len(processes):
        raise DocumentError("subject names no process")
    v = doc.doc("verdict")
    return Session(
        kind=doc.choice("kind", ("load", "program")),
        report=_report(doc),
        processes=processes,
        subject=subject,
        turns=_turns(doc, len(processes)),
        verdict=Verdict(
            v.choice("kind", ("slow", "limit", "unknown")),
            known_phase(v.text("phase")),
            v.text("why"),
            v.number("lost_s", -MOST),  # less was needed than at the ceiling
            v.number("share"),
            v.optional_number("reached_gbps"),
            v.optional_number("ceiling_gbps"),
        ),
        advice=tuple(_advice(a) for a in doc.docs("advice")),
        ceilings=doc.numbers("ceilings"),
        ceiling_details=doc.plain("ceiling_details") if doc.has("ceiling_details") else {},
        storage=doc.plain("storage"),
        notes=doc.texts("notes"),
    )


def _advice(doc: Doc) -> Advice:
    """Take one piece of advice. Documents of earlier versions say only what, why, and what it wins."""
    edits = doc.docs("edits") if doc.optional_list("edits") is not None else ()
    return Advice(
        doc.text("rule"),
        doc.text("text"),
        doc.text("evidence"),
        doc.number("gain_s"),
        beside_s=doc.optional_number("beside_s"),
        once=doc.texts("once") if doc.optional_list("once") is not None else (),
        command=doc.optional_text("command") or "",
        edits=tuple(Edit(x.text("path"), x.whole("line"), x.text("text"), x.text("replacement")) for x in edits),
        code=doc.optional_text("code") or "",
    )


def _turns(doc: Doc, n_processes: int) -> tuple[Turn, ...]:
    """Take the turns: they follow on each other. Documents of earlier versions have none."""
    if doc.optional_list("turns") is None:
        return ()
    turns = tuple(Turn(*row) for row in doc.rows("turns", 3, _MAX_SPANS))
    at_ns = 0
    for turn in turns:
        if not (0 <= turn.process < n_processes and at_ns <= turn.start_ns <= turn.end_ns):
            raise DocumentError("turns do not follow on each other, or name no process")
        at_ns = turn.end_ns
    return turns


def _report(doc: Doc) -> LoadReport:
    io, memory, b = doc.doc("io"), doc.doc("memory"), doc.doc("bottleneck")
    resident = io.optional_whole("resident_before")
    counts = {k: io.whole(k) for k in ("nbytes_mapped", "nbytes_direct", "nbytes_buffered")}
    known = (*counts, "mode", "reason", "resident_before")
    added = {k: io.optional_whole(k) or 0 for k in IoReport.__dataclass_fields__ if k not in known}
    peaks = (memory.whole(k) for k in ("host_peak_bytes", "pinned_bytes", "device_peak_bytes", "registered_bytes"))
    return LoadReport(
        command=doc.text("command"),
        target=doc.text("target"),
        device=doc.text("device"),
        dtype=doc.optional_text("dtype"),
        seconds=doc.number("seconds"),
        nbytes_file=doc.whole("nbytes_file"),
        nbytes_device=doc.whole("nbytes_device"),
        n_tensors=doc.whole("n_tensors"),
        io=IoReport(io.text("mode"), io.text("reason"), resident, **counts, **added),
        phases=_phases(doc.docs("phases")),
        bottleneck=Bottleneck(
            known_phase(b.text("phase")),
            b.text("why"),
            b.optional_number("ceiling_gbps"),
            b.optional_number("reached"),
            b.texts("advice"),
        ),
        memory=MemoryReport(*peaks),
        machine=doc.plain("machine"),
        settings=doc.plain("settings"),
        warnings=doc.texts("warnings"),
    )


def _phases(docs: Sequence[Doc]) -> tuple[PhaseSummary, ...]:
    """Take each phase once: those that are not known here are one, whose seconds add up."""
    found: dict[str, PhaseSummary] = {}
    for doc in docs:
        name, busy_s, nbytes = known_phase(doc.text("name")), doc.number("busy_s"), doc.whole("nbytes")
        before = found.get(name, PhaseSummary(name, 0.0, 0))
        found[name] = PhaseSummary(name, before.busy_s + busy_s, before.nbytes + nbytes)
    return tuple(found.values())


def _process(doc: Doc) -> Process:
    names, tracks, labels = doc.texts("names"), doc.texts("tracks"), doc.texts("labels")
    names = tuple(known_phase(name) for name in names)
    start_ns, end_ns = doc.moment("start_ns"), doc.moment("end_ns")
    if end_ns < start_ns:
        raise DocumentError("a process ends before it begins")
    return Process(
        title=doc.text("title"),
        pid=doc.whole("pid"),
        start_ns=start_ns,
        end_ns=end_ns,
        name=doc.optional_text("name") or "",
        role=doc.optional_text("role") or "",
        parent=doc.optional_whole("parent"),
        rank=doc.optional_whole("rank"),
        ended=doc.text("ended"),
        spans=tuple(_mark(row, names, tracks, labels) for row in doc.rows("spans", 6, _MAX_SPANS)),
        samples=tuple(Sample(*row) for row in doc.rows("samples", 3, _MAX_SPANS)),
        facts=doc.plain("facts"),
    )


def _mark(row: Sequence[int], names: Sequence[str], tracks: Sequence[str], labels: Sequence[str]) -> Mark:
    name, start_ns, end_ns, nbytes, track, label = row
    if not (0 <= name < len(names) and 0 <= track < len(tracks) and 0 <= label < len(labels)):
        raise DocumentError("a span points outside names, tracks or labels")
    if end_ns < start_ns or nbytes < 0:
        raise DocumentError("a span ends before it begins")
    return Mark(names[name], start_ns, end_ns, nbytes, tracks[track], labels[label])
