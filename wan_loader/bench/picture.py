"""A bench as one SVG that a person can paste: a bar for each loader, its samples, the ceiling, our time line. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from wan_loader.bench.table import case_title, machine_line, ordered, why_no_time
from wan_loader.phases import PHASE_TABLE
from wan_loader.printable import markup_text
from wan_loader.profiler.render.charts import axis_step
from wan_loader.sizes import format_seconds

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["to_svg"]

_WIDTH = 1000
_LEFT = 170
_RIGHT = 180
_BAR = 24
_TRACK = 13
_INK, _SOFT, _LINE = "#1c2430", "#5c6675", "#dfe4ea"
_OURS, _OTHER, _LIMIT = "#2fa36b", "#8fa9c8", "#b3261e"
#: On the CPU: the first use of pages that were only mapped.
_TOUCH = "touch"
_COLOURS = {kind.name: kind.colour for kind in PHASE_TABLE} | {_TOUCH: "#e0b050"}
#: What is drawn of a load, from top to bottom.
_DRAWN = ("read", "register", "h2d", "cast", _TOUCH, "wait", "init", "header")


def to_svg(document: Mapping[str, Any]) -> str:
    """Draw the picture, with its own fonts and a white background."""
    y = 62
    parts: list[str] = []
    for case in document["cases"]:
        drawn, height = _case(case, document, y)
        parts += drawn
        y += height
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {y + 12}" width="{_WIDTH}" height="{y + 12}" '
        'font-family="system-ui, -apple-system, Segoe UI, Roboto, DejaVu Sans, sans-serif" font-size="13">'
        f'<rect width="{_WIDTH}" height="{y + 12}" fill="#ffffff"/>'
    )
    title = _text(20, 28, "Loading weights, measured: shorter is better", size=18, weight=600)
    return "".join(
        [head, title, _text(20, 48, machine_line(document["machine"]), colour=_SOFT, size=11), *parts, "</svg>\n"]
    )


def _case(case: Mapping[str, Any], document: Mapping[str, Any], top: int) -> tuple[list[str], int]:
    parts = [_text(20, top + 22, case_title(case, document), weight=600, size=14)]
    if case["failure"]:
        return [*parts, _text(20, top + 44, f"nothing was measured: {case['failure']}", colour=_LIMIT)], 64
    results = ordered(case)
    longest = 1.05 * max([r["summary"]["median_s"] for r in results if r["summary"]], default=1.0) or 1.0
    scale = (_WIDTH - _LEFT - _RIGHT) / longest
    y = top + 36
    rows: list[str] = []
    bottom = y + len(results) * (_BAR + 6)
    for result in results:
        rows += _bar(result, y, scale)
        y += _BAR + 6
    limit = _limit(case, top + 32, bottom, scale)
    parts += [*_axis(longest, top + 32, bottom, scale), *rows, *limit]
    tracks, height = _time_lines(case, bottom + 26, scale)
    return [*parts, *tracks], bottom + 26 + height - top


def _bar(result: Mapping[str, Any], y: int, scale: float) -> list[str]:
    ours = result["loader"].startswith("ours")
    parts = _label(result["loader"], y, weight=600 if ours else 400)
    summary = result["summary"]
    if summary is None:
        why = why_no_time(result)
        return [*parts, _text(_LEFT + 4, y + 16, _short(why, 120), colour=_SOFT, size=11)]
    width = summary["median_s"] * scale
    fill = _OURS if ours else _OTHER
    parts.append(f'<rect x="{_LEFT}" y="{y}" width="{max(1.0, width):.1f}" height="{_BAR}" rx="2" fill="{fill}"/>')
    good = (s for s in result["samples"] if s["status"] == "ok")
    parts += [_dot(_LEFT + sample["seconds"] * scale, y + _BAR / 2) for sample in good]
    rate = f", {result['gbps']:.3g} GB/s" if result["gbps"] else ""
    failed = "" if result["status"] == "ok" else f" ({result['status']})"
    told = f"{format_seconds(summary['median_s'])}{rate}{failed}"
    return [*parts, _text(_WIDTH - 20, y + 16, told, anchor="end", weight=600 if ours else 400)]


def _label(label: str, y: int, *, weight: int) -> list[str]:
    """Write the loader's name; its settings in small letters below."""
    name, _, settings = label.partition(" ")
    if not settings:
        return [_text(_LEFT - 10, y + 16, name, anchor="end", weight=weight)]
    return [
        _text(_LEFT - 10, y + 10, name, anchor="end", weight=weight),
        _text(_LEFT - 10, y + 22, settings, anchor="end", colour=_SOFT, size=10),
    ]


def _dot(x: float, y: float) -> str:
    """Draw a sample; an arrow at the edge where it lies beyond the picture."""
    edge = _WIDTH - _RIGHT + 4
    if x > edge:
        return f'<path d="M{edge},{y - 4:.1f}l6,4l-6,4z" fill="{_INK}" fill-opacity="0.55"/>'
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.6" fill="{_INK}" fill-opacity="0.55"/>'


def _limit(case: Mapping[str, Any], top: int, bottom: int, scale: float) -> list[str]:
    if not case["ceiling_gbps"]:
        return []
    seconds = case["nbytes"] / case["ceiling_gbps"] / 1e9
    x = _LEFT + seconds * scale
    if x > _WIDTH - _RIGHT:
        return []
    label = f"{case['ceiling']}: {format_seconds(seconds)}"
    return [
        f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{bottom}" stroke="{_LIMIT}" stroke-dasharray="4 3"/>',
        _text(_WIDTH - 20, bottom + 30, f"dashed: {label}", colour=_LIMIT, size=11, anchor="end"),
    ]


def _axis(longest: float, top: int, bottom: int, scale: float) -> list[str]:
    step = axis_step(longest, 6)
    parts = []
    for i in range(int(longest / step) + 1):
        x = _LEFT + i * step * scale
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{bottom}" stroke="{_LINE}"/>')
        parts.append(_text(x, bottom + 15, f"{i * step:.6g} s", colour=_SOFT, size=11, anchor="middle"))
    return parts


def _time_lines(case: Mapping[str, Any], top: int, scale: float) -> tuple[list[str], int]:
    """Draw the phases of our median sample on the scale of the bars, if anything of them is wide enough to be seen."""
    for result in ordered(case):
        sample = _median_sample(result)
        phases = {n: rows for n, rows in (sample or {}).get("phases", {}).items() if n in _DRAWN}
        width = sample["seconds"] * scale if sample else 0.0
        if not sample or not phases or width <= 0:
            continue
        stretch = max(1.0, (_WIDTH - _LEFT - _RIGHT) / width)
        note = "" if stretch < 1.05 else f", drawn {stretch:.2g} times wider"
        parts = [_text(20, top + 10, f"inside {result['loader']}{note}", colour=_SOFT, size=11)]
        y = top + 18
        for name in (n for n in _DRAWN if n in phases):
            label = "first use" if name == _TOUCH else name
            parts.append(_text(_LEFT - 10, y + 10, label, colour=_SOFT, size=11, anchor="end"))
            for start, end in phases[name]:
                x, length = _LEFT + start * scale * stretch, max(0.6, (end - start) * scale * stretch)
                parts.append(
                    f'<rect x="{x:.1f}" y="{y}" width="{length:.1f}" height="{_TRACK - 3}" fill="{_COLOURS[name]}"/>'
                )
            y += _TRACK
        return parts, y + 16 - top
    return [], 10


def _median_sample(result: Mapping[str, Any]) -> Mapping[str, Any] | None:
    good = sorted((s for s in result["samples"] if s["status"] == "ok"), key=lambda s: float(s["seconds"]))
    return good[len(good) // 2] if good else None


def _text(
    x: float, y: float, text: str, *, anchor: str = "start", colour: str = _INK, size: int = 13, weight: int = 400
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}" font-size="{size}" '
        f'font-weight="{weight}">{markup_text(text)}</text>'
    )


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
