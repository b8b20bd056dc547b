"""One entry: being read, being written, or being looked at."""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from wan_loader.cache.locks import lock
from wan_loader.cache.manifest import MANIFEST_NAME, MAX_MANIFEST_BYTES, EntryFile, Manifest, parse_manifest
from wan_loader.errors import CacheError, NewerFormatError
from wan_loader.system.files import LockedDirectory, is_foreign, remove_tree, sync_directory

__all__ = ["NEWER", "Entry", "ListedEntry", "UnfinishedEntry", "look_at", "read_manifest"]

#: State of an entry that a newer version of this program wrote.
NEWER = "newer format"
#: File of an entry that is being built: how many bytes it will have. Goes when it is complete.
_PLANNED_NAME = "planned"
#: Mode of a file that is complete.
_SEALED = 0o400


class Entry(LockedDirectory):
    """A complete entry, locked for reading: nobody removes it before `close`."""

    manifest: Manifest

    def file(self, path: str) -> Path:
        """Return the place of a file of the entry."""
        return self.path / path

    def check_files(self) -> bool:
        """Look whether every file has its size and was not written to. Costs one stat each.

        Returns:
            True if nothing else about them changed. If something did, such as the mode, a program that sets times may
            have hidden a change of the content: only checksums can tell.

        Raises:
            CacheError: A file is missing, has another size, or was written to.
        """
        as_left = True
        for file in self.manifest.files:
            st = _regular(self.path, file.path)
            if st.st_size != file.nbytes:
                raise CacheError.because(
                    f"has {st.st_size} bytes, not {file.nbytes}: damaged", path=self.file(file.path)
                )
            if file.was_touched(st, self.manifest.created):
                raise CacheError.because(
                    "was touched after it was written: it may have been changed", path=self.file(file.path)
                )
            as_left = as_left and file.is_as_left(st)
        return as_left


class UnfinishedEntry(LockedDirectory):
    """An entry that only this process writes. `publish` or `abandon` it."""

    def plan(self, nbytes: int) -> None:
        """Tell other processes how large it will be, before anything is written.

        Raises:
            CacheError: The directory cannot be written.
        """
        try:
            with os.fdopen(self.create(_PLANNED_NAME), "w") as f:
                f.write(str(nbytes))
        except OSError as error:
            raise CacheError.because(
                f"cannot be written: {error.strerror}", "free space, or name another cache directory", path=self.path
            ) from error

    def create(self, path: str) -> int:
        """Open a new file of the entry for writing; the caller closes it. Directories on the way are made."""
        place = self.path / path
        place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        return os.open(place, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)

    def publish(self, manifest: Manifest) -> Path | None:
        """Put everything on the disk and make the entry visible.

        The manifest gets the times that the files have from here on: nobody touches them again.

        Returns:
            The place of the entry; None if another process was first.

        Raises:
            CacheError: The directory of entries cannot be written.
        """
        # not a file of the entry: its place must hold nothing that the manifest does not name
        (self.path / _PLANNED_NAME).unlink(missing_ok=True)
        manifest = replace(manifest, files=tuple(map(self._seal, manifest.files)))
        fd = self.create(MANIFEST_NAME)
        with os.fdopen(fd, "wb") as f:
            f.write(manifest.to_bytes())
            f.flush()
            os.fsync(f.fileno())
            os.fchmod(f.fileno(), _SEALED)
        # names are safe on the disk only with their directories, inner ones first; then the rename may show them
        for directory, _, _ in os.walk(self.path, topdown=False):
            sync_directory(Path(directory))
        place = self.path.parent.parent / "entries" / self.path.name
        try:
            self.path.rename(place)
        except FileExistsError:
            place_taken = True
        except OSError as error:  # a directory that is not empty is ENOTEMPTY
            if not place.exists():
                raise CacheError.because(f"cannot be written: {error.strerror}", path=place) from error
            place_taken = True
        else:
            place_taken = False
        if place_taken:
            self.abandon()
            return None
        with suppress(OSError):  # it is complete and visible; at worst a power cut takes its name away
            sync_directory(place.parent)
        self.path = place
        self.close()
        return place

    def _seal(self, file: EntryFile) -> EntryFile:
        # the last change of the file: the times that are read now are those that later looks must find
        os.chmod(self.path / file.path, _SEALED)
        st = os.stat(self.path / file.path)
        return replace(file, mtime_ns=st.st_mtime_ns, ctime_ns=st.st_ctime_ns)

    def abandon(self) -> None:
        """Remove what was written."""
        remove_tree(self.path)
        self.close()


@dataclass(frozen=True, slots=True)
class ListedEntry:
    """An entry as `list` shows it."""

    key: str
    path: Path
    nbytes: int
    """Bytes on the disk."""
    used: float
    """The moment when it was last loaded or made, in seconds since the epoch."""
    manifest: Manifest | None
    state: str
    """"complete", "in use", "building", "damaged", "newer format", or "unreadable: why"."""
    planned_nbytes: int = 0
    """Bytes that it will have, while it is being built."""

    @property
    def stays(self) -> bool:
        """True if it is not ours to remove for another entry: somebody builds it, or a newer version can use it."""
        return self.state in ("building", NEWER)

    @property
    def claim(self) -> int:
        """Bytes to reckon with."""
        return max(self.nbytes, self.planned_nbytes)


def look_at(path: Path, kind: str) -> ListedEntry | None:
    """Look at what lies below entries/, building/ or damaged/; None if it went away meanwhile.

    Args:
        path: The directory of the entry.
        kind: Its state as its place tells: "complete", "building" or "damaged".
    """
    state, manifest = kind, None
    if is_foreign(path):
        state = "unreadable: not a directory"
    elif kind != "building":
        try:
            manifest = read_manifest(path)
        except CacheError as error:
            if kind == "complete":
                state = NEWER if isinstance(error, NewerFormatError) else f"unreadable: {error}"
    if kind == "complete" and manifest is not None:
        # taken and given back: it cannot be had while somebody reads the entry
        locked = lock(path, alone=True)
        if locked is None:
            state = "in use"
        else:
            locked.close()
    try:
        used = os.lstat(path / MANIFEST_NAME if manifest is not None else path).st_mtime
        nbytes = sum(
            # what is taken on the disk, not the length: that is what removing it would give back
            os.lstat(os.path.join(directory, name)).st_blocks * 512
            for directory, _, names in (() if path.is_symlink() else os.walk(path))
            for name in names
        )
    except OSError:  # it went away meanwhile
        return None
    return ListedEntry(
        path.name, path, nbytes, used, manifest, state, _planned_nbytes(path) if state == "building" else 0
    )


def _planned_nbytes(path: Path) -> int:
    """Read how large an entry will be; 0 where it does not say."""
    with suppress(OSError, ValueError), open(path / _PLANNED_NAME, "rb") as f:
        return max(0, int(f.read(20)))
    return 0


def read_manifest(path: Path) -> Manifest:
    """Read the manifest of an entry.

    Raises:
        CacheError: It is missing, a link, damaged, or of another version.
    """
    place = path / MANIFEST_NAME
    try:
        _regular(path, MANIFEST_NAME)
        with open(place, "rb") as f:
            return parse_manifest(f.read(MAX_MANIFEST_BYTES + 1), str(place))
    except OSError as error:
        if isinstance(error, CacheError):
            raise
        raise CacheError.because(f"cannot be read: {error.strerror}: the entry is not used", path=place) from error


def _regular(root: Path, relative: str) -> os.stat_result:
    """Stat a regular file below `root`; neither it nor a directory on the way may be a link."""
    path = root
    for name in relative.split("/"):
        path = path / name
        try:
            st = os.lstat(path)
        except OSError as error:
            raise CacheError.because("is missing from its entry: damaged", path=path) from error
        if stat.S_ISLNK(st.st_mode):
            raise CacheError.because("is a link, which no entry holds: not used", path=path)
    if not stat.S_ISREG(st.st_mode):
        raise CacheError.because("is not a regular file: damaged", path=path)
    return st
