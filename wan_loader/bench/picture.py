"""A bench as one picture to paste: a bar for each loader, its samples, the ceiling, our time line. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from wan_loader.bench.table import case_title, machine_line, ordered, why_no_time
from wan_loader.profiler.render.png import to_png as paint_png
from wan_loader.profiler.render.shapes import COLOURS, Dot, Drawing, Line, Rect, Shape, Words, fitting, time_axis
from wan_loader.profiler.render.svg import to_svg as write_svg
from wan_loader.sizes import format_seconds

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["to_png", "to_svg"]

_WIDTH = 1000
_LEFT = 170
_RIGHT = 180
_BAR = 24
_TRACK = 13
#: On the CPU: the first use of pages that were only mapped.
_TOUCH = "touch"
_COLOURS = COLOURS | {"ours": "#2fa36b", "rival": "#8fa9c8", "ceiling": "#b3261e", _TOUCH: "#e0b050"}
#: What is drawn of a load, from top to bottom.
_DRAWN = ("read", "register", "h2d", "cast", _TOUCH, "wait", "init", "header")


def to_svg(document: Mapping[str, Any]) -> str:
    """Write the picture as SVG."""
    return write_svg(draw(document), _COLOURS)


def to_png(document: Mapping[str, Any]) -> bytes:
    """Paint it as PNG."""
    return paint_png(draw(document), _COLOURS)


def draw(document: Mapping[str, Any]) -> Drawing:
    """Draw the picture."""
    title = "Loading weights, measured: shorter is better"
    shapes: list[Shape] = [
        Words(20, 28, title, size=18, bold=True),
        Words(20, 48, fitting(machine_line(document["machine"]), _WIDTH - 40, 11), "soft", 11),
    ]
    y = 62
    for case in document["cases"]:
        drawn, height = _case(case, document, y)
        shapes += drawn
        y += height
    return Drawing(_WIDTH, y + 12, shapes, title)


def _case(case: Mapping[str, Any], document: Mapping[str, Any], top: int) -> tuple[list[Shape], int]:
    title = fitting(case_title(case, document), _WIDTH - 40, 14, bold=True)
    shapes: list[Shape] = [Words(20, top + 22, title, size=14, bold=True)]
    if case["failure"]:
        told = fitting(f"nothing was measured: {case['failure']}", _WIDTH - 40, 13)
        return [*shapes, Words(20, top + 44, told, "ceiling")], 64
    results = ordered(case)
    longest = 1.05 * max([r["summary"]["median_s"] for r in results if r["summary"]], default=1.0) or 1.0
    scale = (_WIDTH - _LEFT - _RIGHT) / longest
    y = top + 36
    rows: list[Shape] = []
    bottom = y + len(results) * (_BAR + 6)
    for result in results:
        rows += _bar(result, y, scale)
        y += _BAR + 6
    limit = _limit(case, top + 32, bottom, scale)
    shapes += [*time_axis(longest, _LEFT, _WIDTH - _RIGHT, [(top + 32, bottom)], 6), *rows, *limit]
    tracks, height = _time_lines(case, bottom + 26, scale)
    return [*shapes, *tracks], bottom + 26 + height - top


def _bar(result: Mapping[str, Any], y: int, scale: float) -> list[Shape]:
    ours = result["loader"].startswith("ours")
    shapes = _label(result["loader"], y, bold=ours)
    summary = result["summary"]
    if summary is None:
        why = fitting(why_no_time(result), _WIDTH - _LEFT - 24, 11)
        return [*shapes, Words(_LEFT + 4, y + 16, why, "soft", 11)]
    width = summary["median_s"] * scale
    shapes.append(Rect(_LEFT, y, max(1.0, width), _BAR, "ours" if ours else "rival", radius=2))
    good = (s for s in result["samples"] if s["status"] == "ok")
    shapes += [_sample(_LEFT + sample["seconds"] * scale, y + _BAR / 2) for sample in good]
    rate = f", {result['gbps']:.3g} GB/s" if result["gbps"] else ""
    failed = "" if result["status"] == "ok" else f" ({result['status']})"
    told = f"{format_seconds(summary['median_s'])}{rate}{failed}"
    return [*shapes, Words(_WIDTH - 20, y + 16, told, anchor="end", bold=ours)]


def _label(label: str, y: int, *, bold: bool) -> list[Shape]:
    """Write the loader's name; its settings in small letters below."""
    name, _, settings = label.partition(" ")
    if not settings:
        return [Words(_LEFT - 10, y + 16, name, anchor="end", bold=bold)]
    return [
        Words(_LEFT - 10, y + 10, name, anchor="end", bold=bold),
        Words(_LEFT - 10, y + 22, settings, "soft", 10, "end"),
    ]


def _sample(x: float, y: float) -> Shape:
    """Draw a sample; an arrow at the edge where it lies beyond the picture."""
    edge = _WIDTH - _RIGHT + 4
    return Words(edge, y + 4, "\u25b8", "soft", 12) if x > edge else Dot(x, y, 2.6)


def _limit(case: Mapping[str, Any], top: int, bottom: int, scale: float) -> list[Shape]:
    if not case["ceiling_gbps"]:
        return []
    seconds = case["nbytes"] / case["ceiling_gbps"] / 1e9
    x = _LEFT + seconds * scale
    if x > _WIDTH - _RIGHT:
        return []
    label = f"dashed: {case['ceiling']}: {format_seconds(seconds)}"
    return [
        Line(x, top, x, bottom, "ceiling", dashed=True),
        Words(_WIDTH - 20, bottom + 30, label, "ceiling", 11, "end"),
    ]


def _time_lines(case: Mapping[str, Any], top: int, scale: float) -> tuple[list[Shape], int]:
    """Draw the phases of our median sample on the scale of the bars, if anything of them is wide enough to be seen."""
    for result in ordered(case):
        sample = _median_sample(result)
        phases = {n: rows for n, rows in (sample or {}).get("phases", {}).items() if n in _DRAWN}
        width = sample["seconds"] * scale if sample else 0.0
        if not sample or not phases or width <= 0:
            continue
        stretch = max(1.0, (_WIDTH - _LEFT - _RIGHT) / width)
        note = "" if stretch < 1.05 else f", drawn {stretch:.2g} times wider"
        shapes: list[Shape] = [Words(20, top + 10, f"inside {result['loader']}{note}", "soft", 11)]
        y = top + 18
        for name in (n for n in _DRAWN if n in phases):
            label = "first use" if name == _TOUCH else name
            shapes.append(Words(_LEFT - 10, y + 10, label, "soft", 11, "end"))
            for start, end in phases[name]:
                x, length = _LEFT + start * scale * stretch, max(0.6, (end - start) * scale * stretch)
                shapes.append(Rect(x, y, length, _TRACK - 3, name))
            y += _TRACK
        return shapes, y + 16 - top
    return [], 10


def _median_sample(result: Mapping[str, Any]) -> Mapping[str, Any] | None:
    good = sorted((s for s in result["samples"] if s["status"] == "ok"), key=lambda s: float(s["seconds"]))
    return good[len(good) // 2] if good else None
