"""The one checkpoint that a directory stands for, or the error that says what to name instead.

What such an error names can be opened as it stands: each path is one whole checkpoint.
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

from wan_loader.errors import CheckpointError, MissingFileError
from wan_loader.formats.directory import look_into
from wan_loader.formats.file_names import WEIGHT_SUFFIXES
from wan_loader.formats.foreign_files import other_directory, other_format, read_head

if TYPE_CHECKING:
    from collections.abc import Sequence

    from wan_loader.formats.directory import Candidate, Holding

__all__ = ["choose", "no_checkpoint"]

#: What a directory is that holds this.
_DIFFUSERS = "model_index.json"
_MAX_NAMED = 8
_MAX_SEEN = 1000


def choose(directory: str, pattern: str | None = None) -> tuple[Candidate, tuple[str, ...]]:
    """Return the one checkpoint in a directory, or among the names in it that match a pattern, and what was left out.

    Raises:
        CheckpointError: There are several, which it names, or the one cannot be opened.
        MissingFileError: There is none, or there are some in subdirectories only.
    """
    holding = look_into(directory, pattern)
    if len(holding.candidates) == 1:
        (only,) = holding.candidates
        if only.problem is not None:
            raise only.problem
        return only, holding.notes
    if pattern is not None and not holding.candidates:
        raise MissingFileError.because("does not exist", "check the path", path=os.path.join(directory, pattern))
    raise _not_one(directory, holding, with_subdirectories=pattern is None)


def no_checkpoint(directory: str) -> CheckpointError:
    """Return the error for a directory without any checkpoint: it tells what is there instead."""
    names = sorted(os.listdir(directory))
    if foreign := other_directory(set(names)):
        return CheckpointError.because(*foreign, path=directory)
    suffixes = ", ".join(f"*{suffix}" for suffix in WEIGHT_SUFFIXES)
    instead = _instead(directory, names)
    return MissingFileError.because(f"holds no checkpoint (*.index.json, {suffixes}){instead}", path=directory)


def _instead(directory: str, names: Sequence[str]) -> str:
    """Name the first thing in a directory that somebody may take for a checkpoint, and say what it is."""
    if training := look_into(directory, by_content=False).training_state:
        return f"; {training[0]} is what a training keeps beside the weights: name it, if it is what you want"
    for name in names[:_MAX_SEEN]:
        path = os.path.join(directory, name)
        with contextlib.suppress(OSError, CheckpointError):
            is_directory = os.path.isdir(path)
            foreign = other_directory(set(os.listdir(path))) if is_directory else other_format(path, read_head(path))
            if foreign is not None:
                return f"; {path} {foreign}"
    return ""


def _not_one(directory: str, holding: Holding, *, with_subdirectories: bool) -> CheckpointError:
    """Return the error that names the checkpoints in a directory and its subdirectories, when it holds not just one."""
    found = holding.candidates
    from wan_loader.formats.model_directory import candidates_below  # only errors need it

    below = candidates_below(directory) if with_subdirectories else []
    choices = [*below, *found]
    if not choices:
        return no_checkpoint(directory)
    what = f"holds {len(found)} checkpoints" if found else "holds checkpoints in subdirectories only"
    model = _model(directory)
    sound = [choice.name for choice in choices if choice.problem is None]
    broken = [choice.problem for choice in choices if choice.problem is not None]
    # one reason is enough, where naming another of them would not help
    if not (sound or below or model):
        return CheckpointError.because(f"{what}, and none of them can be opened: {broken[0]}", path=directory)
    notes = [f" ({len(broken)} of them cannot be opened: {broken[0]})"] if sound and broken else []
    notes += [" (* stands for the numbers of the shards: quote it in a shell)"] if any("*" in n for n in sound) else []
    paths = [os.path.join(directory, name) for name in sound or [choice.name for choice in choices]]
    paths[_MAX_NAMED:] = [f"and {len(paths) - _MAX_NAMED} more"] if len(paths) > _MAX_NAMED else []
    kind = CheckpointError if found else MissingFileError
    reason, remedy = f"{model or what}{''.join(notes)}", f"name one of its parts: {', '.join(paths)}"
    return kind.because(reason, remedy, path=directory)


def _model(directory: str) -> str | None:
    """Say that a directory is a whole model's, if it is one."""
    from wan_loader.formats.model_directory import known_model

    if os.path.lexists(os.path.join(directory, _DIFFUSERS)):
        return "is a diffusers model's directory"
    return f"is a {model.family} model's directory" if (model := known_model(directory)) is not None else None
