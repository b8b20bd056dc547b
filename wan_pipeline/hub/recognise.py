"""Recognises the directory of a model, and says what is missing of it, by name: the answer that `wan_loader` asks for.

Reads indexes, configurations and the state of a download only.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from wan_loader import CheckpointError, MissingFile, ModelDirectory, ModelPart
from wan_pipeline.families import FAMILIES
from wan_pipeline.hub.comfy_layout import comfy_parts
from wan_pipeline.hub.download_state import read_state
from wan_pipeline.hub.layouts import family_of, layout_of, missing_files, parts_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from wan_pipeline.hub.download_state import DownloadState
    from wan_pipeline.model_family import ComponentName, Layout, ModelFamily

__all__ = ["recognise"]


def recognise(directory: str) -> ModelDirectory | None:
    """Say what a directory is and what is missing of it; None for one that is no model's (one part's, for instance)."""
    root = Path(directory)
    state = read_state(root)
    layout = state.layout if state else layout_of(root)
    if layout is None:
        return _comfy(root)
    missing, problems = (_missing(state), ()) if state else _missing_by_layout(root, layout)
    family, paths = _family_and_paths(root, layout)
    return ModelDirectory(
        family=family.title,
        layout=layout,
        parts=_parts(family, paths),
        missing=missing,
        problems=problems,
        repository=state.repository if state else None,
        revision=state.revision if state else None,
        download_from=state.repository if state else family.repositories.get(layout),
    )


def _comfy(root: Path) -> ModelDirectory | None:
    """Say what ComfyUI's folders hold, where that is one model."""
    if (found := comfy_parts(root)) is None:
        return None
    family, paths = found
    return ModelDirectory(family=family.title, layout="comfy", parts=_parts(family, paths))


def _parts(family: ModelFamily, paths: Mapping[ComponentName, str]) -> tuple[ModelPart, ...]:
    return tuple(ModelPart(name, path, family[name].title) for name, path in paths.items())


def _family_and_paths(root: Path, layout: Layout) -> tuple[ModelFamily, dict[ComponentName, str]]:
    """Return the model, and where its parts are; no parts, where what is damaged keeps them from being known."""
    try:
        return family_of(root, layout), parts_of(root, layout)
    except CheckpointError:  # reported as missing or damaged
        return FAMILIES[0], {}


def _missing(state: DownloadState) -> tuple[MissingFile, ...]:
    found = []
    for file in state.files:
        try:
            here = os.stat(state.target(file)).st_size
        except OSError:
            try:
                here = os.stat(state.part(file)).st_size
            except OSError:
                here = 0
            found.append(MissingFile(file.path, file.nbytes, here))
            continue
        if here != file.nbytes:
            found.append(MissingFile(file.path, file.nbytes, min(here, file.nbytes)))
    return tuple(found)


def _missing_by_layout(root: Path, layout: Layout) -> tuple[tuple[MissingFile, ...], tuple[tuple[str, str], ...]]:
    """Return what is missing, or what keeps us from knowing it."""
    try:
        return tuple(MissingFile(path) for path in missing_files(root, layout)), ()
    except CheckpointError as error:
        return (), (("configuration", str(error)),)
    except OSError as error:  # nothing can be said about what is missing
        raise CheckpointError.because(f"cannot be read: {error.strerror}", path=error.filename) from error
