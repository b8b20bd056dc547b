"""What pictures consist of: a few shapes as values, which `svg` writes as text and `png` paints. Pure.

Colours have names: those of the phases, and those below. A page gives the names colours of its own.
"""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from wan_loader.phases import PHASE_TABLE
from wan_loader.printable import printable, shorten

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["COLOURS", "Curve", "Dot", "Drawing", "Line", "Rect", "Shape", "Words"]
__all__ += ["axis_step", "fitting", "text_width", "time_axis", "wrapped"]

#: On a light background.
COLOURS = {kind.name: kind.colour for kind in PHASE_TABLE} | {
    "ink": "#1c2430",
    "soft": "#5c6675",
    "line": "#dfe4ea",
    "life": "#eef1f5",
    "paper": "#ffffff",
    "storage": "#d9822b",
    "slow": "#b3261e",
    "limit": "#1a7f4b",
    "unknown": "#8a6100",
}
#: Of the size of the letters: what one takes on average in the widest of the usual fonts, and in bold.
_LETTER, _BOLD = 0.6, 0.68


@dataclass(frozen=True, slots=True)
class Rect:
    """A filled rectangle; `hover` is shown where a pointer rests on it."""

    x: float
    y: float
    width: float
    height: float
    colour: str
    hover: str = ""
    radius: float = 0


@dataclass(frozen=True, slots=True)
class Line:
    """A straight line."""

    x1: float
    y1: float
    x2: float
    y2: float
    colour: str = "line"
    dashed: bool = False


@dataclass(frozen=True, slots=True)
class Dot:
    """A filled circle that lets through what lies below."""

    x: float
    y: float
    radius: float
    colour: str = "ink"


@dataclass(frozen=True, slots=True)
class Curve:
    """A line through points."""

    points: Sequence[tuple[float, float]]
    colour: str
    dashed: bool = False


@dataclass(frozen=True, slots=True)
class Words:
    """Text of one line on its base line."""

    x: float
    y: float
    text: str
    colour: str = "ink"
    size: int = 13
    anchor: str = "start"
    """Where `x` is: "start", "middle" or "end"."""
    bold: bool = False


Shape: TypeAlias = Rect | Line | Curve | Dot | Words


@dataclass(frozen=True, slots=True)
class Drawing:
    """A picture: what comes later lies above."""

    width: int
    height: int
    shapes: Sequence[Shape]
    title: str = "timeline"
    """For those who cannot see it."""


def text_width(text: str, size: float, *, bold: bool = False) -> float:
    """Return the width that a text takes at most, without knowing the font."""
    letters = sum(1 / _LETTER if unicodedata.east_asian_width(c) in "WF" else 1 for c in printable(text))
    return letters * size * (_BOLD if bold else _LETTER)


def fitting(text: str, width: float, size: float, *, bold: bool = False) -> str:
    """Cut the middle out of a text that is wider."""
    text = printable(text)
    if (taken := text_width(text, size, bold=bold)) <= width:
        return text
    most = int(len(text) * max(0.0, width) / taken)
    while most > 1 and text_width(shorten(text, most), size, bold=bold) > width:
        most -= 1
    return shorten(text, most) if most > 1 else ""


def wrapped(text: str, width: float, size: float, *, most: int, bold: bool = False) -> list[str]:
    """Fold a text between words into at most `most` lines; what is too long for that loses its middle."""
    text = fitting(text, width * most * 0.9, size, bold=bold)
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and len(lines) < most and text_width(longer, size, bold=bold) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return [fitting(line, width, size, bold=bold) for line in lines]


def axis_step(length: float, most: int = 8) -> float:
    """Return a round distance (1, 2 or 5 times a power of ten) that divides `length` into at most `most` steps."""
    step = 1e-6
    while True:
        for factor in (1, 2, 5):
            if length / (step * factor) <= most:
                return step * factor
        step *= 10


def time_axis(
    seconds: float, left: float, right: float, bands: Sequence[tuple[float, float]], most: int = 8
) -> list[Shape]:
    """Draw vertical lines at round times from 0 to `seconds`, with the times below.

    Args:
        seconds: The time at the right edge.
        left: The left edge.
        right: The right edge.
        bands: Where the lines go, from above to below, so that they cross no text.
        most: How many times there are at most.
    """
    step = axis_step(max(seconds, 1e-6), most)
    scale = (right - left) / max(seconds, 1e-9)
    shapes: list[Shape] = []
    for i in range(int(seconds / step) + 1):
        x = left + i * step * scale
        shapes += [Line(x, top, x, bottom) for top, bottom in bands]
        shapes.append(Words(x, bands[-1][1] + 15, f"{i * step:.6g} s", "soft", 11, "middle"))
    return shapes
