r"""Text of others as it may be shown: names of files and tensors, words of saved documents, answers of servers.

Such text may hold what a terminal or a page acts upon: escape sequences, line breaks that forge a line of ours, marks
that turn the direction of writing around, halves of surrogate pairs that cannot be encoded. All of it is shown as
Python writes it in a string: `\x1b`, `\n`, `\u202e`, `\udcff`.
"""

from __future__ import annotations

import html

__all__ = ["markup_text", "printable", "printable_lines"]


def printable(text: str) -> str:
    """Return `text` with every character escaped that is not plainly visible, line breaks and tabs too."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def printable_lines(text: str) -> str:
    """Return `text` as `printable` does, with its line breaks left: for text of ours that has several lines."""
    return "\n".join(map(printable, text.split("\n")))


def markup_text(text: str) -> str:
    """Return `text` as `printable` does, escaped for HTML and SVG."""
    return html.escape(printable(text))
