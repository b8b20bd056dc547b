"""What tests need to know of a Markdown page: its headings, its blocks of code, and the commands in these."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Block:
    """A block of code."""

    page: str
    line: int
    """The line of the page that its first line is."""
    language: str
    text: str

    def __str__(self):
        return f"{self.page}:{self.line}"

    def without_comments(self):
        """Return its lines without what stands behind a `#`, which may be in another language."""
        return [re.sub(r"\s+#.*$", "", line) for line in self.text.splitlines()]

    def commands(self):
        """Return the words of each command behind a `$`; a backslash at the end of a line goes on in the next."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [shlex.split(line[2:], comments=True) for line in lines if line.startswith("$ ")]


def text_of(page):
    """Return a page by its name from the repository's root."""
    return (ROOT / page).read_text()


def blocks(page):
    """Return all blocks of code of a page, in order."""
    text = text_of(page)
    found = re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [Block(page, text[: match.start(2)].count("\n") + 1, match[1], match[2]) for match in found]


def prose(page):
    """Return a page without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", text_of(page), flags=re.MULTILINE | re.DOTALL)


def headings(page):
    """Return (level, text) of each heading, in order."""
    return [(len(level), text) for level, text in re.findall(r"^(#+) (.+)$", prose(page), re.MULTILINE)]


def links(page):
    """Return what a page links to, images too."""
    return re.findall(r"\]\(([^)\s]+)\)", prose(page))
