"""What a model's directory holds and what is missing of it, by name. Reads headers, indexes and our own state only."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from wan_loader import CheckpointError, open_checkpoint
from wan_loader.formats import locate
from wan_pipeline.hub.layouts import layout_of, missing_files, parts_of
from wan_pipeline.hub.state import read_state

if TYPE_CHECKING:
    from wan_loader import Checkpoint
    from wan_pipeline.hub.layouts import Layout
    from wan_pipeline.hub.state import State

__all__ = ["Absent", "Inventory", "take_inventory"]


@dataclass(frozen=True, slots=True)
class Absent:
    """A file that is not there, or not all of it."""

    path: str
    """Below the model's directory; ends in a slash for a whole directory."""
    nbytes: int | None
    """Its length; None where that is not known."""
    nbytes_here: int
    """How much of it has been downloaded."""


@dataclass(frozen=True, slots=True)
class Inventory:
    """Of one directory."""

    layout: Layout
    repository: str | None
    """Where it is downloaded from; None where wan-loader did not download it."""
    revision: str | None
    parts: dict[str, Checkpoint]
    """Parts that can be opened, in the order of first use."""
    absent: tuple[Absent, ...]
    damaged: tuple[tuple[str, str], ...]
    """Part and what is wrong with it, where no file is missing."""
    has_two_experts: bool
    """T2V-A14B has; TI2V-5B has one transformer."""

    @property
    def complete(self) -> bool:
        return not self.absent and not self.damaged


def take_inventory(root: Path) -> Inventory | None:
    """Look through a model's directory; None for a directory that is not one (one component's, for instance).

    root: as for `open_checkpoint`. Raises `CheckpointError` for a repository that the hub's cache does not hold.
    """
    root = Path(locate(os.fspath(root)))
    if not os.path.isdir(root):
        return None
    state = read_state(root)
    layout = state.layout if state else layout_of(root)
    if layout is None:
        return None
    absent, damaged = (_absent(state), []) if state else _absent_by_layout(root, layout)
    parts: dict[str, Checkpoint] = {}
    expected = _parts(root, layout)
    for name, below in expected.items():
        if any(_is_within(missing.path, below) for missing in absent):
            continue
        try:
            parts[name] = open_checkpoint(root / below)
        except CheckpointError as error:
            damaged.append((name, str(error)))
    return Inventory(
        layout=layout,
        repository=state.repository if state else None,
        revision=state.revision if state else None,
        parts=parts,
        absent=tuple(absent),
        damaged=tuple(damaged),
        has_two_experts="transformer_2" in expected,
    )


def _parts(root: Path, layout: Layout) -> dict[str, str]:
    try:
        return parts_of(root, layout)
    except CheckpointError:  # reported as missing or damaged
        return {}


def _is_within(missing: str, part: str) -> bool:
    folder = part.rpartition("/")[0] if part.endswith(".json") else part
    return missing == part or missing.startswith(f"{folder}/")


def _absent(state: State) -> list[Absent]:
    found = []
    for file in state.files:
        try:
            here = os.stat(state.target(file)).st_size
        except OSError:
            try:
                here = os.stat(state.part(file)).st_size
            except OSError:
                here = 0
            found.append(Absent(file.path, file.nbytes, here))
            continue
        if here != file.nbytes:
            found.append(Absent(file.path, file.nbytes, min(here, file.nbytes)))
    return found


def _absent_by_layout(root: Path, layout: Layout) -> tuple[list[Absent], list[tuple[str, str]]]:
    try:
        return [Absent(path, None, 0) for path in missing_files(root, layout)], []
    except CheckpointError as error:
        return [], [("configuration", str(error))]
    except OSError as error:  # nothing can be said about what is missing
        raise CheckpointError(f"{error.filename} cannot be read: {error.strerror}") from error
