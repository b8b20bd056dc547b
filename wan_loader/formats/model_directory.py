"""Directories of several checkpoints, such as that of a whole model: which parts one has, and in which order.

What is certain follows from structure alone: each file, index, set of shards, or subdirectory that holds just one, is
a part, and parts come in the order of their names. What the parts are called, which is used first, and what is missing
knows the model's family, if one has joined (entry points of the group `wan_loader.models`, functions
`recognise(directory: str) -> ModelDirectory | None`). Nothing here knows a model's name.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, cast

from wan_loader.entry_points import first_answer
from wan_loader.errors import WanLoaderError
from wan_loader.formats.directory import examined, look_into
from wan_loader.formats.file_names import is_index_name, stem_of

if TYPE_CHECKING:
    from wan_loader.formats.directory import Candidate

__all__ = [
    "MissingFile",
    "ModelDirectory",
    "ModelPart",
    "candidates_below",
    "known_model",
    "parts_in",
    "recognise_model",
]

_MAX_SEEN = 1000
_MAX_DEPTH = 3


@dataclass(frozen=True, slots=True)
class ModelPart:
    """One checkpoint of a model, there or not."""

    name: str
    """The name that the family gives it."""
    path: str
    """Its file, index, set of shards or subdirectory, below the model's directory, with slashes."""
    title: str
    """The name for people."""

    def holds(self, relative: str) -> bool:
        """Say whether a file below the model's directory belongs to it."""
        if relative == self.path or relative.startswith(f"{self.path}/"):
            return True
        folder, _, name = self.path.rpartition("/")
        beside, _, file = relative.rpartition("/")
        if beside != folder:
            return False
        if is_index_name(name):
            return stem_of(file) == stem_of(name)
        head, star, tail = name.partition("*")  # of a set of shards: the place of the number
        return bool(star) and file.startswith(head) and file.endswith(tail)


@dataclass(frozen=True, slots=True)
class MissingFile:
    """A file that is not there, or not all of it."""

    path: str
    """The place below the model's directory; ends in a slash for a whole directory."""
    nbytes: int | None = None
    """Its length; None where that is not known."""
    nbytes_here: int = 0
    """The bytes of it that have been downloaded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelDirectory:
    """A model's directory, complete or not, as its family knows it."""

    family: str
    """The model's name, for people."""
    layout: str
    """The family's name for this arrangement of files."""
    parts: tuple[ModelPart, ...]
    """The holders of weights, in the order of first use."""
    missing: tuple[MissingFile, ...] = ()
    problems: tuple[tuple[str, str], ...] = ()
    """Names of what is damaged beside the weights (a configuration, an index), each with what is wrong."""
    repository: str | None = None
    """The hub's repository from which it was downloaded, where that is known."""
    revision: str | None = None
    download_from: str | None = None
    """A repository from which `wan-loader download` gets what is missing."""

    def rank(self, relative: str) -> int:
        """Say when a file below the directory is needed: 0 for what belongs to no part, then parts by first use."""
        return next((rank for rank, part in enumerate(self.parts, 1) if part.holds(relative)), 0)


def recognise_model(directory: str) -> ModelDirectory | None:
    """Ask the families of models what a directory is; None where none knows it.

    Raises:
        WanLoaderError: One knows it and cannot say more, as something in it is damaged.
    """
    return cast("ModelDirectory | None", first_answer("wan_loader.models", directory))


def known_model(directory: str) -> ModelDirectory | None:
    """Ask as `recognise_model` does, where an answer helps and none is no error."""
    with contextlib.suppress(WanLoaderError, OSError):
        return recognise_model(directory)
    return None


def parts_in(directory: str) -> list[str]:
    """Return the checkpoints in a directory and in its subdirectories: paths, each of which is one."""
    own = look_into(directory, by_content=False).candidates
    return [os.path.join(directory, choice.name) for choice in [*candidates_below(directory), *own]]


def candidates_below(directory: str) -> list[Candidate]:
    """Return the checkpoints in the subdirectories, three levels down: one that holds just one stands for it."""
    choices: list[Candidate] = []
    seen: set[str] = set()
    # limited: somebody may name the root of a disk
    for path, names, _ in islice(os.walk(directory, followlinks=True), _MAX_SEEN):
        name = os.path.relpath(path, directory)
        names[:] = sorted(n for n in names if not n.startswith(".")) if name.count(os.sep) < _MAX_DEPTH - 1 else []
        if (real := os.path.realpath(path)) in seen:  # a link to what holds it, or to what was listed
            names[:] = []
            continue
        seen.add(real)
        if path == directory:
            continue
        with contextlib.suppress(OSError):  # not for us to read
            found = look_into(path, by_content=False).candidates
            choices += [
                replace(examined(path, candidate), name=name if len(found) == 1 else f"{name}/{candidate.name}")
                for candidate in found
            ]
            names[:] = [] if found else names
    return choices
