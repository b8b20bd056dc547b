"""Tables and lines of text for a terminal of any width: the one place where they are fitted.

Nothing is broken off in the middle of a word. Where the width is too little, long cells lose their middle first, down
to what their column allows; then columns are left out, in the order that the table gives, and a line below names them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from rich.cells import cell_len
from rich.text import Text

from wan_loader.printable import ends, printable, shorten

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from rich.console import Console, ConsoleOptions

__all__ = ["Cell", "Column", "Columns", "cut", "fit", "folded"]

#: Text as it is, what `marked` makes, or a drawing that is told its width.
Cell: TypeAlias = "str | Text | Callable[[int], str]"

_GAP = 2
_WORDS = re.compile(r"\S+")
#: What is quoted is one word.
_SHELL_WORDS = re.compile(r"""(?:[^\s'"\\]|\\.|'[^']*'|"(?:[^"\\]|\\.)*"|['"])+""")


@dataclass(frozen=True, slots=True)
class Column:
    """A column: its title, and what becomes of it where there is little room."""

    title: str
    right: bool = False
    """Cells end below each other, as numbers should."""
    drop: int = 0
    """Among columns that can be left out the lowest go first, together where they are alike; 0: it always stays."""
    least: int | None = None
    """Cells may be shortened to so many characters; None: they stay whole. Drawings have at least so many."""
    most: int | None = None
    """What cells get at most, however much room there is."""
    folds: bool = False
    """Cells are folded between words instead of shortened: for sentences."""


@dataclass(frozen=True, slots=True)
class _Row:
    cells: tuple[Cell, ...]
    style: str


class Columns:
    """A table without lines, whose cells are shown as they are, each in one line."""

    def __init__(self, *columns: Column | str, show_header: bool = True) -> None:
        self.columns = [Column(column) if isinstance(column, str) else column for column in columns]
        self.rows: list[_Row] = []
        self.show_header = show_header

    def add_row(self, *cells: Cell, style: str | None = None) -> None:
        """Add a row, one cell for each column; those that are left out at the end are empty."""
        shown = tuple(printable(cell) if isinstance(cell, str) else cell for cell in cells)
        self.rows.append(_Row(shown + ("",) * (len(self.columns) - len(cells)), style or ""))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        """Yield the lines, fitted to the width."""
        widths = fit(self.columns, [self._natural(i) for i in range(len(self.columns))], options.max_width)
        if self.show_header:
            yield self._line({i: Text(self.columns[i].title) for i in widths}, widths, "bold")
        for row in self.rows:
            lines = {i: self._lines(row.cells[i], i, width) for i, width in widths.items()}
            for n in range(max(map(len, lines.values()))):
                yield self._line({i: texts[n] for i, texts in lines.items() if n < len(texts)}, widths, row.style)
        left_out = [column.title for i, column in enumerate(self.columns) if i not in widths]
        if left_out:
            yield Text(f"no room for: {', '.join(left_out)}", style="dim", overflow="ignore", no_wrap=True)

    def _natural(self, i: int) -> int:
        """Return the width that a column would like to have."""
        cells = [row.cells[i] for row in self.rows]
        column = self.columns[i]
        drawn = any(callable(cell) for cell in cells)
        wanted = [column.most or 0] if drawn else [cell_len(_plain(cell)) for cell in cells]
        title = cell_len(column.title) if self.show_header else 0
        return max(title, min(max(wanted, default=0), column.most or max(wanted, default=0)))

    def _lines(self, cell: Cell, i: int, width: int) -> list[Text]:
        if callable(cell):
            return [Text(cell(width))]
        text = Text(cell) if isinstance(cell, str) else cell
        return list(folded(text, width).split("\n")) if self.columns[i].folds else [cut(text, width)]

    def _line(self, texts: dict[int, Text], widths: dict[int, int], style: str) -> Text:
        parts: list[Text | str] = []
        for i, width in widths.items():
            text = texts.get(i, Text())
            space = " " * (width - cell_len(text.plain))
            parts += [" " * _GAP] if parts else []
            parts += [space, text] if self.columns[i].right else [text, space]
        line = Text.assemble(*parts, style=style, overflow="ignore", no_wrap=True)
        line.rstrip()
        return line


def fit(columns: Sequence[Column], natural: Sequence[int], width: int) -> dict[int, int]:
    """Choose the columns that are shown, and their widths. Pure.

    Args:
        columns: All columns.
        natural: The width that each would like to have.
        width: What there is for all of them, with two characters between neighbours.

    Returns:
        The places of the chosen ones in order, each with its width. More than `width` in all only where what must stay
        is wider.
    """
    least = [size if c.least is None else min(size, max(c.least, 1)) for c, size in zip(columns, natural, strict=True)]
    kept = list(range(len(columns)))
    while (room := width - sum(least[i] + _GAP for i in kept) + _GAP) < 0:
        going = [i for i in kept if columns[i].drop]
        if not going:
            break
        first = min(columns[i].drop for i in going)
        kept = [i for i in kept if columns[i].drop != first]
    widths = {i: least[i] for i in kept}
    for _ in range(max(0, room)):
        # what is shortened most gets the next character
        short = max(kept, key=lambda i: natural[i] - widths[i], default=None)
        if short is None or widths[short] == natural[short]:
            break
        widths[short] += 1
    return widths


def cut(text: Text, width: int) -> Text:
    """Return a text of one line in at most `width` columns: what is longer loses its middle."""
    if cell_len(text.plain) <= width:
        return text
    most = min(width, len(text.plain))
    while most > 1 and cell_len(shorten(text.plain, most)) > width:
        most -= 1
    head, tail = ends(most)
    return Text.assemble(text[:head], "…", text[len(text.plain) - tail :] if tail else "")


def folded(text: Text, width: int) -> Text:
    """Fold lines between words to `width` columns; a word that is longer loses its middle.

    What follows is indented further than the line is, or as the text behind the number of a list. A command, behind
    "$ ", still is the same command when it is copied: its lines end with a backslash, and its words stay whole.
    """
    lines = [part for line in text.split("\n", allow_blank=True) for part in _fold(line, width)]
    return Text("\n", style=text.style).join(lines)


def _fold(line: Text, width: int) -> list[Text]:
    if cell_len(line.plain) <= width:
        return [line]
    start = re.match(r" *(\d+\. |\$ )?", line.plain)
    assert start is not None
    is_command = start[1] == "$ "
    begin, hanging = start.end(), start.end() + (0 if start[1] else 2)
    words, ending = (_SHELL_WORDS, " \\") if is_command else (_WORDS, "")
    lines, current, end = list[Text](), line[:begin], begin
    for word in words.finditer(line.plain, begin):
        a, b = word.span()
        shown, gap = line[a:b] if is_command else cut(line[a:b], width - hanging), line[end:a]
        if end > begin and cell_len(current.plain + gap.plain + shown.plain + ending) > width:
            lines.append(current + Text(ending))
            current, gap = Text(" " * hanging), Text()
        current, end = current + gap + shown, b
    return [*lines, current]


def _plain(cell: Cell) -> str:
    return cell.plain if isinstance(cell, Text) else cell if isinstance(cell, str) else ""
