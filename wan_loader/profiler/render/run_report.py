"""The report of a whole run as text for a terminal: what happened when, and what the phases took."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from wan_loader.console import marked
from wan_loader.events import Span
from wan_loader.profiler.render.bars import timeline_bar
from wan_loader.sizes import format_bytes, format_count, format_seconds
from wan_loader.tables import Column, Columns

if TYPE_CHECKING:
    from rich.console import Console

    from wan_loader.profiler.analysis.run_report import RunReport

__all__ = ["print_run_report"]


def print_run_report(console: Console, report: RunReport) -> None:
    """Print the whole report."""
    kind = "" if report.dtype is None else f" as {report.dtype}"
    console.print(marked("[bold]{}[/]", report.target))
    console.print(
        f"{report.command}: {format_seconds(report.seconds)}, {format_bytes(report.nbytes_file)} of weights "
        f"to {report.device}{kind}"
    )
    if report.first_step_s is not None:
        console.print(f"time to first denoising step: {format_seconds(report.first_step_s)}")
    if report.steps_s:
        console.print(f"{format_count(len(report.steps_s), 'step')}, the last at {format_seconds(report.steps_s[-1])}")
    console.print()
    console.print(_stage_table(report))
    console.print()
    console.print(_phase_table(report))
    console.print("phases of all loads; they overlap, so they do not add up", style="dim")
    if report.why:
        console.print(marked("verdict on the longest load: {}", report.why))


def _stage_table(report: RunReport) -> Columns:
    table = Columns(
        "what",
        Column("name", least=14, most=60),
        *(Column(title, right=True) for title in ("from", "seconds", "bytes")),
        Column("timeline", least=16, most=60),
    )
    end_ns = max([int(report.seconds * 1e9), *(int((s.start_s + s.seconds) * 1e9) for s in report.stages), 1])
    for stage in report.stages:
        start_ns = int(stage.start_s * 1e9)
        span = Span(stage.kind, start_ns, start_ns + int(stage.seconds * 1e9))
        table.add_row(
            stage.kind,
            stage.name,
            f"{stage.start_s:.2f}",
            f"{stage.seconds:.2f}",
            format_bytes(stage.nbytes) if stage.nbytes else "",
            partial(timeline_bar, [span], 0, end_ns),
        )
    return table


def _phase_table(report: RunReport) -> Columns:
    table = Columns("phase", *(Column(title, right=True) for title in ("busy", "bytes", "GB/s")))
    for phase in report.phases:
        nbytes, rate = (format_bytes(phase.nbytes), f"{phase.gbps:.2f}") if phase.nbytes else ("", "")
        table.add_row(phase.name, format_seconds(phase.busy_s), nbytes, rate)
    return table
