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

import fcntl
import os
import shutil
import stat
import time
import uuid
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from wan_loader.cache.manifest import MANIFEST_NAME, MAX_MANIFEST_BYTES, Manifest, parse_manifest
from wan_loader.errors import CacheError
from wan_loader.sizes import format_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

__all__ = ["Building", "Entry", "Listed", "Store", "default_directory"]

_ROOMS = ("entries", "building", "damaged", "trash")
_TAG_NAME = "CACHEDIR.TAG"
_TAG = "Signature: 8a477f597d28d172789f06886806bc55\n# https://bford.info/cachedir/\n"
#: Of the disk's free space, what the cache takes unless told otherwise.
_DEFAULT_SHARE = 0.5
#: How long a reader waits for a directory whose lock is held alone: publishing and removing are one rename each.
_PATIENCE_S = 1.0
_TRIES = 3


def default_directory() -> Path:
    """Where the cache is unless told otherwise: the user's cache directory of this system."""
    from platformdirs import user_cache_path

    return user_cache_path("wan-loader") / "converted"


class _Locked:
    """A directory with a lock on it; the lock goes with `close` or with the process."""

    def __init__(self, path: Path, fd: int) -> None:
        self.path = path
        self._fd = fd

    def close(self) -> None:
        if self._fd >= 0:
            with suppress(OSError):  # a forked child may hold a copy of the descriptor: unlock for it as well
                fcntl.flock(self._fd, fcntl.LOCK_UN)
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> _Locked:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def share(self) -> None:
        """Let readers in as well."""
        fcntl.flock(self._fd, fcntl.LOCK_SH)


def _lock(path: Path, *, alone: bool, patience_s: float = 0.0) -> _Locked | None:
    """Lock a directory; None if it is gone, was replaced meanwhile, or somebody else holds it."""
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
                return _Locked(path, fd)
            patience_s = 0.0
        except OSError:
            pass
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)
        if time.monotonic() >= end or not patience_s:
            return None
        time.sleep(0.01)


class Entry(_Locked):
    """A complete entry, locked for reading: nobody removes it before `close`."""

    manifest: Manifest

    def file(self, path: str) -> Path:
        """Where a file of the entry lies."""
        return self.path / path


class Building(_Locked):
    """An entry that only this process writes. `publish` or `abandon` it."""

    def create(self, path: str) -> int:
        """A new file of the entry, open for writing; the caller closes it. Directories on the way are made."""
        place = self.path / path
        place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        return os.open(place, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)

    def publish(self, manifest: Manifest) -> Path | None:
        """Put everything on the disk and make the entry visible; None if another process was first."""
        fd = self.create(MANIFEST_NAME)
        with os.fdopen(fd, "wb") as f:
            f.write(manifest.to_bytes())
            f.flush()
            os.fsync(f.fileno())
        for directory, _, names in os.walk(self.path, topdown=False):
            for name in names:
                os.chmod(os.path.join(directory, name), 0o400)
            _sync_directory(Path(directory))
        place = self.path.parent.parent / "entries" / self.path.name
        try:
            self.path.rename(place)
        except FileExistsError:
            place_taken = True
        except OSError as error:  # a directory that is not empty is ENOTEMPTY
            if not place.exists():
                raise CacheError(f"{place} cannot be written: {error.strerror}") from error
            place_taken = True
        else:
            place_taken = False
        if place_taken:
            self.abandon()
            return None
        with suppress(OSError):  # it is complete and visible; at worst a power cut takes its name away
            _sync_directory(place.parent)
        self.path = place
        self.close()
        return place

    def abandon(self) -> None:
        """Remove what was written."""
        _remove_tree(self.path)
        self.close()


@dataclass(frozen=True, slots=True)
class Listed:
    """An entry as `list` shows it."""

    key: str
    path: Path
    nbytes: int
    """Bytes on the disk."""
    used: float
    """Seconds since the epoch, when it was last loaded or made."""
    manifest: Manifest | None
    state: str
    """"complete", "in use", "building", "damaged", or "unreadable: why"."""


class Store:
    """A cache directory."""

    def __init__(self, directory: str | os.PathLike[str] | None = None, *, create: bool = True) -> None:
        """Open it, make it if needed, sweep what killed processes left. Raises `CacheError`."""
        self.root = Path(directory) if directory is not None else default_directory()
        try:
            if create and not self.root.is_symlink():
                self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._check(self.root)
            self._check_ours()
            if create:
                self._make()
            for room in _ROOMS:
                self._check(self.root / room)
        except OSError as error:
            if isinstance(error, CacheError):
                raise
            raise CacheError(f"cache directory {self.root}: {error.strerror}: name another with --cache-dir") from error
        self._sweep()

    def _check_ours(self) -> None:
        """What lies in a directory that somebody uses for something else must not be swept away."""
        names = os.listdir(self.root)
        if names and _TAG_NAME not in names:
            raise CacheError(
                f"{self.root} holds other things, such as {min(names)!r}, and is no cache: name a new or empty "
                "directory with --cache-dir"
            )

    def _make(self) -> None:
        tag = self.root / _TAG_NAME
        if not tag.exists():
            tag.write_text(_TAG)
        for room in _ROOMS:
            (self.root / room).mkdir(mode=0o700, exist_ok=True)

    def _check(self, path: Path) -> None:
        try:
            st = os.lstat(path)
        except FileNotFoundError:
            if path == self.root:
                raise
            return
        if not stat.S_ISDIR(st.st_mode):
            what = "a link" if stat.S_ISLNK(st.st_mode) else "no directory"
            raise CacheError(f"cache directory {path} is {what}: name a real directory with --cache-dir")
        if st.st_uid not in (os.geteuid(), 0):
            raise CacheError(
                f"cache directory {path} belongs to user {st.st_uid}: weights from there could be anybody's; "
                "name a directory of your own with --cache-dir"
            )
        if st.st_mode & 0o022:
            raise CacheError(
                f"cache directory {path} can be written by others (mode {st.st_mode & 0o777:o}): "
                f"run `chmod go-w {path}`, or name another with --cache-dir"
            )

    def _sweep(self) -> None:
        for path in self._paths("building"):
            if not _is_directory(path):
                _remove_tree(path)
            elif (left := _lock(path, alone=True)) is not None:
                with left:
                    self._discard(path)
        for path in self._paths("trash"):
            _remove_tree(path)

    def _paths(self, room: str) -> list[Path]:
        with suppress(OSError):
            return sorted(self.root / room / name for name in os.listdir(self.root / room))
        return []

    def find(self, key: str, *, use: bool = True) -> Entry | None:
        """The entry of a key, locked for reading until it is closed; None if there is none.

        use: count this as its last use. Raises `CacheError` if there is one that cannot be used.
        """
        path = self.root / "entries" / key
        if os.path.lexists(path) and not _is_directory(path):
            raise CacheError(f"{path} is a link or a file, which no entry is: not used")
        locked = _lock(path, alone=False, patience_s=_PATIENCE_S)
        if locked is None:
            return None
        entry = Entry(path, locked._fd)
        try:
            entry.manifest = _read_manifest(path)
            if entry.manifest.key != key:
                raise CacheError(f"{path} holds the manifest of another entry: damaged")
            for file in entry.manifest.files:
                if (size := _regular_size(path, file.path)) != file.nbytes:
                    raise CacheError(f"{path / file.path} has {size} bytes, not {file.nbytes}: damaged")
            if use:
                with suppress(OSError):
                    os.utime(path / MANIFEST_NAME)
        except BaseException:
            entry.close()
            raise
        return entry

    def begin(self, key: str, nbytes: int, max_size: int | None = None) -> Building | None:
        """Become the one that builds an entry, after making room for it; None if it exists or another builds it.

        max_size: bytes the whole cache may take; None: half of what would be free without it. Raises `CacheError` if
        the entry cannot fit.
        """
        path = self.root / "building" / key
        for _ in range(_TRIES):  # a sweeper may take what is not locked yet
            try:
                path.mkdir(mode=0o700, exist_ok=True)
            except OSError as error:
                raise CacheError(f"cache directory {path.parent}: {error.strerror}: name another") from error
            if (locked := _lock(path, alone=True)) is not None:
                break
            time.sleep(0.01)
        else:
            return None
        building = Building(path, locked._fd)
        try:
            if os.path.lexists(self.root / "entries" / key):
                building.abandon()
                return None
            for left in path.iterdir():
                _remove_tree(left)
            self._make_room(nbytes, max_size)
        except BaseException:
            building.abandon()
            raise
        return building

    def _make_room(self, nbytes: int, max_size: int | None) -> None:
        used = sum(listed.nbytes for listed in self.listed() if listed.state != "building")
        free = shutil.disk_usage(self.root).free
        budget = max_size if max_size is not None else int((free + used) * _DEFAULT_SHARE)
        if nbytes > budget:
            raise CacheError(
                f"an entry of {format_bytes(nbytes)} is more than the {format_bytes(budget)} that the cache in "
                f"{self.root} may take: allow more with --max-size, or name a larger disk with --cache-dir"
            )
        removed = sum(r.nbytes for r in self._remove_least_used(budget - nbytes))
        if used - removed + nbytes > budget:
            raise CacheError(
                f"an entry of {format_bytes(nbytes)} does not fit: the cache in {self.root} may take "
                f"{format_bytes(budget)}, and {format_bytes(used - removed)} of that are in use"
            )
        if nbytes > free + removed:
            raise CacheError(
                f"an entry of {format_bytes(nbytes)} does not fit: {self.root} has {format_bytes(free + removed)} free"
            )

    def listed(self) -> list[Listed]:
        """Everything in the cache, last used first."""
        listed = [_listed(path, "complete") for path in self._paths("entries")]
        listed += [_listed(path, "building") for path in self._paths("building")]
        listed += [_listed(path, "damaged") for path in self._paths("damaged")]
        return sorted((x for x in listed if x is not None), key=lambda x: -x.used)

    def prune(self, *, max_size: int | None = None, max_age_s: float | None = None) -> list[Listed]:
        """Remove damaged entries, those not used for `max_age_s` seconds, and the least recently used over `max_size`.

        What is being read stays. Returns what was removed.
        """
        removed, now = [], time.time()
        for listed in self.listed():
            damaged = listed.manifest is None or listed.state == "damaged"
            old = max_age_s is not None and now - listed.used > max_age_s
            if listed.state != "building" and (damaged or old) and self.remove(listed):
                removed.append(listed)
        return removed + ([] if max_size is None else self._remove_least_used(max_size))

    def _remove_least_used(self, max_size: int) -> list[Listed]:
        removed, kept = [], 0
        for listed in self.listed():
            if listed.state == "building":
                continue
            if kept + listed.nbytes > max_size and self.remove(listed):
                removed.append(listed)
            else:
                kept += listed.nbytes
        return removed

    def remove(self, listed: Listed) -> bool:
        """Remove an entry; False if it is being read or built."""
        with _removable(listed.path) as locked:
            if locked:
                self._discard(listed.path)
            return locked

    def set_aside(self, key: str) -> Path | None:
        """Move an entry whose check failed to damaged/, where nobody loads it; readers keep what they have open."""
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
        """Out of sight in one step, then away."""
        trash = self.root / "trash" / uuid.uuid4().hex
        with suppress(OSError):
            path.rename(trash)
            _remove_tree(trash)


@contextmanager
def _removable(path: Path) -> Iterator[bool]:
    if not _is_directory(path):  # a link or a file that somebody put there
        yield os.path.lexists(path)
        return
    locked = _lock(path, alone=True)
    if locked is None:
        yield False
        return
    with locked:
        yield True


def _listed(path: Path, room: str) -> Listed | None:
    state, manifest = room, None
    if not _is_directory(path):
        state = "unreadable: not a directory"
    elif room != "building":
        try:
            manifest = _read_manifest(path)
        except CacheError as error:
            state = f"unreadable: {error}" if room == "complete" else room
    if room == "complete" and manifest is not None:
        locked = _lock(path, alone=True)
        if locked is None:
            state = "in use"
        else:
            locked.close()
    try:
        used = os.lstat(path / MANIFEST_NAME if manifest is not None else path).st_mtime
        nbytes = sum(
            os.lstat(os.path.join(directory, name)).st_blocks * 512
            for directory, _, names in (() if path.is_symlink() else os.walk(path))
            for name in names
        )
    except OSError:  # it went away meanwhile
        return None
    return Listed(path.name, path, nbytes, used, manifest, state)


def _read_manifest(path: Path) -> Manifest:
    place = path / MANIFEST_NAME
    try:
        _regular_size(path, MANIFEST_NAME)
        with open(place, "rb") as f:
            return parse_manifest(f.read(MAX_MANIFEST_BYTES + 1), str(place))
    except OSError as error:
        if isinstance(error, CacheError):
            raise
        raise CacheError(f"{place} cannot be read: {error.strerror}: the entry is not used") from error


def _regular_size(root: Path, relative: str) -> int:
    """Size of a regular file below `root`; neither it nor a directory on the way may be a link."""
    path = root
    for part in relative.split("/"):
        path = path / part
        try:
            st = os.lstat(path)
        except OSError as error:
            raise CacheError(f"{path} is missing from its entry: damaged") from error
        if stat.S_ISLNK(st.st_mode):
            raise CacheError(f"{path} is a link, which no entry holds: not used")
    if not stat.S_ISREG(st.st_mode):
        raise CacheError(f"{path} is not a regular file: damaged")
    return st.st_size


def _is_directory(path: Path) -> bool:
    """Not a link to one."""
    return path.is_dir() and not path.is_symlink()


def _remove_tree(path: Path) -> None:
    """Remove what is there; links are removed, not followed. What cannot be removed is left for the next sweep."""
    if _is_directory(path):
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
