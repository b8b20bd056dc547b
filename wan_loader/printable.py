r"""Text of others as it may be shown: names of files and tensors, words of saved documents, answers of servers.

Such text may hold what a terminal or a page acts upon: escape sequences, line breaks that forge a line of ours, marks
that turn the direction of writing around, halves of surrogate pairs that cannot be encoded. All of it is shown as
Python writes it in a string: `\x1b`, `\n`, `\u202e`, `\udcff`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["ends", "markup_text", "printable", "printable_lines", "shorten", "shown_name", "some"]

_MAX_NAME = 120


def printable(text: str) -> str:
    """Return `text` with every character escaped that is not plainly visible, line breaks and tabs too."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def printable_lines(text: str) -> str:
    """Return `text` as `printable` does, with its line breaks left: for text of ours that has several lines."""
    return "\n".join(map(printable, text.split("\n")))


def markup_text(text: str) -> str:
    """Return `text` as `printable` does, escaped for HTML and SVG."""
    import html  # its table of entities takes a millisecond, which no load needs

    return html.escape(printable(text))


def shorten(text: str, width: int) -> str:
    """Cut the middle out of what is longer: paths and commands are told by their ends."""
    if len(text) <= width:
        return text
    head, tail = ends(width)
    return f"{text[:head]}…{text[len(text) - tail :]}"


def ends(width: int) -> tuple[int, int]:
    """Return how many characters stay before and behind the middle of a text that is shortened to `width`."""
    head = (width - 1) // 3
    return head, width - 1 - head


def shown_name(name: str) -> str:
    """Return a tensor's name as messages show it: printable, and cut where it is very long."""
    name = name if name.isprintable() else ascii(name)
    return name if len(name) <= _MAX_NAME else f"{name[:_MAX_NAME]}..."


def some(names: Sequence[str], most: int = 20) -> str:
    """Return a few names on one line, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(shown_name(name) for name in names[:most]) + more
