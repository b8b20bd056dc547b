"""Printing to a terminal: text is text. Only markup of our own counts, and nothing of others' acts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from wan_loader.printable import printable, printable_lines

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["Columns", "PlainConsole", "marked"]


class PlainConsole(Console):
    """A console for strings as they are: no markup, controls as escapes, line breaks kept (see `marked`)."""

    def __init__(self, *, stderr: bool = False) -> None:
        super().__init__(stderr=stderr, highlight=False, soft_wrap=True, markup=False, emoji=False)

    def render_str(self, text: str, **options: Any) -> Text:
        """Make a `Text` of a string, as rich does of each that it is given."""
        return super().render_str(printable_lines(text), **options)


class Columns(Table):
    """A table without lines, whose cells are shown as they are, each in one line."""

    def __init__(self, *headers: str, show_header: bool = True) -> None:
        super().__init__(*headers, box=None, pad_edge=False, header_style="bold", show_header=show_header)

    def add_row(self, *cells: RenderableType | None, style: Any = None, end_section: bool = False) -> None:
        """Add a row of strings, or of what `marked` makes."""
        shown = (Text(printable(cell)) if isinstance(cell, str) else cell for cell in cells)
        super().add_row(*shown, style=style, end_section=end_section)


def marked(template: str, *values: object) -> Text:
    """Put values into a template of rich's markup, each in place of a `{}`; they are shown as they are, in one line."""
    parts, rest = [], Text.from_markup(template, emoji=False)
    for value in values:
        at = rest.plain.index("{}")
        before, hole, rest = rest.divide([at, at + 2])
        shown = Text(printable(str(value)))
        for span in hole.spans:
            shown.stylize(span.style)
        parts += [before, shown]
    return Text.assemble(*parts, rest)
