"""Drawings of a session as SVG text: the timeline, and throughput over time. Pure; no scripts, no outside resources.

Colours are named after phases by CSS classes, so that the page can suit light and dark.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from wan_loader.printable import markup_text
from wan_loader.sizes import format_bytes, format_rate, format_seconds
from wan_loader.spans import Mark, throughput

if TYPE_CHECKING:
    from collections.abc import Sequence

    from wan_loader.profiler.analysis.session import Process

__all__ = ["axis_step", "throughput_svg", "timeline_svg"]

_WIDTH = 1000
_LEFT = 130
_ROW = 22
_MAX_TRACKS = 40
#: Narrower gaps than this are not visible: spans across them are drawn as one.
_GAP = 0.5


def axis_step(length: float, most: int = 8) -> float:
    """Return a round distance (1, 2 or 5 times a power of ten) that divides `length` into at most `most` steps."""
    step = 1e-6
    while True:
        for factor in (1, 2, 5):
            if length / (step * factor) <= most:
                return step * factor
        step *= 10


def timeline_svg(processes: Sequence[tuple[str, Process]], start_ns: int, end_ns: int) -> str:
    """Draw a group of rows for each process, and in it one row for each thread or stream, with a hover text each.

    Args:
        processes: Each with its title; a single one gets no line for it.
        start_ns: Where the picture begins.
        end_ns: Where it ends.
    """
    scale = (_WIDTH - _LEFT - 10) / max(1, end_ns - start_ns)
    most = max(3, _MAX_TRACKS // max(1, len(processes)))
    rows: list[str] = []
    y = 0
    for title, process in processes:
        if len(processes) > 1:
            rows += _process_row(title, process, y, start_ns, scale)
            y += _ROW
        tracks = sorted({s.track for s in process.spans}, key=lambda t: (t != "MainThread", t))[:most]
        for track in tracks:
            rows.append(
                f'<text x="{_LEFT - 8}" y="{y + 15}" class="label">{markup_text(_short(track or "main"))}</text>'
            )
            for span in _visible([s for s in process.spans if s.track == track], scale):
                x = _LEFT + (span.start_ns - start_ns) * scale
                width = max(0.6, (span.end_ns - span.start_ns) * scale)
                rows.append(
                    f'<rect x="{x:.1f}" y="{y + 3}" width="{width:.1f}" height="{_ROW - 6}" class="p-{span.name}">'
                    f"<title>{markup_text(_hover(span))}</title></rect>"
                )
            y += _ROW
    head = f'<svg viewBox="0 0 {_WIDTH} {y + 28}" role="img" aria-label="timeline" class="timeline">'
    return "".join([head, *_time_axis((end_ns - start_ns) / 1e9, y), *rows, "</svg>"])


def _process_row(title: str, process: Process, y: int, start_ns: int, scale: float) -> list[str]:
    """Draw the life of a process as a line, with its title above."""
    x = _LEFT + (process.start_ns - start_ns) * scale
    width = max(0.6, (process.end_ns - process.start_ns) * scale)
    # near the right edge the title ends where the line does
    anchor, at = ("end", x + width) if x > _WIDTH * 0.7 else ("start", x)
    text = markup_text(_short(title, 90))
    return [
        f'<rect x="{x:.1f}" y="{y + 17}" width="{width:.1f}" height="2" class="life"/>',
        f'<text x="{at:.1f}" y="{y + 13}" class="process" text-anchor="{anchor}">{text}</text>',
    ]


def _short(text: str, most: int = 18) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


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


def _time_axis(seconds: float, bottom: float) -> list[str]:
    """Draw vertical lines at round times."""
    step = axis_step(max(seconds, 1e-6))
    scale = (_WIDTH - _LEFT - 10) / max(seconds, 1e-9)
    parts = []
    for i in range(int(seconds / step) + 1):
        x = _LEFT + i * step * scale
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{bottom + 4}" class="grid"/>')
        parts.append(f'<text x="{x:.1f}" y="{bottom + 18}" class="tick">{i * step:.6g} s</text>')
    return parts


def throughput_svg(process: Process) -> str:
    """Draw bytes per second over time: read by the process, copied to the device, fetched from storage by kernel."""
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
    top = max((max(values) for _, values in series), default=0.0)
    if not top:
        return ""
    height = 180
    parts = [f'<svg viewBox="0 0 {_WIDTH} {height + 28}" role="img" aria-label="throughput" class="throughput">']
    parts += _time_axis(process.seconds, height)
    parts += _rate_axis(top, height)
    for name, values in series:
        step = (_WIDTH - _LEFT - 10) / len(values)
        y = [height - v / top * (height - 12) for v in values]
        path = "".join(f"{'L' if i else 'M'}{_LEFT + (i + 0.5) * step:.1f},{v:.1f}" for i, v in enumerate(y))
        parts.append(f'<path d="{path}" class="l-{name}"/>')
    return "".join([*parts, "</svg>"])


def _rate_axis(top: float, height: int) -> list[str]:
    step = axis_step(top / 1e9, 4) * 1e9
    parts = []
    for i in range(int(top / step) + 1):
        y = height - i * step / top * (height - 12)
        parts.append(f'<line x1="{_LEFT}" x2="{_WIDTH - 10}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" class="label">{i * step / 1e9:.6g} GB/s</text>')
    return parts


def _fetched(process: Process) -> list[Mark]:
    """Make spans of the bytes from storage between two samples."""
    zero = process.start_ns
    return [
        Mark("read", a.at_ns - zero, b.at_ns - zero, max(0, b.read_bytes - a.read_bytes))
        for a, b in zip(process.samples, process.samples[1:], strict=False)
        if b.at_ns > a.at_ns
    ]
