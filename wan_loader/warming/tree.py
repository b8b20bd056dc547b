"""The files under a path: a file, an index or a pattern with its shards, or a directory with everything in it.

Files come in the order of first use where the model's family is known, and else in that of their names. Names that
begin with a dot (`.git`, `.cache`) are left out. Links are followed while they stay inside: inside the directory that
was named or, for a snapshot in a hub cache, inside its repository's folder, where the blobs are.
"""

from __future__ import annotations

import contextlib
import os
import stat
from dataclasses import dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING

from wan_loader.errors import CheckpointError, MissingFileError
from wan_loader.formats import open_checkpoint
from wan_loader.formats.choosing import no_checkpoint
from wan_loader.formats.file_names import is_index_name, is_weight_name
from wan_loader.formats.foreign_files import read_head
from wan_loader.formats.hub_cache import locate
from wan_loader.formats.known_formats import holds_weights
from wan_loader.formats.model_directory import known_model

if TYPE_CHECKING:
    from wan_loader.types import StrPath

__all__ = ["SourceFile", "Tree", "list_tree"]

_MAX_FILES = 100_000
_MAX_DEPTH = 16
#: So many files are opened where no name speaks of weights.
_MAX_SNIFFED = 64


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A regular file."""

    relative: str
    """The name below the root, with slashes."""
    path: str
    """The name to open: absolute, links resolved."""
    nbytes: int
    mtime_ns: int
    ctime_ns: int

    @property
    def is_weights(self) -> bool:
        """True if it holds tensors, by its name."""
        return is_weight_name(self.relative)


@dataclass(frozen=True, slots=True)
class Tree:
    """The files that a path stands for."""

    path: str
    """The path as given, made absolute."""
    is_directory: bool
    files: tuple[SourceFile, ...]
    outside: tuple[str, ...]
    """Links that lead out of it, below the root; they are not among the files."""
    warnings: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        """The bytes of all files."""
        return sum(file.nbytes for file in self.files)

    @property
    def name(self) -> str:
        """The last part of the path."""
        return os.path.basename(self.path)


def list_tree(path: StrPath, *, follow: bool = False) -> Tree:
    """List the files of a checkpoint or of a directory with several.

    Args:
        path: As for `open_checkpoint`, but no list.
        follow: Take links that lead out as well.

    Raises:
        MissingFileError: Nothing is there.
        CheckpointError: A directory holds no weights, or something cannot be listed.
    """
    given = os.path.abspath(locate(os.fspath(path)))
    try:
        if os.path.isdir(given):
            return _Walk(given, follow).tree()
        if "*" in os.path.basename(given) and not os.path.lexists(given):
            return _shards(given, [], follow)
        os.stat(given)  # unlike os.path.exists, this tells what is not there from what may not be looked at
        return _shards(given, [given], follow) if is_index_name(os.path.basename(given)) else _alone(given)
    except OSError as error:
        if isinstance(error, MissingFileError):
            raise
        if isinstance(error, FileNotFoundError | NotADirectoryError) and error.filename == given:
            raise MissingFileError.because("does not exist", "check the path", path=path) from error
        raise CheckpointError.because(
            f"cannot be listed: {error.filename or path}: {error.strerror}", path=path
        ) from error


def _alone(given: str) -> Tree:
    """Make the tree of a file, which may itself be a link."""
    found = _file(os.path.basename(given), os.path.realpath(given))
    if found is None:
        raise CheckpointError.because("is not a regular file", "name a file or a directory", path=given)
    return Tree(given, False, (found,), (), ())


def _shards(given: str, beside: list[str], follow: bool) -> Tree:
    """Make the tree of an index or a pattern: the shards that it names, and what goes with them."""
    walk = _Walk(os.path.dirname(given), follow)
    for path in [*beside, *(file.path for file in open_checkpoint(given).files)]:
        walk.add(os.path.basename(path), path)
    return Tree(given, False, tuple(walk.files), tuple(walk.outside), tuple(walk.warnings))


class _Walk:
    """A walk through one directory."""

    def __init__(self, root: str, follow: bool) -> None:
        self._root = root
        self._boundary = _boundary(os.path.realpath(root))
        self._follow = follow
        self._seen: set[str] = set()
        self.files: list[SourceFile] = []
        self.outside: list[str] = []
        self.warnings: list[str] = []

    def tree(self) -> Tree:
        """Walk, and return what was found."""
        self._directory("", self._root, 0)
        named = any(file.is_weights for file in self.files)
        if not named and not self.outside and not any(map(_holds_weights, self.files[:_MAX_SNIFFED])):
            raise no_checkpoint(self._root)
        model = known_model(self._root)
        files = sorted(self.files, key=lambda file: (model.rank(file.relative) if model else 0, file.relative))
        return Tree(self._root, True, tuple(files), tuple(self.outside), tuple(self.warnings))

    def _directory(self, relative: str, path: str, depth: int) -> None:
        real = os.path.realpath(path)
        # links can make a circle
        if depth > _MAX_DEPTH or real in self._seen:
            self.warnings.append(f"{path} is left out: {'too deep' if depth > _MAX_DEPTH else 'listed already'}")
            return
        self._seen.add(real)
        with os.scandir(path) as entries:
            found = sorted(entries, key=lambda entry: entry.name)
        for entry in found:
            if entry.name.startswith("."):
                continue
            below = f"{relative}/{entry.name}".lstrip("/")
            if entry.is_dir() and self._inside(entry.path):
                self._directory(below, entry.path, depth + 1)
            else:
                self.add(below, entry.path)

    def _inside(self, path: str) -> bool:
        real = os.path.realpath(path)
        # by parts of the path: /a/bc is not inside of /a/b
        return self._follow or os.path.commonpath([real, self._boundary]) == self._boundary

    def add(self, relative: str, path: str) -> None:
        """Take a file, or note why not."""
        if not self._inside(path):
            self.outside.append(relative)
            return
        file = _file(relative, os.path.realpath(path))
        if file is None:
            self.warnings.append(f"{path} is left out: not a regular file, or a link to nothing")
            return
        if len(self.files) == _MAX_FILES:
            raise CheckpointError.because(
                f"holds more than {_MAX_FILES} files", "name a checkpoint's directory", path=self._root
            )
        self.files.append(file)


def _boundary(root: str) -> str:
    """Return the directory that links may not leave."""
    parts = PurePath(root).parts
    for i in range(1, len(parts) - 1):
        # snapshots/COMMIT/FILE is a link to blobs/HASH, two levels up
        if parts[i] == "snapshots" and parts[i - 1].startswith(("models--", "datasets--")):
            return os.path.join(*parts[:i])
    return root


def _file(relative: str, path: str) -> SourceFile | None:
    try:
        facts = os.stat(path)
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(facts.st_mode):
        return None
    return SourceFile(relative, path, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns)


def _holds_weights(file: SourceFile) -> bool:
    with contextlib.suppress(OSError, CheckpointError):
        return holds_weights(read_head(file.path))
    return False
