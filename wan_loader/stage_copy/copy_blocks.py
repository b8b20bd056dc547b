"""Files in blocks: reading a source that must not change, checksums, and writing so that it lasts."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

from wan_loader.errors import CheckpointError, WanLoaderError
from wan_loader.system.page_cache import Knowledge, PageCache
from wan_loader.warming.prewarm import fill

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from wan_loader.stage_copy.journal import PlannedFile
    from wan_loader.warming.tree import SourceFile

__all__ = [
    "BLOCK_BYTES",
    "block_nbytes",
    "check_unchanged",
    "checksum",
    "cold_blocks",
    "n_blocks",
    "opened",
    "read_source",
    "write",
]

BLOCK_BYTES = 16 << 20


def n_blocks(file: PlannedFile) -> int:
    """Return the number of blocks of a file."""
    return -(-file.nbytes // BLOCK_BYTES)


def block_nbytes(file: PlannedFile, block: int) -> int:
    """Return the length of a block: the last one of a file may be shorter."""
    return min(BLOCK_BYTES, file.nbytes - block * BLOCK_BYTES)


def checksum(view: memoryview) -> str:
    """Return the checksum of a block in hex: fast, against damage, not against malice."""
    import xxhash

    return str(xxhash.xxh3_64_hexdigest(view))


@contextlib.contextmanager
def opened(path: Path | str, flags: int) -> Iterator[int]:
    """Hold a file open, without following a link."""
    # the directory may be writable for others: a link in the place of a part would lead the writing elsewhere
    fd = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        yield fd
    finally:
        os.close(fd)


def cold_blocks(source: SourceFile) -> set[int]:
    """Return the blocks of a file of which nothing is in the page cache, as far as that is known."""
    starts = range(0, source.nbytes, BLOCK_BYTES)
    try:
        with opened(source.path, os.O_RDONLY) as fd:
            pages = PageCache([fd])
            cold = {s // BLOCK_BYTES for s in starts if not pages.share(0, s, min(s + BLOCK_BYTES, source.nbytes))}
            return set() if pages.knowledge is Knowledge.UNKNOWN else cold
    except OSError:  # the file is gone, which the copy reports
        return set()


def read_source(source: SourceFile, start: int, view: memoryview, *, keep_pages: bool) -> None:
    """Read a block whole, of a file that has not changed.

    Raises:
        CheckpointError: The file cannot be read, was truncated, or is not the one that was listed.
    """
    try:
        check_unchanged(source)
        with opened(source.path, os.O_RDONLY) as fd:
            count = fill(fd, start, view)
            if not keep_pages:
                os.posix_fadvise(fd, start, len(view), os.POSIX_FADV_DONTNEED)
    except OSError as error:
        if isinstance(error, WanLoaderError):
            raise
        raise CheckpointError.because(
            f"cannot be read: {error.strerror}", "check the disk", path=source.path
        ) from error
    if count < len(view):
        raise CheckpointError.because("was truncated while it was being staged", "stage it again", path=source.path)


def check_unchanged(source: SourceFile) -> None:
    """Raise `CheckpointError` unless a file has the size and the times that it had when it was listed."""
    try:
        facts = os.stat(source.path, follow_symlinks=False)
    except OSError as error:
        raise CheckpointError.because(
            f"vanished while it was being staged: {error.strerror}", path=source.path
        ) from error
    now = (facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns)
    if now != (source.nbytes, source.mtime_ns, source.ctime_ns):
        raise CheckpointError.because("changed while it was being staged", "stage it again", path=source.path)


def write(fd: int, start: int, view: memoryview) -> None:
    """Write all of a view."""
    count = 0
    while count < len(view):
        # a call may write less than it was given
        count += os.pwrite(fd, view[count:], start + count)
