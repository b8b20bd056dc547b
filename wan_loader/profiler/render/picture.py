"""A session as one picture that a person can paste: verdict, legend, and what each process did, on one clock. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from wan_loader.phases import ALL_PHASES
from wan_loader.profiler.render.charts import timeline
from wan_loader.profiler.render.lanes import lanes_of
from wan_loader.profiler.render.shapes import Drawing, Rect, Shape, Words, fitting, text_width, wrapped
from wan_loader.profiler.render.terminal import headline, machine_line
from wan_loader.sizes import format_count, format_seconds
from wan_loader.spans import union

if TYPE_CHECKING:
    from collections.abc import Sequence

    from wan_loader.profiler.analysis.session import Session
    from wan_loader.profiler.render.charts import Lane

__all__ = ["draw"]

_WIDTH = 1200
_MARGIN = 24
_ROOM = _WIDTH - 2 * _MARGIN


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


def _title(session: Session) -> tuple[list[Shape], float]:
    """Write the verdict, what was measured, and on which machine."""
    verdict, y = session.verdict, 34.0
    shapes: list[Shape] = []
    why, _, more = verdict.why.partition("; ")
    for line in wrapped(f"{format_seconds(session.report.seconds)}: {why}", _ROOM - 16, 17, most=3, bold=True):
        shapes.append(Words(_MARGIN + 14, y, line, "ink", 17, bold=True))
        y += 24
    for line in wrapped(more, _ROOM - 16, 13, most=3) if more else ():
        shapes.append(Words(_MARGIN + 14, y - 2, line, "ink", 13))
        y += 19
    shapes.append(Rect(_MARGIN, 18, 5, y - 36, verdict.kind, radius=2))
    shapes.append(Words(_MARGIN, y + 8, fitting(session.report.target, _ROOM, 13), "ink", 13))
    y += 8
    for text in (headline(session), machine_line(session)):
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
