"""Shapes as a PNG, painted by Pillow, which comes with the pipeline extra and with `wan-loader[picture]`."""

from __future__ import annotations

import io
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from wan_loader.errors import OutputError
from wan_loader.printable import printable
from wan_loader.profiler.render.shapes import COLOURS, Curve, Dot, Line, Rect

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from wan_loader.profiler.render.shapes import Drawing, Shape, Words

__all__ = ["check_png", "to_png"]

#: Pixels for each unit of a drawing: sharp on screens of today, and where the picture is enlarged.
_SCALE = 2
_DASH, _HOLE = 4, 3
_ANCHORS = {"start": "ls", "middle": "ms", "end": "rs"}


def check_png(path: Path | None) -> None:
    """Raise `OutputError` now rather than after the work, if there is nothing to paint a PNG with."""
    if path is not None and find_spec("PIL") is None:
        remedy = "pip install 'wan-loader[picture]', or write an SVG, which browsers show and save as PNG"
        raise OutputError.because("pictures in PNG are painted by Pillow, which is not installed", remedy, path=path)


def to_png(drawing: Drawing, colours: Mapping[str, str] = COLOURS) -> bytes:
    """Paint a drawing at twice its size, on a light background."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (drawing.width * _SCALE, drawing.height * _SCALE), colours["paper"])
    canvas = ImageDraw.Draw(image, "RGBA")
    for shape in drawing.shapes:
        _paint(canvas, shape, colours[shape.colour])
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _paint(canvas: Any, shape: Shape, colour: str) -> None:
    if isinstance(shape, Rect):
        x, y = shape.x * _SCALE, shape.y * _SCALE
        # the corner that Pillow is given still belongs to the rectangle
        right, bottom = x + max(1.0, shape.width * _SCALE) - 1, y + max(1.0, shape.height * _SCALE) - 1
        canvas.rounded_rectangle((x, y, right, bottom), shape.radius * _SCALE, fill=colour)
    elif isinstance(shape, Line):
        _paint_line(canvas, shape, colour)
    elif isinstance(shape, Curve):
        canvas.line([(x * _SCALE, y * _SCALE) for x, y in shape.points], fill=colour, width=2 * _SCALE, joint="curve")
    elif isinstance(shape, Dot):
        x, y, r = shape.x * _SCALE, shape.y * _SCALE, shape.radius * _SCALE
        canvas.ellipse((x - r, y - r, x + r, y + r), fill=f"{colour}8c")
    else:
        _paint_words(canvas, shape, colour)


def _paint_line(canvas: Any, line: Line, colour: str) -> None:
    """Paint a line; one that is dashed is vertical."""
    x1, y1, x2, y2 = (v * _SCALE for v in (line.x1, line.y1, line.x2, line.y2))
    if not line.dashed:
        canvas.line((x1, y1, x2, y2), fill=colour, width=_SCALE)
        return
    y = y1
    while y < y2:
        canvas.line((x1, y, x2, min(y2, y + _DASH * _SCALE)), fill=colour, width=_SCALE)
        y += (_DASH + _HOLE) * _SCALE


def _paint_words(canvas: Any, words: Words, colour: str) -> None:
    font = _font(words.size * _SCALE, bold=words.bold)
    place = (words.x * _SCALE, words.y * _SCALE)
    canvas.text(place, printable(words.text), fill=colour, font=font, anchor=_ANCHORS[words.anchor])


@cache
def _font(size: int, *, bold: bool) -> Any:
    """Return a font of the system with many letters, or the one that comes with Pillow."""
    from PIL import ImageFont

    for name in ("DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf", "DejaVuSans.ttf"):
        try:
            return ImageFont.truetype(name, size)
        except OSError:
            continue
    return ImageFont.load_default(size)
