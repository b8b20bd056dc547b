"""The directory of entries, shared by any number of processes without a server and without a lock file.

    entries/KEY     complete entries; nothing else is ever loaded
    building/KEY    being written; renamed to entries/KEY when everything is on the disk
    damaged/KEY     set aside by a failed check
    trash/...       being removed

Whoever works on a directory holds a `flock` on it, which ends with the process, however that ends: readers of an entry
share one, a builder and a remover hold it alone. What lies in building/ or trash/ without a lock was left behind by a
killed process and is swept away by the next one. Links are never followed.
"""

from __future__ import annotations

import os
import shutil
import stat
import time
import uuid
from contextlib import suppress
from pathlib import Path

from wan_loader.cache.entry import Entry, ListedEntry, UnfinishedEntry, look_at, read_manifest
from wan_loader.cache.locks import lock, removable
from wan_loader.cache.manifest import MANIFEST_NAME
from wan_loader.errors import CacheError
from wan_loader.sizes import format_bytes
from wan_loader.system.files import is_foreign, remove_tree

__all__ = ["Store", "default_directory"]

_DIRECTORIES = ("entries", "building", "damaged", "trash")
_TAG_NAME = "CACHEDIR.TAG"
_TAG = "Signature: 8a477f597d28d172789f06886806bc55\n# https://bford.info/cachedir/\n"
#: Of the disk's free space, what the cache takes unless told otherwise.
_DEFAULT_SHARE = 0.5
#: How long a reader waits for a directory whose lock is held alone: publishing and removing are one rename each.
_PATIENCE_S = 1.0
_TRIES = 3


def default_directory() -> Path:
    """Return the place of the cache unless told otherwise: the user's cache directory of this system."""
    from platformdirs import user_cache_path

    return user_cache_path("wan-loader") / "converted"


class Store:
    """A cache directory: opened, made if needed, and cleared of what killed processes left.

    Args:
        directory: The directory; None is the user's.
        create: Make what is missing.

    Raises:
        CacheError: It is a link, somebody else's, writable by others, used for other things, or cannot be written.
    """

    def __init__(self, directory: str | os.PathLike[str] | None = None, *, create: bool = True) -> None:
        self.root = Path(directory) if directory is not None else default_directory()
        try:
            if create and not self.root.is_symlink():
                self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._check(self.root)
            self._check_ours()
            if create:
                self._make()
            for name in _DIRECTORIES:
                self._check(self.root / name)
        except OSError as error:
            if isinstance(error, CacheError):
                raise
            raise CacheError.because(
                f"cannot hold the cache: {error.strerror}", "name another directory with --cache-dir", path=self.root
            ) from error
        self._sweep()

    def _check_ours(self) -> None:
        """Refuse a directory that somebody uses for something else: what lies there must not be swept away."""
        names = os.listdir(self.root)
        if names and (_TAG_NAME not in names or not self._tag_is_ours()):
            raise CacheError.because(
                f"holds other things, such as {min(names)!r}, and is no cache",
                "name a new or empty directory with --cache-dir",
                path=self.root,
            )

    def _tag_is_ours(self) -> bool:
        """Read the tag: other programs tag their caches, too. An empty one is being written by another process."""
        with open(self.root / _TAG_NAME, "rb") as tag:
            return tag.read(len(_TAG) + 1) in (b"", _TAG.encode())

    def _make(self) -> None:
        tag = self.root / _TAG_NAME
        if not tag.exists():
            tag.write_text(_TAG)
        for name in _DIRECTORIES:
            (self.root / name).mkdir(mode=0o700, exist_ok=True)

    def _check(self, path: Path) -> None:
        try:
            st = os.lstat(path)
        except FileNotFoundError:
            if path == self.root:
                raise
            return
        if not stat.S_ISDIR(st.st_mode):
            what = "a link" if stat.S_ISLNK(st.st_mode) else "no directory"
            raise CacheError.because(
                f"is {what}, and cannot hold the cache", "name a real directory with --cache-dir", path=path
            )
        # root may write anywhere anyway
        if st.st_uid not in (os.geteuid(), 0):
            raise CacheError.because(
                f"belongs to user {st.st_uid}, and weights from there could be anybody's",
                "name a directory of your own with --cache-dir",
                path=path,
            )
        if st.st_mode & 0o022:
            raise CacheError.because(
                f"can be written by others (mode {st.st_mode & 0o777:o})",
                f"run `chmod go-w {path}`, or name another directory with --cache-dir",
                path=path,
            )

    def _sweep(self) -> None:
        for path in self._paths("building"):
            if is_foreign(path):
                remove_tree(path)
            # whoever writes holds a lock: that it can be had says that the process is gone
            elif (left := lock(path, alone=True)) is not None:
                with left:
                    self._discard(path)
        for path in self._paths("trash"):
            remove_tree(path)

    def _paths(self, directory: str) -> list[Path]:
        with suppress(OSError):
            return sorted(self.root / directory / name for name in os.listdir(self.root / directory))
        return []

    def find(self, key: str, *, use: bool = True) -> Entry | None:
        """Find the entry of a key, locked for reading until it is closed; None if there is none.

        Args:
            key: The name of the entry.
            use: Count this as its last use.

        Raises:
            CacheError: There is one that cannot be used.
        """
        path = self.root / "entries" / key
        if is_foreign(path):
            raise CacheError.because("is a link or a file, which no entry is: not used", path=path)
        locked = lock(path, alone=False, patience_s=_PATIENCE_S)
        if locked is None:
            return None
        entry = Entry(path, locked.fd)
        try:
            # after the lock: before it, a remover could be at work
            entry.manifest = read_manifest(path)
            if entry.manifest.key != key:
                raise CacheError.because("holds the manifest of another entry: damaged", path=path)
            entry.check_files()
            if use:
                with suppress(OSError):
                    os.utime(path / MANIFEST_NAME)
        except BaseException:
            entry.close()
            raise
        return entry

    def begin(self, key: str, nbytes: int, max_size: int | None = None) -> UnfinishedEntry | None:
        """Become the one that builds an entry, after making room for it; None if it exists or another builds it.

        Args:
            key: The name of the entry.
            nbytes: The size that it will have.
            max_size: Bytes the whole cache may take; None is half of what would be free without it.

        Raises:
            CacheError: The entry cannot fit, or the directory cannot be written.
        """
        path = self.root / "building" / key
        for _ in range(_TRIES):  # a sweeper may take what is not locked yet
            try:
                with suppress(FileExistsError):  # `exist_ok` fails where it goes away meanwhile
                    path.mkdir(mode=0o700)
            except OSError as error:
                raise CacheError.because(
                    f"cannot hold the cache: {error.strerror}", "name another directory", path=path.parent
                ) from error
            if (locked := lock(path, alone=True)) is not None:
                break
            time.sleep(0.01)
        else:
            return None
        building = UnfinishedEntry(path, locked.fd)
        try:
            # published by another process between our look and our lock
            if os.path.lexists(self.root / "entries" / key):
                building.abandon()
                return None
            for left in path.iterdir():
                remove_tree(left)
            building.plan(nbytes)
            self._make_room(nbytes, max_size)
        except BaseException:
            building.abandon()
            raise
        return building

    def _make_room(self, nbytes: int, max_size: int | None) -> None:
        """Make room for a new entry of `nbytes`, which has told its plan already: two begun at once see each other."""
        listed = self.listed()
        fixed = sum(x.claim for x in listed if x.stays or x.state == "in use")
        unwritten = sum(x.claim - x.nbytes for x in listed if x.state == "building")
        free = shutil.disk_usage(self.root).free
        budget = max_size if max_size is not None else int((free + sum(x.nbytes for x in listed)) * _DEFAULT_SHARE)
        if nbytes > budget:
            what = (
                f"{format_bytes(nbytes)} is more than the {format_bytes(budget)} that the cache in {self.root} may take"
            )
            remedy = "allow more with --max-size, or name a larger disk with --cache-dir"
            raise CacheError(f"an entry of {what}: {remedy}", path=self.root, remedy=remedy)
        removed = 0
        if fixed <= budget:  # else nothing that could be removed would be enough
            removed = sum(r.nbytes for r in self._remove_least_used(budget))
            fixed = sum(x.claim for x in listed) - removed
        if fixed > budget:
            raise CacheError(
                f"an entry of {format_bytes(nbytes)} does not fit: the cache in {self.root} may take "
                f"{format_bytes(budget)}, and {format_bytes(fixed - nbytes)} of that are in use, "
                "being written, or of a newer format",
                path=self.root,
            )
        if unwritten > free + removed:
            left = max(0, free + removed - (unwritten - nbytes))
            raise CacheError(
                f"an entry of {format_bytes(nbytes)} does not fit: {self.root} has {format_bytes(left)} free",
                path=self.root,
            )

    def listed(self) -> list[ListedEntry]:
        """List everything in the cache, last used first."""
        listed = [look_at(path, "complete") for path in self._paths("entries")]
        listed += [look_at(path, "building") for path in self._paths("building")]
        listed += [look_at(path, "damaged") for path in self._paths("damaged")]
        return sorted((x for x in listed if x is not None), key=lambda x: -x.used)

    def prune(self, *, max_size: int | None = None, max_age_s: float | None = None) -> list[ListedEntry]:
        """Remove damaged entries, those not used for `max_age_s` seconds, and the least recently used over `max_size`.

        Entries that are being read or built stay, and those that a newer version of this program wrote.

        Returns:
            The entries that were removed.
        """
        removed, now = [], time.time()
        for listed in self.listed():
            damaged = listed.manifest is None or listed.state == "damaged"
            old = max_age_s is not None and now - listed.used > max_age_s
            if not listed.stays and (damaged or old) and self.remove(listed):
                removed.append(listed)
        return removed + ([] if max_size is None else self._remove_least_used(max_size))

    def _remove_least_used(self, max_size: int) -> list[ListedEntry]:
        listed = self.listed()
        removed, kept = [], sum(x.claim for x in listed if x.stays)
        for entry in (x for x in listed if not x.stays):
            if kept + entry.nbytes > max_size and self.remove(entry):
                removed.append(entry)
            else:
                kept += entry.nbytes
        return removed

    def remove(self, listed: ListedEntry) -> bool:
        """Remove an entry; return False if it is being read or built."""
        with removable(listed.path) as locked:
            if locked:
                self._discard(listed.path)
            return locked

    def set_aside(self, key: str) -> Path | None:
        """Move an entry whose check failed to damaged/, where nobody loads it; readers keep what they have open.

        Returns:
            The new place; None if another process was first, or it cannot be moved.
        """
        entry, place = self.root / "entries" / key, self.root / "damaged" / key
        if not os.path.lexists(entry):  # another process was first
            return None
        with suppress(OSError):
            if os.path.lexists(place):
                self._discard(place)
            entry.rename(place)
            return place
        return None

    def _discard(self, path: Path) -> None:
        """Take a directory out of sight in one step, then away."""
        # a rename is atomic: nobody ever finds half an entry under its name
        trash = self.root / "trash" / uuid.uuid4().hex
        with suppress(OSError):
            path.rename(trash)
            remove_tree(trash)
