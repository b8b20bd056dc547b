"""The writing of an entry in the background: one thread that gives way to loads of the same process.

What fails here fails alone: the load it belongs to is long done. The half-written entry is removed, the reason is kept
in `Build.failure` and told to the log once.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
from typing import TYPE_CHECKING

import xxhash

from wan_loader.cache.loaded_tensors import batches, segments_of
from wan_loader.cache.manifest import BLOCK_BYTES, EntryFile, Manifest
from wan_loader.cache.outline import safetensors_header
from wan_loader.engine.activity import wait_until_idle
from wan_loader.errors import CacheError, CheckpointError
from wan_loader.sizes import format_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path
    from typing import Any

    from wan_loader.cache.entry import UnfinishedEntry
    from wan_loader.cache.loaded_tensors import LoadedTensors, ReadSegments
    from wan_loader.cache.outline import CachedFile, Outline, SourceIdentity

__all__ = ["Build", "content_digest", "is_building", "stop_builds", "wait_for_builds"]

_LOG = logging.getLogger("wan_loader")
_DIGEST_READ_BYTES = 16 << 20

_running: set[Build] = set()
os.register_at_fork(after_in_child=_running.clear)  # no thread writes them there


class _StoppedError(Exception):
    """The build is not wanted any more. Never leaves this module."""


class Build:
    """An entry that is being written. The interpreter waits for it at exit; `stop` ends it.

    Args:
        building: The entry, which only this process writes. It is published or abandoned here.
        outline: The content of the entry.
        sources: The identity of the source's files before the first byte was read.
        loaded: The tensors that were just loaded.
        read: Reads from the source what cannot be taken from memory.
        digest_contents: Keep checksums of the source files' contents, too.
    """

    def __init__(
        self,
        building: UnfinishedEntry,
        outline: Outline,
        sources: Sequence[SourceIdentity],
        loaded: LoadedTensors,
        read: ReadSegments,
        *,
        digest_contents: bool = False,
    ) -> None:
        self._building = building
        self._outline = outline
        self._sources = tuple(sources)
        self._loaded = loaded
        self._read = read
        self._digest_contents = digest_contents
        self._stop = threading.Event()
        # not a daemon: a program that ends after its load still gets its entry
        self._thread = threading.Thread(target=self._run, name="cache", daemon=False)
        self._ended = threading.Event()  # Thread.join takes a thread for ended once Ctrl-C came while it waited
        self.nbytes = outline.nbytes
        self.nbytes_written = 0
        self.nbytes_from_source = 0
        """The part of the bytes written that was read from the source again."""
        self.failure: str | None = None
        self.path: Path | None = None
        """The entry, once it is complete."""

    def start(self) -> Build:
        """Begin to write, and return the build itself."""
        _running.add(self)
        self._thread.start()
        return self

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait for the end, at most `timeout_s` seconds; return True if it has come."""
        return self._thread.ident is None or self._ended.wait(timeout_s)

    def stop(self) -> None:
        """Give up. Return when what was written is removed."""
        self._stop.set()
        self.wait()

    def _run(self) -> None:
        try:
            self.path = self._building.publish(self._write())
        # of every kind: a thread that dies with a message of its own would tell nobody which entry is missing
        except BaseException as failure:
            self._building.abandon()
            self.failure = _reason(failure, self._outline)
            _LOG.warning("not cached: %s", self.failure)
        finally:
            _running.discard(self)
            self._ended.set()

    def _write(self) -> Manifest:
        files = [self._write_tensors(file) for file in self._outline.files]
        files += [self._write_small(name, content) for name, content in self._outline.small_files.items()]
        contents = tuple(map(content_digest, (s.path for s in self._sources))) if self._digest_contents else ()
        # the identities once more: what was read meanwhile may be of two versions of the file
        if self._outline.sources != self._sources:
            reason = "was changed while its cache entry was being written"
            raise CheckpointError(f"{self._outline.label} {reason}", reason=reason)
        return Manifest(
            key=self._building.path.name,
            label=self._outline.label,
            dtype=self._outline.dtype,
            created=time.time(),
            sources=self._sources,
            files=tuple(files),
            contents=contents,
        )

    def _write_tensors(self, file: CachedFile) -> EntryFile:
        header = safetensors_header(file.tensors)
        with os.fdopen(self._building.create(file.path), "wb", buffering=0) as out:
            writer = _Writer(out, len(header))
            writer.write(header)
            for data in self._data(file):
                self._check_stop()
                writer.write(data)
                self.nbytes_written += len(data)
            os.fsync(out.fileno())
        return writer.entry_file(file.path)

    def _data(self, file: CachedFile) -> Iterator[memoryview]:
        """Yield the tensors' bytes, in order."""
        segments = (segment for tensor in file.tensors for segment in segments_of(tensor))
        for batch in batches(segments, self._loaded):
            # a load of this process goes first; between two looks, a stop must come through
            while not wait_until_idle(0.2):
                self._check_stop()
            self._check_stop()
            taken = self._loaded.take(batch[0]) if self._loaded.knows(batch[0]) else None
            if taken is not None:
                yield _bytes(taken)
                continue
            self.nbytes_from_source += sum(p.nbytes for p in batch)
            for tensor in self._read(file, batch):
                yield _bytes(tensor)

    def _check_stop(self) -> None:
        if self._stop.is_set():
            raise _StoppedError

    def _write_small(self, name: str, content: bytes) -> EntryFile:
        with os.fdopen(self._building.create(name), "wb", buffering=0) as out:
            writer = _Writer(out, 0)
            writer.write(content)
            os.fsync(out.fileno())
        return writer.entry_file(name)


def wait_for_builds() -> None:
    """Wait until every entry that this process is writing is complete, or has failed."""
    for build in list(_running):
        build.wait()


def is_building() -> bool:
    """Return True while this process is writing entries."""
    return bool(_running)


def stop_builds() -> None:
    """Give up every entry that this process is writing; return when what was written is removed."""
    for build in list(_running):
        build.stop()


def content_digest(path: str) -> str:
    """Return the checksum of a whole file's content. Reads it all.

    Raises:
        CheckpointError: The file cannot be read.
    """
    hasher = xxhash.xxh3_128()
    try:
        with open(path, "rb", buffering=0) as f:
            while block := f.read(_DIGEST_READ_BYTES):
                hasher.update(block)
    except OSError as error:
        raise CheckpointError.because(f"cannot be read: {error.strerror}", path=path) from error
    return hasher.hexdigest()


class _Writer:
    """A file that is written in order; the checksums of its blocks are taken on the way."""

    def __init__(self, out: Any, header_nbytes: int) -> None:
        self._out = out
        self._header_nbytes = header_nbytes
        self._position = 0
        self._hasher = xxhash.xxh3_128()
        self._blocks: list[str] = []

    def write(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        while view:
            border = self._next_border()
            segment = view[: border - self._position]
            self._hasher.update(segment)
            self._write_all(segment)
            self._position += len(segment)
            view = view[len(segment) :]
            if self._position == border:
                self._end_block()

    def _next_border(self) -> int:
        if self._position < self._header_nbytes:
            return self._header_nbytes
        return (self._position // BLOCK_BYTES + 1) * BLOCK_BYTES

    def _write_all(self, segment: memoryview) -> None:
        while segment:
            segment = segment[self._out.write(segment) :]

    def _end_block(self) -> None:
        self._blocks.append(self._hasher.hexdigest())
        self._hasher.reset()

    def entry_file(self, path: str) -> EntryFile:
        """Say what was written."""
        if self._position > self._header_nbytes and self._position % BLOCK_BYTES:
            self._end_block()
        return EntryFile(path, self._position, self._header_nbytes, tuple(self._blocks))


def _bytes(tensor: Any) -> memoryview:
    import torch

    flat = tensor.contiguous().as_strided((tensor.numel(),), (1,))  # one element may have any stride
    return memoryview(flat.view(torch.uint8).numpy())


def _reason(failure: BaseException, outline: Outline) -> str:
    if isinstance(failure, _StoppedError):
        return f"{outline.label}: the build was stopped"
    if isinstance(failure, OSError) and failure.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{outline.label}: the disk is full, {format_bytes(outline.nbytes)} are needed; the load is not affected"
    if isinstance(failure, OSError) and not isinstance(failure, CacheError | CheckpointError):
        return f"{outline.label}: the cache cannot be written: {failure.strerror or failure}"
    return f"{outline.label}: {failure}"
