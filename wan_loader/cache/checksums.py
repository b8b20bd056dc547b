"""The comparison of entries with their checksums: all of one at once, or block by block while a load reads them."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from wan_loader.cache.build import content_digest
from wan_loader.cache.manifest import BLOCK_BYTES, MANIFEST_NAME, digest
from wan_loader.errors import CacheError
from wan_loader.system.machine import processors

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from wan_loader.cache.manifest import EntryFile, Manifest

__all__ = ["BlockCheck", "check_entry", "check_header", "check_sources"]


class BlockCheck:
    """The check of an entry's file while it is read: its blocks must be what was written."""

    block_bytes = BLOCK_BYTES

    def __init__(self, path: Path, file: EntryFile) -> None:
        self._path = path
        self._expected = dict(zip(file.ranges(), file.blocks, strict=True))

    def __call__(self, file: int, start: int, end: int, view: memoryview) -> None:
        """Compare a block with its checksum.

        Args:
            file: Always 0: an entry that is checked this way has one file.
            start: The first byte of the block.
            end: The byte after its last one.
            view: Its bytes.

        Raises:
            CacheError: The checksum is wrong, or the bytes are not a block.
        """
        expected = self._expected.get((start, end))
        if expected is None:
            raise CacheError.because(
                f"has no checksum for bytes {start} to {end} alone", "load all tensors", path=self._path
            )
        if digest(view) != expected:
            raise CacheError.because(f"is damaged: bytes {start} to {end} do not match their checksum", path=self._path)


def check_entry(path: Path, manifest: Manifest, tell: Callable[[int], None] | None = None) -> list[str]:
    """Read an entry again, through the page cache, at the disk's speed. Holds a block (16 MiB) for each processor.

    Args:
        path: The entry's directory.
        manifest: Its manifest.
        tell: Called with the number of bytes that were checked, from several threads.

    Returns:
        Sentences that say what is wrong with it; none if it is sound.
    """
    known = {MANIFEST_NAME, *(file.path for file in manifest.files)}
    wrong = [f"{path / name} does not belong to the entry" for name in sorted(_found(path) - known)]
    sizes = {file: _size(path / file.path) for file in manifest.files}
    for file, size in sizes.items():
        if size != file.nbytes:
            wrong.append(
                f"{path / file.path} " + ("is missing" if size is None else f"has {size} bytes, not {file.nbytes}")
            )
    jobs = [
        (file, start, end, said)
        for file in manifest.files
        if sizes[file] is not None
        for (start, end), said in zip(file.ranges(), file.blocks, strict=True)
    ]

    def check(job: tuple[EntryFile, int, int, str]) -> str | None:
        file, start, end, said = job
        place = path / file.path
        try:
            # opened for each block: threads share no descriptor, and a link that was put there is refused
            fd = os.open(place, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                data = os.pread(fd, end - start, start)
            finally:
                os.close(fd)
        except OSError as error:
            return f"{place} cannot be read: {error.strerror}"
        if tell is not None:
            tell(len(data))
        return None if digest(data) == said else f"{place}: bytes {start} to {end} do not match their checksum"

    with ThreadPoolExecutor(min(16, processors() * 2)) as pool:
        wrong += [problem for problem in pool.map(check, jobs) if problem is not None]
    return wrong


def _found(path: Path) -> set[str]:
    """List files and links, relative to `path`."""
    found = set()
    for directory, directories, names in os.walk(path):
        # os.walk counts links to directories as directories, and does not go into them
        links = (name for name in directories if os.path.islink(os.path.join(directory, name)))
        found |= {os.path.relpath(os.path.join(directory, name), path) for name in (*names, *links)}
    return found


def _size(place: Path) -> int | None:
    try:
        return os.lstat(place).st_size
    except OSError:
        return None


def check_sources(manifest: Manifest) -> list[str]:
    """Read the source files of an entry again: those that are there, if the entry was built with checksums of contents.

    Returns:
        A sentence for each file whose content is not what the entry was made from.
    """
    pairs = zip(manifest.sources, manifest.contents, strict=False)
    return [
        f"{source.path} has another content than the one this entry was made from"
        for source, said in pairs
        if os.path.exists(source.path) and content_digest(source.path) != said
    ]


def check_header(path: Path, file: EntryFile) -> None:
    """Compare the header of a file of an entry with its checksum. Reads only the header.

    Raises:
        CacheError: It is not what was written, or cannot be read.
    """
    place = path / file.path
    try:
        with open(place, "rb") as f:
            header = f.read(file.header_nbytes)
    except OSError as error:
        raise CacheError.because(f"cannot be read: {error.strerror}", path=place) from error
    if not file.blocks or digest(header) != file.blocks[0]:
        raise CacheError.because("is damaged: its header does not match its checksum", path=place)
