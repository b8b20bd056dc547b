"""Timelines squeezed into a line of text. Pure."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from wan_loader.spans import union

if TYPE_CHECKING:
    from collections.abc import Iterable

    from wan_loader.events import Span

__all__ = ["timeline_bar"]

_LEVELS = " ▁▂▃▄▅▆▇█"


def timeline_bar(spans: Iterable[Span], start_ns: int, end_ns: int, width: int = 40) -> str:
    """Draw how busy a phase was over time: one block character for each slice of [start, end)."""
    step = max(1.0, (end_ns - start_ns) / width)
    busy = [0.0] * width
    for a, b in union(spans):
        first, last = int((a - start_ns) // step), int((b - 1 - start_ns) // step)
        for i in range(max(0, first), min(width - 1, last) + 1):
            busy[i] += max(0.0, min(b, start_ns + (i + 1) * step) - max(a, start_ns + i * step))
    return "".join(_LEVELS[math.ceil(min(1.0, share / step) * 8)] for share in busy)
