"""Locks on the directories of the cache; where a file system has none, the cache cannot be there."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from wan_loader.errors import CacheError
from wan_loader.system.files import is_foreign, lock_directory

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from wan_loader.system.files import LockedDirectory

__all__ = ["lock", "removable"]


def lock(path: Path, *, alone: bool, patience_s: float = 0.0) -> LockedDirectory | None:
    """Lock a directory as `lock_directory` does.

    Raises:
        CacheError: The file system has no locks.
    """
    try:
        return lock_directory(path, alone=alone, patience_s=patience_s)
    except OSError as error:
        raise CacheError.because(
            f"cannot be locked ({error.strerror})", "name another file system", path=path
        ) from error


@contextmanager
def removable(path: Path) -> Iterator[bool]:
    """Keep others from what is to be removed. Yields True if it may be: what is no directory has no users."""
    if is_foreign(path):
        yield True
        return
    locked = lock(path, alone=True)
    if locked is None:
        yield False
        return
    with locked:
        yield True
