"""Taking staged checkpoints away again: exactly what `stage` put there, by its journal, and nothing else."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from wan_loader.errors import MissingFileError, OutputError, WanLoaderError
from wan_loader.tiers.entry import Entry, entries

if TYPE_CHECKING:
    from wan_loader.types import StrPath

__all__ = ["Unstaged", "unstage"]


@dataclass(frozen=True, slots=True)
class Unstaged:
    """What was removed."""

    names: tuple[str, ...]
    nbytes: int
    n_files: int
    kept: tuple[str, ...]
    """Files that have changed since they were staged: they are no longer ours."""


def unstage(directory: StrPath, name: str | None = None) -> Unstaged:
    """Remove what was staged to `directory`, or only what has this name there; also what a killed run left.

    Raises `MissingFileError` where nothing (of that name) is staged, `OutputError` for what cannot be removed.
    """
    place = Path(directory)
    if not place.is_dir():
        raise MissingFileError(f"{directory} is not a directory: nothing is staged there")
    names: list[str] = []
    kept: list[str] = []
    n_files = nbytes = 0
    try:
        for entry in entries(place.resolve()):
            with entry:
                found = entry.manifest.name if entry.manifest else None
                if name is not None and found != name:
                    continue
                count, size, changed = _remove(entry)
                n_files, nbytes, kept = n_files + count, nbytes + size, kept + changed
                names.append(found or "an unfinished copy")
    except WanLoaderError:
        raise
    except OSError as error:
        raise OutputError(f"{error.filename or directory} cannot be removed: {error.strerror}") from error
    if not names:
        raise MissingFileError(f"nothing{f' named {name}' if name else ''} is staged in {directory}")
    return Unstaged(tuple(names), nbytes, n_files, tuple(kept))


def _remove(entry: Entry) -> tuple[int, int, list[str]]:
    count = size = 0
    kept: list[str] = []
    for path, (_, nbytes, _) in sorted(entry.placed.items()):
        target = entry.directory / path
        if entry.owns(path):
            os.unlink(target)
            count, size = count + 1, size + nbytes
        elif os.path.lexists(target):
            kept.append(str(target))
    for part in entry.home.glob("*.part"):
        size += os.stat(part).st_blocks * 512
    for made in sorted(set(entry.made), key=len, reverse=True):
        with contextlib.suppress(OSError):  # not empty: something else is there, too
            (entry.directory / made).rmdir()
    entry.remove()
    return count, size, kept
