"""Taking staged checkpoints away again: exactly what `stage` put there, by its journal, and nothing else."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from wan_loader.errors import MissingFileError, OutputError, WanLoaderError
from wan_loader.stage_copy.entry import Entry, entries

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


def unstage(directory: StrPath, source: StrPath | None = None) -> Unstaged:
    """Remove what was staged to `directory`, or only the copy of `source`; also what a killed run left.

    `source` need not exist any more: the record of the copy says what it was made from. Raises `MissingFileError` where
    nothing (of it) is staged, `OutputError` for what cannot be removed and where its name stands for something else.
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
                if source is not None and not _is_copy(entry, source):
                    continue
                count, size, changed = _remove(entry)
                n_files, nbytes, kept = n_files + count, nbytes + size, kept + changed
                names.append(entry.manifest.name if entry.manifest else "an unfinished copy")
    except WanLoaderError:
        raise
    except OSError as error:
        raise OutputError(f"{error.filename or directory} cannot be removed: {error.strerror}") from error
    if not names:
        raise _nothing(place, source)
    return Unstaged(tuple(names), nbytes, n_files, tuple(kept))


def _is_copy(entry: Entry, source: StrPath) -> bool:
    """Whether the entry was made from `source`. Raises `OutputError` for another source of the same name."""
    given = os.path.abspath(source)
    if entry.manifest is None or entry.manifest.name != os.path.basename(given):
        return False
    made_from = entry.manifest.source
    if made_from != given and os.path.realpath(made_from) != os.path.realpath(given):
        raise OutputError(
            f"{entry.directory / entry.manifest.name} is no copy of {given}: it was staged from {made_from}; "
            "name that to remove it"
        )
    return True


def _nothing(directory: Path, source: StrPath | None) -> WanLoaderError:
    if source is None:
        return MissingFileError(f"nothing is staged in {directory}")
    copy = directory / os.path.basename(os.path.abspath(source))
    if os.path.lexists(copy):
        return OutputError(f"{copy} was not made by `stage`, and stays: delete it by hand if it is not needed")
    return MissingFileError(f"no copy of {source} is staged in {directory}")


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
