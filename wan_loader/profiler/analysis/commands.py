"""The lines to type instead of those that were: how a profiled program is started with something of ours. Pure."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

from wan_loader.profiler.analysis.roles import script_words

__all__ = ["Program", "fits", "joined"]

#: How the programs are called that this package brings.
_OURS = ("wan-loader", "wan-pipeline")
_SIZES = ("--nproc_per_node", "--nproc-per-node")
#: What torchrun takes without a value of its own and changes nothing of one machine's group.
_PLAIN = ("--standalone",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """A command line that was profiled, and what is known of how it ran."""

    argv: tuple[str, ...] = ()
    own_python: bool = True
    """True if its Python is the one that `wan-loader run` has."""
    directory: str = ""
    """The directory in which it was started."""
    inside: bool = False
    """True if it is a part of a process that goes on, such as a notebook's cell."""
    loads_in_children: bool = False
    """True if processes that the first one started have opened the weights."""

    @property
    def script(self) -> tuple[str, ...]:
        """The script or `-m MODULE` with its arguments; empty if it is something else, or has options for Python."""
        return script_words(self.argv) if self.own_python else ()

    @property
    def is_ours(self) -> bool:
        """True if it is a command of this package already."""
        module = self.script[1].partition(".")[0] if self.script[:1] == ("-m",) and self.script[1:] else ""
        names = [word.rpartition("/")[2] for word in (*self.argv[:1], *self.script[:1])]
        return any(name in _OURS for name in (*names, module.replace("_", "-")))

    @property
    def generates(self) -> bool:
        """True if it is `wan-pipeline generate`."""
        words = [w.rpartition("/")[2].replace("_", "-") for w in self.argv]
        return self.is_ours and "wan-pipeline" in words and "generate" in words

    def typed(self) -> str:
        """Return it as it was typed."""
        return shlex.join(self.argv)

    def under_run(self, *options: str) -> str:
        """Return the line that starts it with the fast path; "" where there is none."""
        if self.inside or self.is_ours or not self.argv:
            return ""
        run = ("wan-loader", "run", *options)
        if self.script and not self.loads_in_children:
            return shlex.join((*run, *self.script))
        return shlex.join((*run, "--", *self.argv))

    def forked(self) -> str:
        """Return the line that starts it as a fork of the stand-by server; "" where there is none."""
        if self.inside or not self.argv:
            return ""
        if self.is_ours:
            return self.typed() if self.generates or "run" in self.argv else ""
        if self.script:
            return shlex.join(("wan-loader", "run", *self.script))
        n, words = _ranks(self.argv)
        return shlex.join(("wan-loader", "run", "--nproc", n, *words)) if n else ""

    def with_option(self, *words: str) -> str:
        """Return it with further arguments."""
        return shlex.join((*self.argv, *words))

    def value_of(self, option: str) -> str:
        """Return what follows an option, also after =, or written with hyphens; "" if it is not there."""
        for word, following in zip(self.argv, (*self.argv[1:], ""), strict=True):
            name, equals, value = word.partition("=")
            if name.startswith("--") and name.replace("-", "_") == option.replace("-", "_"):
                return value if equals else following
        return ""

    def with_path(self, path: str, other: str) -> str:
        """Return it with another path in the place of one; "" if that is not among its words."""
        return shlex.join(other if w == path else w for w in self.argv) if path in self.argv else ""


def fits(one: str, other: str) -> bool:
    """Say whether two lines can be followed together: one of them is none, or they differ in `--keep` alone."""
    return not (one and other) or _without_keep(one) == _without_keep(other)


def joined(commands: Iterable[str]) -> str:
    """Return the line that follows all of several lines that fit; "" if there is none."""
    return max(commands, key=len, default="")


def _without_keep(command: str) -> list[str]:
    return [word for word in shlex.split(command) if word != "--keep"]


def _ranks(argv: tuple[str, ...]) -> tuple[str, tuple[str, ...]]:
    """Return how many processes torchrun starts on this machine, and of what; "" if it is told anything else."""
    if not argv or argv[0].rpartition("/")[2] != "torchrun":
        return "", ()
    n, words = "1", list(argv[1:])
    while words and words[0].startswith("-"):
        name, _, value = words.pop(0).partition("=")
        if name in _SIZES and (value or words):
            n = value or words.pop(0)
        elif name not in _PLAIN:
            return "", ()
    return (n, tuple(words)) if n.isdigit() and words and words[0].endswith(".py") else ("", ())
