"""Shapes as SVG text: no scripts, no outside resources, every text escaped. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from wan_loader.printable import markup_text
from wan_loader.profiler.render.shapes import COLOURS, Curve, Dot, Line, Rect

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from wan_loader.profiler.render.shapes import Drawing, Shape, Words

__all__ = ["to_inline_svg", "to_svg"]

_FONTS = "system-ui, -apple-system, Segoe UI, Roboto, DejaVu Sans, sans-serif"


def to_svg(drawing: Drawing, colours: Mapping[str, str] = COLOURS) -> str:
    """Write a file of its own, with its fonts and a light background."""
    width, height = drawing.width, drawing.height

    def painted(property: str, name: str) -> str:
        return f'{property}="{colours[name]}"'

    return "".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
            f'height="{height}" role="img" aria-label="{markup_text(drawing.title)}" font-family="{_FONTS}">',
            f'<rect width="{width}" height="{height}" {painted("fill", "paper")}/>',
            *(_shape(shape, painted) for shape in drawing.shapes),
            "</svg>\n",
        ]
    )


def to_inline_svg(drawing: Drawing, name: str) -> str:
    """Write a part of a page; `name` is the picture's class.

    The page's style gives colours to the classes `p-NAME` of what is filled, and `l-NAME` of lines.
    """

    def painted(property: str, colour: str) -> str:
        return f'class="{"p" if property == "fill" else "l"}-{colour}"'

    head = f'<svg viewBox="0 0 {drawing.width} {drawing.height}" role="img" aria-label="{name}" class="{name}">'
    shapes = (_shape(shape, painted) for shape in drawing.shapes)
    return "".join([head, *shapes, "</svg>"])


def _shape(shape: Shape, painted: Callable[[str, str], str]) -> str:
    if isinstance(shape, Rect):
        radius = f' rx="{shape.radius:g}"' if shape.radius else ""
        head = (
            f'<rect x="{shape.x:.1f}" y="{shape.y:.1f}" width="{shape.width:.1f}" height="{shape.height:.1f}"{radius} '
            f"{painted('fill', shape.colour)}"
        )
        return f"{head}><title>{markup_text(shape.hover)}</title></rect>" if shape.hover else f"{head}/>"
    if isinstance(shape, Line):
        dashes = ' stroke-dasharray="4 3"' if shape.dashed else ""
        return (
            f'<line x1="{shape.x1:.1f}" y1="{shape.y1:.1f}" x2="{shape.x2:.1f}" y2="{shape.y2:.1f}"{dashes} '
            f"{painted('stroke', shape.colour)}/>"
        )
    if isinstance(shape, Curve):
        dashes = ' stroke-dasharray="4 3"' if shape.dashed else ""
        path = "".join(f"{'L' if i else 'M'}{x:.1f},{y:.1f}" for i, (x, y) in enumerate(shape.points))
        return f'<path d="{path}" fill="none" stroke-width="1.8"{dashes} {painted("stroke", shape.colour)}/>'
    if isinstance(shape, Dot):
        place = f'cx="{shape.x:.1f}" cy="{shape.y:.1f}" r="{shape.radius:g}"'
        return f'<circle {place} fill-opacity="0.55" {painted("fill", shape.colour)}/>'
    return _words(shape, painted)


def _words(words: Words, painted: Callable[[str, str], str]) -> str:
    weight = ' font-weight="600"' if words.bold else ""
    return (
        f'<text x="{words.x:.1f}" y="{words.y:.1f}" font-size="{words.size}" text-anchor="{words.anchor}"{weight} '
        f"{painted('fill', words.colour)}>{markup_text(words.text)}</text>"
    )
