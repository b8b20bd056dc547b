"""The local cache of the Hugging Face Hub: from a repository's name, or its folder there, to a snapshot.

Never asks the network. Layout: `models--OWNER--NAME/refs/main` holds a commit, `snapshots/COMMIT/` its files.
"""

from __future__ import annotations

import os
import re

from wan_loader.errors import CheckpointError, MissingFileError
from wan_loader.formats.file_names import is_weight_name

__all__ = ["locate"]

_FOLDER = "models--"
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_COMMIT = re.compile(r"[\w.-]{1,100}", re.ASCII)
_MAX_NAMED = 8


def locate(path: str) -> str:
    """Return the local path that is meant: a snapshot for `OWNER/NAME`, and for a repository's folder in the cache.

    A path that exists is itself.

    Raises:
        MissingFileError: The cache does not hold the repository.
        CheckpointError: It holds several snapshots and does not say which one is the current.
    """
    if os.path.isdir(path) and os.path.basename(os.path.abspath(path)).startswith(_FOLDER):
        return _snapshot(path) if _is_cached_repository(path) else path
    # OWNER/NAME looks like a relative path: what exists, or is called like a file, is one
    if not _REPOSITORY.fullmatch(path) or is_weight_name(path) or path.endswith(".json") or os.path.lexists(path):
        return path
    folder = os.path.join(_cache(), _FOLDER + path.replace("/", "--"))
    if os.path.isdir(folder):
        return _snapshot(folder)
    raise MissingFileError.because(
        "does not exist",
        "check the path. If it is a repository of the Hugging Face Hub, it is not in the local cache "
        f"({_cache()}): hf download {path} gets it (of models that wan-loader download knows, "
        f"wan-loader download {path} --to DIRECTORY gets what is needed)",
        path=path,
    )


def _cache() -> str:
    """Return the directory of huggingface_hub's cache; asking itself would take longer than reading headers does."""
    # in the order of huggingface_hub.constants
    if said := os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE"):
        return os.path.expanduser(os.path.expandvars(said))
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache")
    home = os.environ.get("HF_HOME") or os.path.join(base, "huggingface")
    return os.path.join(os.path.expanduser(os.path.expandvars(home)), "hub")


def _is_cached_repository(folder: str) -> bool:
    return any(os.path.isdir(os.path.join(folder, name)) for name in ("snapshots", "refs", "blobs"))


def _snapshot(folder: str) -> str:
    """Return the snapshot that `refs/main` names; without it, the only one."""
    snapshots = os.path.join(folder, "snapshots")
    commits = sorted(c for c in _listed(snapshots) if not c.startswith("."))
    main = _main(folder)
    if main is None and len(commits) == 1:
        main = commits[0]
    if main in commits:
        return os.path.join(snapshots, main)
    if not commits:
        repository = os.path.basename(os.path.abspath(folder)).removeprefix(_FOLDER).replace("--", "/")
        raise MissingFileError.because(
            "is a repository's folder in the hub's cache, and holds no snapshot",
            f"hf download {repository}",
            path=folder,
        )
    paths = [os.path.join(snapshots, commit) for commit in commits[:_MAX_NAMED]]
    paths += [f"and {len(commits) - _MAX_NAMED} more"] if len(commits) > _MAX_NAMED else []
    said = "does not say which of them is main" if main is None else f"says that main is {main}, which is not there"
    raise CheckpointError(
        f"{folder}, in the hub's cache, {said}: name one of its snapshots: {', '.join(paths)}", path=folder
    )


def _main(folder: str) -> str | None:
    try:
        with open(os.path.join(folder, "refs", "main"), encoding="ascii") as file:
            commit = file.read(200).strip()
    except (OSError, ValueError):
        return None
    return commit if _COMMIT.fullmatch(commit) else None


def _listed(directory: str) -> list[str]:
    try:
        return os.listdir(directory)
    except FileNotFoundError:
        return []
