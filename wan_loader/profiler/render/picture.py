"""A session, or a pipeline's run, as one picture that a person can paste. Pure.

Verdict, legend, and what each process did, on one clock; of a run, its stages, waits and loads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from wan_loader.phases import ALL_PHASES
from wan_loader.profiler.render.charts import timeline
from wan_loader.profiler.render.lanes import lanes_of
from wan_loader.profiler.render.shapes import Drawing, Rect, Shape, Words, fitting, text_width, time_axis, wrapped
from wan_loader.profiler.render.terminal import headline, machine_line
from wan_loader.sizes import format_bytes, format_count, format_seconds
from wan_loader.spans import union

if TYPE_CHECKING:
    from collections.abc import Sequence

    from wan_loader.profiler.analysis.run_report import RunReport
    from wan_loader.profiler.analysis.session import Session
    from wan_loader.profiler.render.charts import Lane

__all__ = ["draw", "draw_run"]

_WIDTH = 1200
_MARGIN = 24
_ROOM = _WIDTH - 2 * _MARGIN
#: Of a run: room for names, the rows that are drawn, and the colours of its kinds.
_NAMES, _MOST_ROWS = 190, 80
_KINDS = {"stage": "cast", "load": "read", "wait": "wait"}


def draw(session: Session) -> Drawing:
    """Draw a session, 1200 units wide and as high as it needs."""
    lanes = lanes_of(session)
    shapes, y = _title(session)
    legend, y = _legend(lanes, y + 14)
    drawn, bottom = timeline(lanes, session.start_ns, session.end_ns, left=_MARGIN, right=_WIDTH - _MARGIN, top=y + 10)
    shapes += [*legend, *drawn]
    left_out = len(session.processes) - len(lanes)
    if left_out and session.turns:
        told = f"{format_count(left_out, 'process', 'processes')} that did next to nothing: not shown"
        shapes.append(Words(_MARGIN, bottom + 14, told, "soft", 11))
        bottom += 20
    return Drawing(_WIDTH, round(bottom + 12), shapes, f"where the time of {session.report.target} went")


def draw_run(report: RunReport) -> Drawing:
    """Draw the report of a run: a row for each thing that happened, in the order of their starts."""
    first = report.first_step_s
    why = report.command + ("" if first is None else f", the first denoising step after {format_seconds(first)}")
    told = f"{format_bytes(report.nbytes_file)} of weights to {report.device}"
    told += f" as {report.dtype}" if report.dtype else ""
    texts = [told, *([f"verdict on the longest load: {report.why}"] if report.why else [])]
    shapes, y = _headings(report.seconds, why, "soft", report.target, texts)
    present = [kind for kind in _KINDS if any(stage.kind == kind for stage in report.stages)]
    legend, y = _entries([(_KINDS[kind], kind) for kind in present], y + 14)
    rows, bottom = _rows(report, y + 8)
    title = f"where the time of {report.target} went"
    return Drawing(_WIDTH, round(bottom + 12), [*shapes, *legend, *rows], title)


def _rows(report: RunReport, top: float) -> tuple[list[Shape], float]:
    left, right = _MARGIN + _NAMES, _WIDTH - _MARGIN - 14
    end_s = max([report.seconds, *(stage.start_s + stage.seconds for stage in report.stages)])
    scale = (right - left) / max(end_s, 1e-9)
    rows: list[Shape] = []
    y = top
    for stage in report.stages[:_MOST_ROWS]:
        name = f"{stage.kind} {stage.name}"
        size = f", {format_bytes(stage.nbytes)}" if stage.nbytes else ""
        hover = f"{name}{size}: {format_seconds(stage.seconds)} from {stage.start_s:.2f} s"
        rows.append(Words(left - 8, y + 13, fitting(name, _NAMES - 12, 12), "soft", 12, "end"))
        x, width = left + stage.start_s * scale, max(1.0, stage.seconds * scale)
        rows.append(Rect(x, y + 2, width, 14, _KINDS[stage.kind], hover))
        y += 18
    y = max(y, top + 18)
    axis = time_axis(end_s, left, right, [(top, y)])
    y += 20
    if (more := len(report.stages) - _MOST_ROWS) > 0:
        rows.append(Words(_MARGIN, y + 14, f"{more} more: not drawn", "soft", 11))
        y += 20
    return [*axis, *rows], y


def _title(session: Session) -> tuple[list[Shape], float]:
    """Write the verdict, what was measured, and on which machine."""
    report, verdict = session.report, session.verdict
    texts = [headline(session), machine_line(session)]
    return _headings(report.seconds, verdict.why, verdict.kind, report.target, texts)


def _headings(seconds: float, told: str, kind: str, target: str, texts: Sequence[str]) -> tuple[list[Shape], float]:
    """Write the title in large letters with a bar in the colour of its kind, the target, and lines below."""
    y = 34.0
    shapes: list[Shape] = []
    why, _, more = told.partition("; ")
    for line in wrapped(f"{format_seconds(seconds)}: {why}", _ROOM - 16, 17, most=3, bold=True):
        shapes.append(Words(_MARGIN + 14, y, line, "ink", 17, bold=True))
        y += 24
    for line in wrapped(more, _ROOM - 16, 13, most=3) if more else ():
        shapes.append(Words(_MARGIN + 14, y - 2, line, "ink", 13))
        y += 19
    shapes.append(Rect(_MARGIN, 18, 5, y - 36, kind, radius=2))
    shapes.append(Words(_MARGIN, y + 8, fitting(target, _ROOM, 13), "ink", 13))
    y += 8
    for text in filter(None, texts):
        for line in wrapped(text, _ROOM, 12, most=2):
            y += 18
            shapes.append(Words(_MARGIN, y, line, "soft", 12))
    return shapes, y


def _legend(lanes: Sequence[Lane], top: float) -> tuple[list[Shape], float]:
    """Name the colours, each with how long anything of it was under way."""
    spans = [span for lane in lanes for span in lane.process.spans]
    times = {name: union(s for s in spans if s.name == name) for name in ALL_PHASES}
    entries = [
        (name, f"{name} {format_seconds(sum(end - start for start, end in found) / 1e9)}")
        for name, found in times.items()
        if found
    ]
    entries += [("ink", "set the pace")] if lanes[1:] else []
    return _entries(entries, top)


def _entries(entries: Sequence[tuple[str, str]], top: float) -> tuple[list[Shape], float]:
    """Write colours with their meanings in as many lines as they need; return where they end, too."""
    shapes: list[Shape] = []
    x, y = float(_MARGIN), top
    for colour, text in entries:
        width = 18 + text_width(text, 12) + 14
        if x + width > _WIDTH - _MARGIN:
            x, y = _MARGIN, y + 20
        height = 3 if colour == "ink" else 11
        shapes.append(Rect(x, y + (11 - height) / 2, 12, height, colour, radius=0 if colour == "ink" else 2))
        shapes.append(Words(x + 18, y + 10, text, "soft", 12))
        x += width
    return shapes, y + 20
