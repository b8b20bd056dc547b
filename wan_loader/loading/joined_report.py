"""One report of several loads that were done one after the other: a whole model's parts. Pure."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import TYPE_CHECKING

from wan_loader.loading.report import IoReport, LoadReport, MemoryReport
from wan_loader.phases import ALL_PHASES
from wan_loader.spans import PhaseSummary

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["joined"]


def joined(reports: Sequence[LoadReport], target: str) -> LoadReport:
    """Join the reports of loads that followed on each other; the bottleneck is that of the longest.

    Args:
        reports: The reports, one or more.
        target: What was loaded.
    """
    if len(reports) == 1:
        return reports[0]
    longest = max(reports, key=lambda r: r.seconds)
    return replace(
        longest,
        target=target,
        seconds=sum(r.seconds for r in reports),
        nbytes_file=sum(r.nbytes_file for r in reports),
        nbytes_device=sum(r.nbytes_device for r in reports),
        n_tensors=sum(r.n_tensors for r in reports),
        io=_io([r.io for r in reports]),
        phases=_phases(reports),
        memory=MemoryReport(*(max(getattr(r.memory, f.name) for r in reports) for f in fields(MemoryReport))),
        warnings=tuple(dict.fromkeys(w for r in reports for w in r.warnings)),
    )


def _io(parts: Sequence[IoReport]) -> IoReport:
    modes = {mode for io in parts for mode in io.mode.split("+")}
    resident = [io.resident_before for io in parts]
    counts = [f.name for f in fields(IoReport) if f.name.startswith("nbytes")]
    return IoReport(
        "+".join(sorted(modes - {"none"})) or "none",
        "; ".join(dict.fromkeys(io.reason for io in parts)),
        # one that is not known makes the sum unknown
        None if None in resident else sum(filter(None, resident)),
        **{name: sum(getattr(io, name) for io in parts) for name in counts},
    )


def _phases(reports: Sequence[LoadReport]) -> tuple[PhaseSummary, ...]:
    """Add the phases up: loads that follow on each other do not overlap."""
    rows = [phase for report in reports for phase in report.phases]
    return tuple(
        PhaseSummary(name, sum(p.busy_s for p in found), sum(p.nbytes for p in found))
        for name in ALL_PHASES
        if (found := [p for p in rows if p.name == name])
    )
