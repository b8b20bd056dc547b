"""The state machine of one source in the converted cache, for loads of a checkpoint and for starts of a whole model.

    hit         there is a valid entry: read it instead of the source
    building    there is none, and this process writes it, once all of its files were noted
    source      nothing to gain, another process is writing, or the cache cannot be used: read the source

An entry that turns out to be damaged is set aside, and `hit` becomes `building` or `source`. Whatever is wrong with
the cache, loads go on from the source, with a warning that says why.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

from wan_loader.cache.build import Build
from wan_loader.cache.loaded_tensors import LoadedTensors
from wan_loader.cache.outline import why_not, why_source
from wan_loader.cache.store import Store
from wan_loader.errors import CacheError, CheckpointError, MissingFileError
from wan_loader.loading.report import CacheReport

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path
    from types import TracebackType

    import torch

    from wan_loader.cache.entry import Entry, UnfinishedEntry
    from wan_loader.cache.loaded_tensors import ReadSegments
    from wan_loader.cache.outline import Outline, SourceIdentity
    from wan_loader.types import StrPath

__all__ = ["CacheUse", "begin_build", "build_entry", "find_entry"]

_LOG = logging.getLogger("wan_loader")
#: File times come from a clock of this coarseness: what was changed a moment ago could be changed again unseen.
_CLOCK_TICK_S = 0.02


def find_entry(store: Store, key: str, warn: Callable[[str], object]) -> Entry | None:
    """Find an entry as `Store.find` does; one that is damaged is set aside, with a warning, and there is none."""
    try:
        return store.find(key)
    except (CacheError, CheckpointError) as error:  # the entry's file may vanish or be damaged, too
        warn(_put_aside(store, key, error))
        return None


def _put_aside(store: Store, key: str, why: Exception) -> str:
    place = store.set_aside(key)
    return f"{why}; the entry was set aside{f' in {place}' if place else ''}, and is built again"


def begin_build(
    store: Store, outline: Outline, sources: Sequence[SourceIdentity], max_size: int | None = None
) -> UnfinishedEntry | None:
    """Begin as `Store.begin` does, once the source's times are old enough to tell any later change."""
    # ctime, not mtime: no program can set it back
    newest = max((s.ctime_ns for s in sources), default=0) / 1e9
    if 0 <= (age := time.time() - newest) < _CLOCK_TICK_S:
        time.sleep(_CLOCK_TICK_S - age)
    return store.begin(outline.key(sources), outline.nbytes, max_size)


def build_entry(
    store: Store, outline: Outline, read: ReadSegments, *, max_size: int | None = None, digest_contents: bool = False
) -> Build | Path | None:
    """Begin to write an entry from its source.

    Args:
        store: The cache.
        outline: The content of the entry.
        read: Reads from the source.
        max_size: Bytes the whole cache may take; None is half of what would be free without it.
        digest_contents: Keep checksums of the source files' contents, too.

    Returns:
        The build; the path of the entry if there is a valid one; None if another process writes it.

    Raises:
        CacheError: The source cannot be cached, the entry does not fit, or the cache cannot be written.
    """
    for file in outline.files:
        if (reason := why_not(file)) is not None:
            raise CacheError(f"{outline.label} cannot be cached: {reason}", reason=reason)
    sources = outline.sources
    if (entry := find_entry(store, outline.key(sources), _LOG.warning)) is not None:
        entry.close()
        return entry.path
    if (building := begin_build(store, outline, sources, max_size)) is None:
        return None
    import torch  # noqa: F401 (here: in the build's own thread, nothing could end it)

    return Build(building, outline, sources, LoadedTensors(), read, digest_contents=digest_contents).start()


class CacheUse:
    """The dealings of a source with the cache, from the look for an entry to the writing of one. A context manager.

    To make one is to look for an entry, and to begin to build one if there is none.

    Args:
        outline: The content of the entry.
        directory: The directory of the cache; None is the user's.
        read: Reads from the source what cannot be taken from memory.
    """

    def __init__(self, outline: Outline, directory: StrPath | None, read: ReadSegments) -> None:
        self.entry: Entry | None = None
        """The entry that is to be read, as long as it is a hit."""
        self.build: Build | None = None
        """The entry that is being written from what was loaded."""
        self.report = CacheReport("source", "")
        self.warnings: list[str] = []
        self._outline = outline
        self._read = read
        self._store: Store | None = None
        self._building: UnfinishedEntry | None = None
        self._loaded = LoadedTensors()
        self._missing = {file.path for file in outline.files}
        if (reason := why_source(outline)) is not None:
            self.report = CacheReport("source", reason)
            return
        self._sources = outline.sources
        try:
            self._store = Store(directory)
            self._look()
        # an OSError as well, but of the source: no load can do without it
        except MissingFileError:
            raise
        except OSError as error:  # also `CacheError`
            self._unusable(error)

    def __enter__(self) -> CacheUse:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Stop reading the entry; one whose files were not all noted is not written."""
        self._leave_entry()
        if self._building is not None:
            self._building.abandon()
            self._building = None

    def accept(self, why: str = "the source is unchanged") -> None:
        """Say that the entry was opened and is sound, as far as headers tell."""
        assert self.entry is not None
        self.report = CacheReport("hit", why, str(self.entry.path))

    def set_aside(self, why: Exception) -> None:
        """Set the entry aside, which is damaged: load from the source, and build it again."""
        assert self.entry is not None
        assert self._store is not None
        # noted before the entry is left; the lock is given back before the rename
        key = self.entry.path.name
        self._leave_entry()
        try:
            self.warnings.append(_put_aside(self._store, key, why))
            self._look()
        except OSError as error:
            self._unusable(error)

    def note(self, path: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Note that a file's tensors were loaded from the source, before anybody else has them.

        With the last file, the entry begins to be written in the background.

        Args:
            path: The path of the file in the entry.
            tensors: The tensors, by their names in the source.
        """
        if self._building is None or path not in self._missing:
            return
        self._loaded.note(next(file for file in self._outline.files if file.path == path), tensors)
        self._missing.discard(path)
        if not self._missing:
            self.build = Build(self._building, self._outline, self._sources, self._loaded, self._read)
            self._building = None
            self.build.start()

    def _look(self) -> None:
        assert self._store is not None
        self.entry = find_entry(self._store, self._outline.key(self._sources), self.warnings.append)
        if self.entry is not None:
            return
        self._building = begin_build(self._store, self._outline, self._sources)
        if self._building is None:
            self.report = CacheReport("source", "another process is writing the entry")
        else:
            why = "; ".join(self.warnings) or "no entry yet"
            self.report = CacheReport("building", f"{why}: one is being written in the background")

    def _unusable(self, error: OSError) -> None:
        reason = f"the cache cannot be used: {error}"
        self.report = CacheReport("source", reason)
        self.warnings.append(reason)

    def _leave_entry(self) -> None:
        if self.entry is not None:
            self.entry.close()
            self.entry = None
