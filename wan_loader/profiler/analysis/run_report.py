"""The report of a whole run that `--profile-out` has written: its stages and loads, read back. It is untrusted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from wan_loader.documents import Doc, DocumentError, read_json
from wan_loader.errors import SessionError
from wan_loader.loading.report import SCHEMA_VERSION
from wan_loader.phases import known_phase
from wan_loader.spans import PhaseSummary

if TYPE_CHECKING:
    from wan_loader.types import StrPath

__all__ = ["RunReport", "RunStage", "read_run_report"]


@dataclass(frozen=True, slots=True)
class RunStage:
    """A stage, a wait or a load of a run; times count from its start."""

    kind: str
    """"stage", "wait" or "load"."""
    name: str
    start_s: float
    seconds: float
    nbytes: int = 0
    """Bytes of a load."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunReport:
    """What one run did, from the start of its process on."""

    target: str
    command: str
    device: str
    dtype: str | None
    seconds: float
    nbytes_file: int
    first_step_s: float | None
    """When the first step could begin; None where there was none."""
    stages: tuple[RunStage, ...]
    """In the order of their starts."""
    phases: tuple[PhaseSummary, ...]
    steps_s: tuple[float, ...]
    """When each step had been done."""
    why: str
    """The verdict on the longest load."""
    warnings: tuple[str, ...]


def read_run_report(path: StrPath) -> tuple[RunReport, dict[str, Any]] | None:
    """Read the report of a run, and return it with its document; None for a document of another kind.

    Raises:
        SessionError: The file is missing, or damaged.
    """
    document = read_json(path, "not a saved session")
    if not isinstance(document.get("pipeline"), dict):
        return None
    try:
        return _report(Doc(document)), document
    except DocumentError as error:
        raise SessionError.because(f"is not a report that --profile-out wrote: {error}", path=path) from None


def _report(doc: Doc) -> RunReport:
    if doc.whole("schema_version") != SCHEMA_VERSION:
        raise DocumentError(f"schema_version is {doc.whole('schema_version')}, this version reads {SCHEMA_VERSION}")
    pipeline = doc.doc("pipeline")
    stages = [
        RunStage(kind, row.text("name"), row.number("start_s"), row.number("seconds"), _nbytes(kind, row))
        for kind, key in (("stage", "stages"), ("wait", "waits"), ("load", "loads"))
        for row in pipeline.docs(key)
    ]
    bottleneck = doc.optional_doc("bottleneck")
    return RunReport(
        target=doc.text("target"),
        command=doc.text("command"),
        device=doc.text("device"),
        dtype=doc.optional_text("dtype"),
        seconds=doc.number("seconds"),
        nbytes_file=doc.whole("nbytes_file"),
        first_step_s=pipeline.optional_number("time_to_first_step_s"),
        stages=tuple(sorted(stages, key=lambda s: (s.start_s, -s.seconds))),
        phases=tuple(
            PhaseSummary(known_phase(p.text("name")), p.number("busy_s"), p.whole("nbytes")) for p in doc.docs("phases")
        ),
        steps_s=tuple(pipeline.numbers_of("steps_s")),
        why="" if bottleneck is None else bottleneck.text("why"),
        warnings=doc.texts("warnings"),
    )


def _nbytes(kind: str, row: Doc) -> int:
    return row.whole("nbytes") if kind == "load" else 0
