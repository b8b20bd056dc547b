"""Comparison of two runs: benches case by case and loader by loader, loads and profiles by their wall time. Pure.

Documents come from files and are untrusted: what is used of them is checked, anything else is ignored.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from wan_loader.documents import Doc, read_json
from wan_loader.errors import OptionError, SessionError
from wan_loader.sizes import format_count

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from wan_loader.types import StrPath

__all__ = [
    "METRICS",
    "Comparison",
    "Limit",
    "MeasuredRun",
    "compare_runs",
    "newly_broken",
    "parse_limit",
    "read_run",
    "regressions",
]

#: What became of a loader that should have given a time: not of one that is not installed, or cannot do the case.
_BROKEN = ("failed", "wrong", "crashed", "hung")

#: Metric of the command line -> field of a summary. For all of them less is better.
METRICS = {
    "median": "median_s",
    "min": "min_s",
    "cpu": "cpu_s",
    "host": "host_peak_bytes",
    "pinned": "pinned_bytes",
    "device": "device_peak_bytes",
    "disk": "read_bytes",
}


@dataclass(frozen=True, slots=True)
class Limit:
    """A change of a metric, as a share, above which a comparison fails."""

    metric: str
    share: float


@dataclass(frozen=True, slots=True)
class MeasuredRun:
    """A run by its document: what was measured under which name, and on which machine."""

    path: str
    machine: Mapping[str, Any]
    values: Mapping[str, Mapping[str, float]]
    """A name of a measurement -> metric -> value."""
    spreads: Mapping[str, float]
    broken: Mapping[str, str] = field(default_factory=dict)
    """A name of a measurement that has no time, because the loader failed -> what became of it."""
    loaded: Mapping[str, str] = field(default_factory=dict)
    """The checkpoints. Of a load or a profile: "target", "device", "dtype"; of a bench: bytes and tensors of each case,
    whose name holds the rest.
    """


@dataclass(frozen=True, slots=True)
class Comparison:
    """One metric of one measurement in both runs."""

    name: str
    metric: str
    before: float
    after: float
    spread: float
    """The larger spread of the two, as a share of the median; for times."""

    @property
    def change(self) -> float:
        """The change as a share of before; positive is worse."""
        # 0 and 0, too, which have no ratio
        if self.before == self.after:
            return 0.0
        return (self.after - self.before) / self.before if self.before else float("inf")

    @property
    def within_noise(self) -> bool:
        """True if samples of one run differ by as much as the two runs do."""
        return self.metric in ("median", "min", "cpu") and abs(self.change) <= self.spread


def parse_limit(text: str) -> Limit:
    """Read `median:5%`; raise `OptionError` for anything else."""
    found = re.fullmatch(r"(\w+):(\d+(?:\.\d+)?)%", text.strip())
    if not found or found[1] not in METRICS:
        raise OptionError.because(f"--fail-if {text!r}", f"write METRIC:PERCENT%, METRIC one of {', '.join(METRICS)}")
    return Limit(found[1], float(found[2]) / 100)


def read_run(path: StrPath) -> MeasuredRun:
    """Read a document of `bench`, `load` or `profile`; raise `SessionError` for anything else."""
    name = os.fspath(path)
    whole = read_json(path, "no result of bench, load or profile")
    try:
        document = Doc(whole)
        if document.whole("schema_version") != 1:
            raise SessionError("it has another schema_version than 1: made by another version of wan-loader")
        command = document.choice("command", ("bench", "load", "profile"))
        machine = document.plain("machine")
        if command == "bench":
            values, spreads, broken = _bench_values(document)
            return MeasuredRun(name, machine, values, spreads, broken, _sizes(document))
        return MeasuredRun(name, machine, *_load_values(document), loaded=_loaded(document))
    except ValueError as error:
        raise SessionError.because(f"is no result of bench, load or profile: {error}", path=name) from error


def _bench_values(document: Doc) -> tuple[dict[str, dict[str, float]], dict[str, float], dict[str, str]]:
    values: dict[str, dict[str, float]] = {}
    spreads: dict[str, float] = {}
    broken: dict[str, str] = {}
    to = f"to {document.text('device').partition(':')[0]}" + (
        f" as {d}" if (d := document.optional_text("dtype")) else ""
    )
    for case in document.docs("cases"):
        where = f"{case.text('name')}, {case.doc('storage').text('label')}, {case.text('cache')}, {to}"
        for result in case.docs("results"):
            name, status = f"{where}: {result.text('loader')}", result.optional_text("status")
            if status in _BROKEN:
                broken[name] = status
            if (summary := result.optional_doc("summary")) is None:
                continue
            numbers = {m: summary.optional_number(f) for m, f in METRICS.items()}
            values[name] = {m: v for m, v in numbers.items() if v is not None}
            spreads[name] = summary.number("spread")
    return values, spreads, broken


def _sizes(document: Doc) -> dict[str, str]:
    """Return what was loaded in each case, where the document says: a checkpoint may have changed under its name."""
    sizes = {}
    for case in document.docs("cases"):
        nbytes, count = case.optional_whole("nbytes"), case.optional_whole("n_tensors")
        if nbytes is not None and count is not None:
            sizes[case.text("name")] = f"{nbytes} bytes in {format_count(count, 'tensor')}"
    return sizes


def _load_values(document: Doc) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    seconds, memory = document.number("seconds"), document.doc("memory")
    values = {
        "median": seconds,
        "min": seconds,
        "host": memory.number("host_peak_bytes"),
        "pinned": memory.number("pinned_bytes"),
        "device": memory.number("device_peak_bytes"),
    }
    return {document.text("command"): values}, {document.text("command"): 0.0}


def _loaded(document: Doc) -> dict[str, str]:
    dtype = document.optional_text("dtype") or "as stored"
    return {"target": document.text("target"), "device": document.text("device"), "dtype": dtype}


def compare_runs(before: MeasuredRun, after: MeasuredRun, metrics: Sequence[str]) -> list[Comparison]:
    """Compare every metric of every measurement that both have.

    Raises:
        SessionError: The runs have no measurement in common.
    """
    common = [name for name in before.values if name in after.values]
    if not common:
        raise SessionError.because(
            f"{before.path} and {after.path} measured nothing in common", "compare runs of the same command"
        )
    return [
        Comparison(
            name,
            metric,
            before.values[name][metric],
            after.values[name][metric],
            max(before.spreads[name], after.spreads[name]),
        )
        for name in common
        for metric in metrics
        if metric in before.values[name] and metric in after.values[name]
    ]


def newly_broken(before: MeasuredRun, after: MeasuredRun) -> dict[str, str]:
    """Return what had a time before and fails after -> what became of it: worse than any number."""
    return {n: status for n, status in after.broken.items() if n in before.values and n not in before.broken}


def regressions(found: Sequence[Comparison], limits: Sequence[Limit]) -> list[Comparison]:
    """Return what became worse than a limit allows."""
    allowed: dict[str, float] = {}
    for limit in limits:
        allowed[limit.metric] = min(limit.share, allowed.get(limit.metric, limit.share))
    return [c for c in found if c.metric in allowed and c.change > allowed[c.metric]]
