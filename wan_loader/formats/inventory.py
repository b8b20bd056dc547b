"""The checkpoints of a directory, opened: those that are there by structure, or all parts that a known model has.

Reads headers, indexes and what a model's family reads to recognise it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from wan_loader.errors import CheckpointError
from wan_loader.formats.hub_cache import locate
from wan_loader.formats.model_directory import known_model, parts_in, recognise_model
from wan_loader.formats.opening import open_checkpoint

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from wan_loader.formats.checkpoint_facts import Checkpoint
    from wan_loader.formats.model_directory import MissingFile, ModelDirectory
    from wan_loader.types import StrPath

__all__ = ["Inventory", "checkpoint_paths", "checkpoints_in", "take_inventory"]


@dataclass(frozen=True, slots=True)
class Inventory:
    """The parts of a known model that are there, and those that are damaged."""

    model: ModelDirectory
    parts: Mapping[str, Checkpoint]
    """Parts that can be opened, by name, in the order of first use."""
    damaged: tuple[tuple[str, str], ...]
    """Part and what is wrong with it, where no file is missing."""

    @property
    def complete(self) -> bool:
        """True if all parts are there and can be opened."""
        return not self.model.missing and not self.damaged


def checkpoints_in(path: StrPath, part: str | None = None) -> list[Checkpoint]:
    """Open the checkpoint at a path, or those of a directory with several.

    They come in the order of their names, or, of a known model, of their first use.

    Args:
        path: The checkpoint or directory, as for `open_checkpoint`.
        part: The part of the one checkpoint at the path, as for `open_checkpoint`.
    """
    try:
        return [open_checkpoint(path, part=part)]
    except CheckpointError:
        if part is not None or not os.path.isdir(directory := locate(os.fspath(path))):
            raise
        if not (found := _in_order(directory)):
            raise
    return [open_checkpoint(one) for one in found]


def checkpoint_paths(path: StrPath) -> list[str]:
    """Return the path itself if it names one checkpoint, else those of a directory with several.

    Args:
        path: As for `checkpoints_in`. What is none is for whoever opens it to refuse.
    """
    try:
        open_checkpoint(path)
    except CheckpointError:
        if os.path.isdir(directory := locate(os.fspath(path))):
            return _in_order(directory) or [os.fspath(path)]
    return [os.fspath(path)]


def _in_order(directory: str) -> list[str]:
    """Return the checkpoints of a directory, of a known model in the order of first use."""
    found, model = parts_in(directory), known_model(directory)
    return sorted(found, key=lambda one: model.rank(os.path.relpath(one, directory))) if model else found


def take_inventory(path: StrPath) -> Inventory | None:
    """Look through a model's directory; None for what no family knows (one part's directory, for instance).

    Args:
        path: The directory, as for `open_checkpoint`.

    Raises:
        CheckpointError: The hub's cache does not hold the repository.
    """
    directory = locate(os.fspath(path))
    if not os.path.isdir(directory) or (model := recognise_model(directory)) is None:
        return None
    parts: dict[str, Checkpoint] = {}
    damaged = list(model.problems)
    for part in model.parts:
        # said once, as missing; opening it would say it again, as damage
        if _lacks_files(part.path, model.missing):
            continue
        try:
            parts[part.name] = open_checkpoint(os.path.join(directory, part.path))
        except CheckpointError as error:
            damaged.append((part.name, str(error)))
    return Inventory(model, parts, tuple(damaged))


def _lacks_files(path: str, missing: Iterable[MissingFile]) -> bool:
    folder = path.rpartition("/")[0] if path.endswith(".json") else path
    return any(file.path == path or file.path.startswith(f"{folder}/") for file in missing)
