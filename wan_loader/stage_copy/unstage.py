"""Removal of staged checkpoints: exactly what `stage` put there, by its journal, and nothing else."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from wan_loader.errors import MissingFileError, OutputError, WanLoaderError
from wan_loader.stage_copy.journal import StageEntry, entries

if TYPE_CHECKING:
    from wan_loader.types import StrPath

__all__ = ["Unstaged", "unstage"]


@dataclass(frozen=True, slots=True)
class Unstaged:
    """The result of a removal."""

    names: tuple[str, ...]
    nbytes: int
    n_files: int
    kept: tuple[str, ...]
    """Files that have changed since they were staged: they are no longer ours."""


def unstage(directory: StrPath, source: StrPath | None = None) -> Unstaged:
    """Remove what was staged to `directory`, or only the copy of `source`; also what a killed run left.

    Args:
        directory: The directory that was staged to.
        source: It need not exist any more: the record of the copy says what it was made from.

    Raises:
        MissingFileError: Nothing (of it) is staged.
        OutputError: Something cannot be removed, or the name stands for something else.
    """
    place = Path(directory)
    if not place.is_dir():
        raise MissingFileError.because("is not a directory: nothing is staged there", path=directory)
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
        raise OutputError.because(f"cannot be removed: {error.strerror}", path=error.filename or directory) from error
    if not names:
        raise _nothing(place, source)
    return Unstaged(tuple(names), nbytes, n_files, tuple(kept))


def _is_copy(entry: StageEntry, source: StrPath) -> bool:
    """Return whether the entry was made from `source`.

    Raises:
        OutputError: The entry has the same name and another source.
    """
    given = os.path.abspath(source)
    if entry.manifest is None or entry.manifest.name != os.path.basename(given):
        return False
    made_from = entry.manifest.source
    if made_from != given and os.path.realpath(made_from) != os.path.realpath(given):
        raise OutputError.because(
            f"is no copy of {given}: it was staged from {made_from}",
            "name that to remove it",
            path=entry.directory / entry.manifest.name,
        )
    return True


def _nothing(directory: Path, source: StrPath | None) -> WanLoaderError:
    if source is None:
        return MissingFileError(f"nothing is staged in {directory}", path=directory, reason="nothing is staged")
    copy = directory / os.path.basename(os.path.abspath(source))
    if os.path.lexists(copy):
        return OutputError.because(
            "was not made by `stage`, and stays", "delete it by hand if it is not needed", path=copy
        )
    reason = f"no copy of {source} is staged"
    return MissingFileError(f"{reason} in {directory}", path=directory, reason=reason)


def _remove(entry: StageEntry) -> tuple[int, int, list[str]]:
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
    # the deepest first, so that those above it become empty
    for made in sorted(set(entry.made), key=len, reverse=True):
        with contextlib.suppress(OSError):  # not empty: something else is there, too
            (entry.directory / made).rmdir()
    entry.remove()
    return count, size, kept
