"""Files and directories that other processes use at the same time: written whole or not at all, locked, never followed.

A lock is a `flock` on the directory itself: no lock file can be left behind, and the lock ends with the process,
however that ends.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from wan_loader.errors import OutputError

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

__all__ = [
    "LockedDirectory",
    "check_private",
    "close_own",
    "is_below",
    "is_foreign",
    "is_of",
    "lock_directory",
    "lock_or_refuse",
    "plain_path",
    "read_capped",
    "remove_tree",
    "sync_directory",
    "write_bytes",
    "write_text",
]


def write_text(path: Path, text: str) -> None:
    """Write a text as `write_bytes` does."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write beside the place, then rename: nobody sees half a file.

    Raises:
        OutputError: It cannot be written.
    """
    # in the same directory, for a rename does not leave its file system
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with beside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError as error:
        with suppress(OSError):
            beside.unlink(missing_ok=True)
        raise OutputError.because(f"cannot be written: {error.strerror}", path=path) from error


def read_capped(path: str | os.PathLike[str], most: int) -> bytes | None:
    """Read a file, or return None if it has more than `most` bytes; a device or a pipe has no size beforehand.

    Raises:
        OSError: It cannot be read.
    """
    with open(path, "rb") as file:
        text = file.read(most + 1)
    return text if len(text) <= most else None


def is_of(fd: int, facts: os.stat_result) -> bool:
    """Say whether a descriptor is one of a file; a program may have closed it, and its number may be another's now."""
    try:
        return os.path.samestat(os.fstat(fd), facts)
    except OSError:
        return False


def close_own(fd: int, facts: os.stat_result) -> None:
    """Close a descriptor of a file, unless somebody did that who closes what is not theirs."""
    if is_of(fd, facts):
        os.close(fd)


def sync_directory(path: Path) -> None:
    """Put the names in a directory on the disk."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class LockedDirectory:
    """A directory with a lock on it; the lock goes with `close` or with the process."""

    def __init__(self, path: Path, fd: int) -> None:
        self.path = path
        self.fd = fd

    def close(self) -> None:
        """Give the lock back; again does nothing."""
        if self.fd >= 0:
            with suppress(OSError):  # a forked child may hold a copy of the descriptor: unlock for it as well
                fcntl.flock(self.fd, fcntl.LOCK_UN)
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> LockedDirectory:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def lock_directory(path: Path, *, alone: bool, patience_s: float = 0.0) -> LockedDirectory | None:
    """Lock a directory.

    Args:
        path: The directory; a link to one is not followed.
        alone: Keep everybody else out, rather than only those who want to be alone.
        patience_s: How long to wait for others to leave.

    Returns:
        None if the directory is gone, was replaced meanwhile, or somebody else holds it.

    Raises:
        OSError: The file system has no locks.
    """
    end = time.monotonic() + patience_s
    while True:
        try:
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            # without waiting, in a loop: patience has an end, which flock by itself has not
            fcntl.flock(fd, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
            # somebody may have removed the directory and made another before the lock was ours
            ours, now = os.fstat(fd), os.stat(path, follow_symlinks=False)
            if (ours.st_ino, ours.st_dev) == (now.st_ino, now.st_dev):
                return LockedDirectory(path, fd)
            patience_s = 0.0
        except (BlockingIOError, FileNotFoundError):
            pass
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)
        if time.monotonic() >= end or not patience_s:
            return None
        time.sleep(0.01)


def lock_or_refuse(path: Path, refusal: str) -> LockedDirectory:
    """Keep others from a directory. On a file system without locks nobody is kept out.

    Args:
        path: The directory.
        refusal: The text of the error.

    Raises:
        OutputError: Somebody is there.
    """
    try:
        locked = lock_directory(path, alone=True)
    except OSError:
        return LockedDirectory(path, -1)
    if locked is None:
        raise OutputError(refusal, path=path)
    return locked


def is_foreign(path: Path) -> bool:
    """Say whether a link or a file lies where only directories do. One look: others make and remove them meanwhile."""
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


def check_private(path: Path) -> None:
    """Refuse a directory for our state that is a link or that others may write to.

    Raises:
        OutputError: It is one.
    """
    facts = os.lstat(path)
    if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.geteuid() or facts.st_mode & 0o022:
        raise OutputError.because(
            "is not a directory that only you may write to", "remove it, or choose another --to", path=path
        )


def is_below(path: Any) -> bool:
    """Say whether this is text that names something below a directory."""
    if not isinstance(path, str) or "\0" in path or len(path) > 4096:
        return False
    try:
        os.fsencode(path)
    except UnicodeEncodeError:  # half of a surrogate pair is no file's name
        return False
    return all(part not in ("", ".", "..") for part in path.split("/"))


def plain_path(directory: Path, relative: str) -> Path:
    """Return a path below a directory, none of whose parts is a link.

    Raises:
        OutputError: One of them is.
    """
    path = directory
    for part in relative.split("/")[:-1]:
        path = path / part
        if path.is_symlink():
            remedy = "a staged copy is not written or removed through links; remove it first"
            raise OutputError.because("is a link", remedy, path=path)
    return directory / relative
