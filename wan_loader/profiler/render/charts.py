"""Drawings of a session as shapes: the timeline, and throughput over time. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from wan_loader.profiler.render.shapes import Curve, Line, Rect, Shape, Words, axis_step, fitting, text_width, time_axis
from wan_loader.sizes import format_bytes, format_count, format_rate, format_seconds
from wan_loader.spans import Mark, throughput

if TYPE_CHECKING:
    from collections.abc import Sequence

    from wan_loader.profiler.analysis.session import Process, Turn

__all__ = ["CHART_WIDTH", "Lane", "throughput_chart", "timeline"]

#: Of the charts of a page.
CHART_WIDTH = 860
_LEFT = 130
_ROW = 18
_HEAD = 22
_MAX_TRACKS = 40
#: Narrower gaps than this are not visible: spans across them are drawn as one.
_GAP = 0.5


@dataclass(frozen=True, slots=True)
class Lane:
    """A process of the timeline."""

    title: str
    """What it is called."""
    process: Process
    turns: Sequence[Turn] = ()
    """When it set the pace; drawn where there are several processes."""


@dataclass(frozen=True, slots=True)
class _Clock:
    """Times of a session as places in a picture."""

    left: float
    right: float
    start_ns: int
    end_ns: int

    @property
    def scale(self) -> float:
        return (self.right - self.left) / max(1, self.end_ns - self.start_ns)

    def x(self, at_ns: int) -> float:
        return min(self.right, max(self.left, self.left + (at_ns - self.start_ns) * self.scale))

    def width(self, start_ns: int, end_ns: int) -> float:
        return max(0.6, self.x(end_ns) - self.x(start_ns))


def timeline(
    lanes: Sequence[Lane], start_ns: int, end_ns: int, *, left: float = 0, right: float = CHART_WIDTH, top: float = 0
) -> tuple[list[Shape], float]:
    """Draw a lane for each process, and in it one row for each thread or stream, all on one clock.

    Args:
        lanes: The processes; a single one gets no line for its name.
        start_ns: Where the picture begins.
        end_ns: Where it ends.
        left: The left edge of the place for it.
        right: The right edge.
        top: The upper edge.

    Returns:
        The shapes, and where they end.
    """
    # half of the last time of the axis stands beyond the end
    clock = _Clock(left + _LEFT, right - 14, start_ns, end_ns)
    most = max(3, _MAX_TRACKS // max(1, len(lanes)))
    rows: list[Shape] = []
    bands: list[tuple[float, float]] = []
    y = top
    for lane in lanes:
        if len(lanes) > 1:
            rows += _lane_head(lane, y, left, right)
            y += _HEAD
        begin = y
        drawn, y = _tracks(lane, y, clock, most, alone=len(lanes) == 1)
        rows += drawn
        bands.append((begin, y))
        y += 4
    axis = time_axis((end_ns - start_ns) / 1e9, clock.left, clock.right, bands)
    # lives, then lines, then what happened
    lives = [s for s in rows if isinstance(s, Rect) and s.colour == "life"]
    others = [s for s in rows if not (isinstance(s, Rect) and s.colour == "life")]
    return [*lives, *axis, *others], y + 24


def _lane_head(lane: Lane, y: float, left: float, right: float) -> list[Shape]:
    """Write what a process is, its command, and when it was there, without one reaching into the other."""
    process = lane.process
    paced = sum(turn.seconds for turn in lane.turns)
    times = [f"{process.start_ns / 1e9:.2f} to {process.end_ns / 1e9:.2f} s"]
    times += [f"set the pace for {format_seconds(paced)}"] if paced else []
    times += [process.ended] if process.ended else []
    told = ", ".join(times)
    room = right - left - text_width(told, 11) - 24
    title = fitting(lane.title, room, 12, bold=True)
    begin = text_width(title, 12, bold=True) + 12
    shapes: list[Shape] = [
        Words(left, y + 15, title, "ink", 12, bold=True),
        Words(right, y + 15, told, "soft", 11, "end"),
    ]
    command = fitting(process.title, room - begin, 11) if process.title != lane.title else ""
    return [*shapes, Words(left + begin, y + 15, command, "soft", 11)] if len(command) > 8 else shapes


def _tracks(lane: Lane, y: float, clock: _Clock, most: int, *, alone: bool) -> tuple[list[Shape], float]:
    """Draw the rows of a process, and below them a line where it set the pace."""
    process = lane.process
    tracks = sorted({s.track for s in process.spans}, key=lambda t: (t != "MainThread", t))
    begin = y
    shapes: list[Shape] = []
    for track in tracks[:most] or [""]:
        label = fitting(track or ("main" if tracks else ""), _LEFT - 14, 11)
        shapes.append(Words(clock.left - 8, y + 13, label, "soft", 11, "end"))
        for span in _visible([s for s in process.spans if s.track == track], clock.scale):
            width = clock.width(span.start_ns, span.end_ns)
            shapes.append(Rect(clock.x(span.start_ns), y + 2, width, _ROW - 4, span.name, _hover(span)))
        y += _ROW
    if (more := len(tracks) - most) > 0:
        shapes.append(Words(clock.left, y + 12, f"{format_count(more, 'thread')} more: not drawn", "soft", 11))
        y += _ROW
    for turn in () if alone else lane.turns:
        paced = f"set the pace: {format_seconds(turn.seconds)} from {turn.start_ns / 1e9:.3f} s"
        shapes.append(Rect(clock.x(turn.start_ns), y, clock.width(turn.start_ns, turn.end_ns), 3, "ink", paced))
    life = Rect(clock.x(process.start_ns), begin, clock.width(process.start_ns, process.end_ns), y - begin, "life")
    return [life, *shapes], y + 4


def _hover(span: Mark) -> str:
    seconds = (span.end_ns - span.start_ns) / 1e9
    text = f"{span.name}: {span.label}" if span.label else span.name
    rate = f", {format_bytes(span.nbytes)} at {format_rate(span.nbytes / seconds)}" if span.nbytes and seconds else ""
    return f"{text}, {format_seconds(seconds)} from {span.start_ns / 1e9:.3f} s{rate}"


def _visible(spans: Sequence[Mark], scale: float) -> list[Mark]:
    """Join neighbours of one phase that look like one; spans are of one track."""
    out: list[Mark] = []
    for span in sorted(spans, key=lambda s: s.start_ns):
        last = out[-1] if out else None
        if last and last.name == span.name and (span.start_ns - last.end_ns) * scale < _GAP:
            label = last.label if last.label == span.label else ""
            nbytes = last.nbytes + span.nbytes
            out[-1] = Mark(span.name, last.start_ns, max(last.end_ns, span.end_ns), nbytes, span.track, label)
        elif last and (span.end_ns - max(span.start_ns, last.end_ns)) * scale < 0.05:
            continue  # far narrower than a pixel, beside something visible
        else:
            out.append(span)
    return out


def throughput_chart(process: Process) -> tuple[list[Shape], float]:
    """Draw bytes per second over time: read by the process, copied to the device, fetched from storage by kernel.

    Returns:
        The shapes, none if no byte is known of, and where they end.
    """
    length = process.end_ns - process.start_ns
    shifted = [
        Mark(s.name, s.start_ns - process.start_ns, s.end_ns - process.start_ns, s.nbytes) for s in process.spans
    ]
    series = [
        ("read", throughput([s for s in shifted if s.name == "read"], length)),
        ("h2d", throughput([s for s in shifted if s.name == "h2d"], length)),
        ("storage", throughput(_fetched(process), length)),
    ]
    series = [(name, values) for name, values in series if any(values)]
    most = max((max(values) for _, values in series), default=0.0)
    if not most:
        return [], 0
    right, height = CHART_WIDTH - 14, 180
    shapes = [*time_axis(process.seconds, _LEFT, right, [(0, height)]), *_rate_axis(most, right, height)]
    for name, values in series:
        step = (right - _LEFT) / len(values)
        points = [(_LEFT + (i + 0.5) * step, height - v / most * (height - 12)) for i, v in enumerate(values)]
        shapes.append(Curve(points, name, dashed=name == "storage"))
    return shapes, height + 24


def _rate_axis(most: float, right: float, height: int) -> list[Shape]:
    step = axis_step(most / 1e9, 4) * 1e9
    shapes: list[Shape] = []
    for i in range(int(most / step) + 1):
        y = height - i * step / most * (height - 12)
        shapes.append(Line(_LEFT, y, right, y))
        shapes.append(Words(_LEFT - 8, y + 4, f"{i * step / 1e9:.6g} GB/s", "soft", 11, "end"))
    return shapes


def _fetched(process: Process) -> list[Mark]:
    """Make spans of the bytes from storage between two samples."""
    zero = process.start_ns
    return [
        Mark("read", a.at_ns - zero, b.at_ns - zero, max(0, b.read_bytes - a.read_bytes))
        for a, b in zip(process.samples, process.samples[1:], strict=False)
        if b.at_ns > a.at_ns
    ]
