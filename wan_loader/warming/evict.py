"""Pushing files out of the page cache, and proving it.

Unwritten pages are written first. The kernel is then asked to let go, and residency is measured: it keeps pages that
a process has mapped, that are being written, or whose only copy is the memory (tmpfs). What stays is reported with
the reason, as far as it can be seen, and so is what cannot be known.
"""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from wan_loader.system.mounts import mount_of
from wan_loader.system.page_cache import Knowledge, cached
from wan_loader.system.threads import default_threads, run_all

if TYPE_CHECKING:
    from collections.abc import Iterable

    from wan_loader.types import StrPath

__all__ = ["Evicted", "drop_pages", "evict", "resident_bytes"]

_ATTEMPTS = 20
_PAUSE_S = 0.01


@dataclass(frozen=True, slots=True)
class Evicted:
    """One file's pages after an eviction."""

    path: str
    nbytes: int
    resident_before: int | None
    """Bytes that were in the page cache; None where that is unknown."""
    resident_after: int | None
    """Bytes that are still in the page cache; None where that is unknown."""
    reason: str
    """The cause for which some are, or for which it is not known; empty where none is left."""


def evict(paths: Iterable[StrPath], *, threads: int | None = None) -> tuple[Evicted, ...]:
    """Push files out of the page cache.

    Costs the writing back of dirty pages, then about a second for 10 GB.

    Returns:
        One result for each file, in the order given; files that cannot be opened are results with a reason, not errors.
    """
    names = [os.fspath(path) for path in paths]
    results: dict[int, Evicted] = {}

    def one(index: int, path: str) -> None:
        # by number: threads finish in any order, and a file may be named twice
        results[index] = _evict(path)

    tasks = [partial(one, index, path) for index, path in enumerate(names)]
    run_all(tasks, threads=threads or default_threads(), stop=threading.Event())
    return tuple(results[index] for index in range(len(names)))


def drop_pages(fd: int, start: int = 0, nbytes: int = 0) -> None:
    """Write back and let go of a range of an open file (0: to its end). The kernel may keep pages."""
    # the kernel drops clean pages only
    os.fdatasync(fd)
    os.posix_fadvise(fd, start, nbytes, os.POSIX_FADV_DONTNEED)


def resident_bytes(paths: Iterable[StrPath], *, first_nbytes: int | None = None) -> int | None:
    """Return the bytes of the files that lie in the page cache, or an estimate (see `cached`); None where unknown.

    Args:
        paths: The files; missing ones hold no bytes.
        first_nbytes: Look only at so many bytes, counted through the files in their order.
    """
    total, left = 0, first_nbytes
    for path in paths:
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            nbytes = os.fstat(fd).st_size
            if left is not None:
                nbytes = min(nbytes, left)
                left -= nbytes
            if (found := cached(fd, 0, nbytes)) is None:
                return None
            total += found
        finally:
            os.close(fd)
    return total


def _evict(path: str) -> Evicted:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        return Evicted(path, 0, 0, None, f"cannot be opened: {error.strerror}")
    try:
        nbytes = os.fstat(fd).st_size
        before = after = cached(fd, 0, nbytes)
        for _ in range(_ATTEMPTS):  # pages still in a CPU's batch of new ones are kept at first
            drop_pages(fd)
            after = cached(fd, 0, nbytes)
            if not after:
                break
            time.sleep(_PAUSE_S)
        return Evicted(path, nbytes, before, after, _reason(path, after))
    except OSError as error:
        return Evicted(path, 0, 0, None, f"the pages cannot be written back: {error.strerror}")
    finally:
        os.close(fd)


def _reason(path: str, left: int | None) -> str:
    if left == 0:
        return ""
    if left is None:
        return f"what is left is {Knowledge.UNKNOWN.value}"
    mount = mount_of(path)
    if mount is not None and mount.in_memory:
        return f"it lies on {mount.kind}, where memory is the only copy: delete the file to free it"
    if users := _mapped_by(path):
        return f"mapped by {', '.join(users[:4])}: pages in use stay until they end"
    return "the kernel kept them: in use by a process that cannot be seen from here, or locked in memory"


def _mapped_by(path: str) -> list[str]:
    """List processes, as `name (pid)`, that have the file mapped; only those that this user may look into."""
    real = os.path.realpath(path).encode(errors="surrogateescape")
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if any(line.endswith(real) for line in (process / "maps").read_bytes().splitlines()):
                name = (process / "comm").read_text(errors="replace").strip()
                found.append(f"{name} ({process.name})")
        except OSError:
            continue
    return found
