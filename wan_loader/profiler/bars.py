"""What the reports share: readable numbers, and timelines squeezed into a line of text. Pure."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from wan_loader.profiler.timeline import union

if TYPE_CHECKING:
    from collections.abc import Iterable

    from wan_loader.events import Span

__all__ = ["format_bytes", "format_rate", "format_seconds", "timeline_bar"]

_LEVELS = " ▁▂▃▄▅▆▇█"


def format_bytes(nbytes: float) -> str:
    """Decimal units, as disks and links are sold: 28.6 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(nbytes) < 999.5:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.3g} TB"


def format_rate(bytes_per_second: float) -> str:
    """As `format_bytes`, per second."""
    return f"{format_bytes(bytes_per_second)}/s"


def format_seconds(seconds: float) -> str:
    """With three digits: 0.71 s, 3.2 ms, 84.1 s."""
    if seconds >= 100:
        return f"{seconds:.0f} s"
    return f"{seconds:.3g} s" if seconds >= 0.1 else f"{seconds * 1000:.3g} ms"


def timeline_bar(spans: Iterable[Span], start_ns: int, end_ns: int, width: int = 40) -> str:
    """How busy a phase was over time: one block character for each slice of [start, end)."""
    step = max(1.0, (end_ns - start_ns) / width)
    busy = [0.0] * width
    for a, b in union(spans):
        first, last = int((a - start_ns) // step), int((b - 1 - start_ns) // step)
        for i in range(max(0, first), min(width - 1, last) + 1):
            busy[i] += max(0.0, min(b, start_ns + (i + 1) * step) - max(a, start_ns + i * step))
    return "".join(_LEVELS[math.ceil(min(1.0, share / step) * 8)] for share in busy)
