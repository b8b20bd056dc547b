"""One load's dealings with the converted cache: an entry if there is a valid one, else the source, which is then kept.

Whatever is wrong with the cache, the load goes on from the source, with one warning that says why.
"""

from __future__ import annotations

import logging
import threading
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

from wan_loader.cache.build import Build
from wan_loader.cache.check import BlockCheck, check_entry, check_header
from wan_loader.cache.content import LoadedTensors, warm_up
from wan_loader.cache.outline import Outline, outline_file, why_not, why_source
from wan_loader.cache.store import Store
from wan_loader.errors import CacheError, CheckpointError, MissingFileError
from wan_loader.formats import open_checkpoint
from wan_loader.formats.facts import StorageFacts, TensorFacts
from wan_loader.loading.allocate import StoragePlan
from wan_loader.loading.report import CacheReport
from wan_loader.loading.run import read_storages

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path
    from types import TracebackType

    import torch

    from wan_loader.cache.content import Part
    from wan_loader.cache.entry import Building, Entry
    from wan_loader.cache.outline import CachedFile, SourceFile
    from wan_loader.loading.run import Choice
    from wan_loader.types import StrPath

__all__ = [
    "ENTRY_FILE",
    "CacheOptions",
    "CachedLoad",
    "begin_build",
    "build_entry",
    "find_or_begin",
    "outline_checkpoint",
    "read_parts",
]

T = TypeVar("T")
_LOG = logging.getLogger("wan_loader")

#: The one file of an entry that was made from one checkpoint.
ENTRY_FILE = "model.safetensors"
#: File times come from a clock of this coarseness: what was changed a moment ago could be changed again unseen.
_CLOCK_TICK_S = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheOptions:
    """What a load may do with the cache."""

    directory: StrPath | None = None
    """None: the user's cache directory."""
    verify: bool = False
    """Check an entry against its checksums while it is read."""


def outline_checkpoint(choice: Choice) -> Outline:
    """What an entry of a checkpoint holds: all of its tensors under their names, in the dtypes of the rule."""
    checkpoint = choice.checkpoint
    label = checkpoint.path if checkpoint.part is None else f"{checkpoint.path}, part {checkpoint.part}"
    return Outline(label, choice.rule.dtype, (outline_file(ENTRY_FILE, checkpoint, choice.rule.target),))


def begin_build(
    store: Store, outline: Outline, sources: Sequence[SourceFile], max_size: int | None = None
) -> Building | None:
    """`Store.begin`, once the source's times are old enough to tell any later change."""
    newest = max((s.ctime_ns for s in sources), default=0) / 1e9
    if 0 <= (age := time.time() - newest) < _CLOCK_TICK_S:
        time.sleep(_CLOCK_TICK_S - age)
    return store.begin(outline.key(sources), outline.nbytes, max_size)


def find_or_begin(
    store: Store,
    outline: Outline,
    sources: Sequence[SourceFile],
    read: Callable[[Entry], T],
    warn: Callable[[str], object],
    *,
    max_size: int | None = None,
) -> tuple[T | None, Building | None]:
    """What `read` makes of the entry, which it closes; else this process builds it, unless another one does: two None.

    An entry that is damaged, or that `read` raises `CacheError` or `CheckpointError` for, is set aside with a warning.
    Raises `CacheError` where nothing can be built.
    """
    key = outline.key(sources)
    try:
        if (entry := store.find(key)) is not None:
            return read(entry), None
    except (CacheError, CheckpointError) as error:  # the entry's file may vanish or be damaged, too
        warn(_put_aside(store, key, error))
    return None, begin_build(store, outline, sources, max_size)


def _put_aside(store: Store, key: str, why: Exception) -> str:
    place = store.set_aside(key)
    return f"{why}; the entry was set aside{f' in {place}' if place else ''}, and is built again"


def build_entry(
    store: Store, outline: Outline, *, max_size: int | None = None, digest_contents: bool = False
) -> Build | Path | None:
    """Begin to write an entry from its source; its path if there is a valid one, None if another process writes it.

    digest_contents: keep checksums of the source files' contents, too. Raises `CacheError`.
    """
    for file in outline.files:
        if (reason := why_not(file)) is not None:
            raise CacheError(f"{outline.label} cannot be cached: {reason}")
    sources = outline.sources
    path, building = find_or_begin(store, outline, sources, _close, _LOG.warning, max_size=max_size)
    if building is None:
        return path
    import torch  # noqa: F401 (here: in the build's own thread, nothing could end it)

    loaded = LoadedTensors()
    return Build(building, outline, sources, loaded, read_parts, digest_contents=digest_contents).start()


def _close(entry: Entry) -> Path:
    entry.close()
    return entry.path


class CachedLoad:
    """The cache's part in one load; a context manager that holds the entry as long as it is read."""

    def __init__(self, options: CacheOptions, device: str | int | torch.device) -> None:
        self._options = options
        self._device = device
        self._stack = ExitStack()
        self._store: Store | None = None
        self._entry: Entry | None = None
        self._order: list[str] = []
        self._outline: Outline | None = None
        self._sources: tuple[SourceFile, ...] = ()
        self._building: Building | None = None
        self.report: CacheReport | None = None
        self.warnings: list[str] = []

    def __enter__(self) -> CachedLoad:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stack.close()
        if self._building is not None:
            self._building.abandon()

    @property
    def hit(self) -> bool:
        """Whether an entry is being read."""
        return self._entry is not None

    def choose(self, source: Choice) -> Choice:
        """What to load: from the entry if there is a valid one; else from the source, and become its builder."""
        try:
            return self._choose(source)
        except MissingFileError:
            raise
        except OSError as error:  # also `CacheError`
            self._from_source(f"the cache cannot be used: {error}", warn=True)
            return source

    def _choose(self, source: Choice) -> Choice:
        outline = outline_checkpoint(source)
        if (reason := why_source(outline)) is not None:
            self._from_source(reason)
            return source
        self._outline, self._sources = outline, outline.sources
        self._store = Store(self._options.directory)
        chosen, self._building = find_or_begin(
            self._store,
            outline,
            self._sources,
            lambda entry: self._from_entry(entry, source, outline.files[0]),
            self.warnings.append,
        )
        if chosen is not None:
            return chosen
        if self._building is not None:
            self.report = CacheReport("building", "no entry yet: one is being written in the background")
            threading.Thread(target=warm_up, args=(self._device,), name="warm up", daemon=True).start()
        else:
            self._from_source("another process is writing the entry")
        return source

    def _from_entry(self, entry: Entry, source: Choice, outlined: CachedFile) -> Choice:
        self._stack.callback(entry.close)
        files = entry.manifest.files
        if [file.path for file in files] != [ENTRY_FILE]:
            raise CacheError(f"{entry.path} holds other files than {ENTRY_FILE}: damaged or foreign")
        check_header(entry.path, files[0])
        checkpoint = open_checkpoint(entry.file(ENTRY_FILE))
        as_left = entry.check_files()  # what is changed from here on, the load finds
        verify = self._options.verify or not as_left
        held = {(t.name, t.dtype, t.shape) for t in checkpoint.tensors}
        if held != {(t.name, t.dtype, t.source.shape) for t in outlined.tensors}:
            raise CacheError(f"{entry.path} holds other tensors than are made from its source: damaged or foreign")
        rank = {t.name: i for i, t in enumerate(checkpoint.tensors)}
        by_name = {t.name: t for t in checkpoint.tensors}
        tensors = [by_name[t.name] for t in source.tensors]
        check = None
        if len(tensors) == len(by_name):
            tensors.sort(key=lambda t: rank[t.name])
            check = _block_check(entry) if verify else None
        elif verify and (wrong := check_entry(entry.path, entry.manifest)):
            raise CacheError("; ".join(wrong))
        self._entry, self._order = entry, [t.name for t in source.tensors]
        why = "the source is unchanged" + ("" if as_left else "; the entry's files have new modes: checksums compared")
        self.report = CacheReport("hit", why, str(entry.path))
        return replace(
            source,
            checkpoint=replace(checkpoint, path=source.checkpoint.path, part=source.checkpoint.part),
            tensors=tensors,
            check=check,
        )

    def in_order(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What was loaded, in the order of the source, whatever the entry's is."""
        return {name: tensors[name] for name in self._order} if self.hit else tensors

    def set_aside(self, why: Exception) -> None:
        """The entry that was chosen turned out to be damaged: load again, from the source."""
        assert self._entry is not None
        assert self._store is not None
        key = self._entry.path.name
        self._stack.close()
        self._entry = None
        self.warnings.append(_put_aside(self._store, key, why))

    def _from_source(self, reason: str, *, warn: bool = False) -> None:
        self.report = CacheReport("source", reason)
        if warn:
            self.warnings.append(reason)

    def keep(self, tensors: Mapping[str, torch.Tensor]) -> Build | None:
        """Begin to write what was loaded into the cache, if this load is its builder; before it is handed out."""
        if self._building is None or self._outline is None:
            return None
        loaded = LoadedTensors()
        loaded.note(self._outline.files[0], tensors)
        build = Build(self._building, self._outline, self._sources, loaded, read_parts)
        self._building = None
        return build.start()


def _block_check(entry: Entry) -> BlockCheck:
    return BlockCheck(entry.file(ENTRY_FILE), entry.manifest.files[0])


def read_parts(file: CachedFile, parts: Sequence[Part]) -> list[torch.Tensor]:
    """Read parts of tensors from the source, converted: 1-D host tensors that own their memory."""
    from wan_loader.dtypes import ITEMSIZE

    storages, plans = [], []
    for index, part in enumerate(parts):
        facts = part.tensor.source
        place, itemsize = file.checkpoint.storages[facts.storage], ITEMSIZE[facts.dtype]
        storages.append(StorageFacts(place.file, place.start + part.start * itemsize, part.count * itemsize))
        segment = TensorFacts(str(index), facts.dtype, (part.count,), index, (1,))
        plans.append(StoragePlan(index, facts.dtype, part.tensor.dtype, (segment,)))
    segments = replace(file.checkpoint, storages=tuple(storages), tensors=tuple(p.tensors[0] for p in plans))
    tensors = read_storages(segments, plans)
    return [tensors[str(index)] for index in range(len(parts))]
