"""Printing to a terminal: text is text. Only markup of our own counts, and nothing of others' acts."""

from __future__ import annotations

import os
from typing import Any

from rich.console import Console
from rich.text import Text

from wan_loader.printable import printable, printable_lines
from wan_loader.tables import folded

__all__ = ["PlainConsole", "marked"]

#: Where nobody looks at once: lines of files and pipes stay whole, as `grep` likes them.
_UNLIMITED = 10_000


class PlainConsole(Console):
    """A console for strings as they are: no markup, controls as escapes, line breaks kept (see `marked`).

    On a terminal, and wherever COLUMNS says how wide it is to be, lines are folded between words. Elsewhere they have
    the length that they have.
    """

    def __init__(self, *, stderr: bool = False) -> None:
        super().__init__(stderr=stderr, highlight=False, soft_wrap=True, markup=False, emoji=False)
        # rich knows how wide a notebook is
        if not (self.is_terminal or self.is_jupyter or os.environ.get("COLUMNS", "").isdigit()):
            self.width = _UNLIMITED

    def render_str(self, text: str, **options: Any) -> Text:
        """Make a `Text` of a string, as rich does of each that it is given."""
        return super().render_str(printable_lines(text), **options)

    def print(self, *objects: Any, **options: Any) -> None:
        """Print as rich does, with lines of text folded between words; with `no_wrap` they stay whole."""
        things = [self.render_str(thing) if isinstance(thing, str) else thing for thing in objects]
        if not options.get("no_wrap"):
            things = [folded(thing, self.width) if isinstance(thing, Text) else thing for thing in things]
        super().print(*things, **options)


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
