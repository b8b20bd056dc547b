"""Locks on directories, and directories changed without following links.

A lock is a `flock` on the directory itself: no lock file can be left behind, and the lock ends with the process,
however that ends.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from wan_loader.errors import CacheError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from types import TracebackType

__all__ = ["Locked", "is_foreign", "lock", "removable", "remove_tree", "sync_directory"]


class Locked:
    """A directory with a lock on it; the lock goes with `close` or with the process."""

    def __init__(self, path: Path, fd: int) -> None:
        self.path = path
        self.fd = fd

    def close(self) -> None:
        if self.fd >= 0:
            with suppress(OSError):  # a forked child may hold a copy of the descriptor: unlock for it as well
                fcntl.flock(self.fd, fcntl.LOCK_UN)
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Locked:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def lock(path: Path, *, alone: bool, patience_s: float = 0.0) -> Locked | None:
    """Lock a directory; None if it is gone, was replaced meanwhile, or somebody else holds it.

    Raises `CacheError` where the file system has no locks.
    """
    end = time.monotonic() + patience_s
    while True:
        try:
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            fcntl.flock(fd, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
            ours, now = os.fstat(fd), os.stat(path, follow_symlinks=False)
            if (ours.st_ino, ours.st_dev) == (now.st_ino, now.st_dev):
                return Locked(path, fd)
            patience_s = 0.0
        except (BlockingIOError, FileNotFoundError):
            pass
        except OSError as error:
            os.close(fd)
            raise CacheError(f"{path} cannot be locked ({error.strerror}): name another file system") from error
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)
        if time.monotonic() >= end or not patience_s:
            return None
        time.sleep(0.01)


@contextmanager
def removable(path: Path) -> Iterator[bool]:
    if is_foreign(path):
        yield True
        return
    locked = lock(path, alone=True)
    if locked is None:
        yield False
        return
    with locked:
        yield True


def is_foreign(path: Path) -> bool:
    """Whether a link or a file lies where only directories do. One look: others make and remove them meanwhile."""
    try:
        return not stat.S_ISDIR(os.lstat(path).st_mode)
    except OSError:
        return False


def remove_tree(path: Path) -> None:
    """Remove what is there; links are removed, not followed. What cannot be removed is left for the next sweep."""
    if is_foreign(path):
        with suppress(OSError):
            path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
