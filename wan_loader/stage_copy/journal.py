"""The state of one staged checkpoint, kept beside the copy so that any later process can go on or undo it.

    DIR/.wan-loader-stage/ID/manifest.json   source, files, whether all is there
    DIR/.wan-loader-stage/ID/journal         one line for each block written, file placed, directory made
    DIR/.wan-loader-stage/ID/KEY.part        a file that is being copied

ID stands for the name in DIR, KEY for a version of a file (name, size, mtime). The journal is only appended to; a line
that cannot be read is as if it had not been written: its block is copied again, its file is not ours. One process at
a time: the entry's directory is locked.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import stat
import threading
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from wan_loader.documents import Doc, DocumentError
from wan_loader.errors import OutputError
from wan_loader.formats.strict_json import parse_object
from wan_loader.system.files import check_private, is_below, lock_or_refuse, plain_path, read_capped, write_text

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from wan_loader.system.files import LockedDirectory
    from wan_loader.warming.tree import SourceFile

__all__ = [
    "HIDDEN",
    "PlannedFile",
    "StageEntry",
    "StageManifest",
    "entries",
    "open_entry",
]

HIDDEN = ".wan-loader-stage"
_MAX_BYTES = 256 << 20
_BLOCK_LINE = re.compile(r"b ([0-9a-f]{16}) (\d{1,18}) (\d{1,12}) ([0-9a-f]{16})")
_RESET_LINE = re.compile(r"r ([0-9a-f]{16})")
_PLACED_LINE = re.compile(r"p ([0-9a-f]{16}) (\d{1,18}) (-?\d{1,20}) (\".*\")")
_MADE_LINE = re.compile(r"m (\".*\")")


@dataclass(frozen=True, slots=True)
class PlannedFile:
    """One version of one file that is to be in place."""

    path: str
    """The path below DIR, with slashes."""
    nbytes: int
    mtime_ns: int

    @property
    def key(self) -> str:
        """The name of this version: 16 hex digits."""
        return _digest(f"{self.path}\0{self.nbytes}\0{self.mtime_ns}")


@dataclass(frozen=True, slots=True)
class StageManifest:
    """The list of what is staged under one name."""

    source: str
    name: str
    is_directory: bool
    files: tuple[PlannedFile, ...]
    complete: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(file.nbytes for file in self.files)

    def planned(self, file: SourceFile) -> PlannedFile:
        """Plan where a file of the source goes."""
        return PlannedFile(
            f"{self.name}/{file.relative}" if self.is_directory else file.relative, file.nbytes, file.mtime_ns
        )


def _digest(text: str) -> str:
    import xxhash

    return str(xxhash.xxh3_64_hexdigest(text.encode(errors="surrogateescape")))


class StageEntry:
    """The state of one staged name, locked; a context manager."""

    def __init__(self, directory: Path, home: Path) -> None:
        self.directory = directory
        self.home = home
        self.manifest: StageManifest | None = None
        self.blocks: dict[str, dict[tuple[int, int], str]] = {}
        """Version of a file -> start and length of a block -> checksum of what was written."""
        self.placed: dict[str, tuple[str, int, int]] = {}
        """Path below DIR -> version, length and mtime of the file that was put there."""
        self.made: list[str] = []
        """Directories below DIR that were made for it, outermost first."""
        self._lock = threading.Lock()
        self._locked: LockedDirectory | None = None
        self._journal_fd = -1

    def __enter__(self) -> StageEntry:
        self._locked = lock_or_refuse(self.home, f"{self.directory}: another process is staging the same: wait for it")
        try:
            self._read()
        except BaseException:
            self._locked.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            if self._journal_fd >= 0:
                os.close(self._journal_fd)
            self._journal_fd = -1
        if self.manifest is None and not (self.blocks or self.placed or self.made):
            self.remove()  # nothing has begun: leave no trace
        if self._locked is not None:
            self._locked.close()

    def part(self, file: PlannedFile) -> Path:
        """Return the path of the file that is being copied."""
        return self.home / f"{file.key}.part"

    def target(self, file: PlannedFile) -> Path:
        """Return the path where it will be."""
        return plain_path(self.directory, file.path)

    def owns(self, path: str) -> bool:
        """Return True if what lies at a path below DIR is what this entry put there, untouched since."""
        if path not in self.placed:
            return False
        _, nbytes, mtime_ns = self.placed[path]
        try:
            facts = os.lstat(plain_path(self.directory, path))
        except OSError:
            return False
        return stat.S_ISREG(facts.st_mode) and (facts.st_size, facts.st_mtime_ns) == (nbytes, mtime_ns)

    def holds(self, file: PlannedFile) -> bool:
        """Return True if this version is in place."""
        return self.owns(file.path) and self.placed[file.path][0] == file.key

    def write_manifest(self, manifest: StageManifest) -> None:
        """Replace the manifest."""
        document = {"schema_version": 1, **asdict(manifest)}
        write_text(self.home / "manifest.json", json.dumps(document, indent=1) + "\n")
        self.manifest = manifest

    def note_block(self, file: PlannedFile, start: int, nbytes: int, checksum: str) -> None:
        """Note that a block has been written."""
        self._append(f"b {file.key} {start} {nbytes} {checksum}")
        self.blocks.setdefault(file.key, {})[start, nbytes] = checksum

    def forget_blocks(self, file: PlannedFile) -> None:
        """Note that what was written is gone."""
        if self.blocks.pop(file.key, None):
            self._append(f"r {file.key}")

    def note_placed(self, file: PlannedFile, mtime_ns: int) -> None:
        """Note that a file is about to be renamed into place."""
        self._append(f"p {file.key} {file.nbytes} {mtime_ns} {json.dumps(file.path)}")
        self.placed[file.path] = (file.key, file.nbytes, mtime_ns)

    def note_made(self, path: str) -> None:
        """Note that a directory is about to be made."""
        self._append(f"m {json.dumps(path)}")
        self.made.append(path)

    def discard_parts(self, wanted: set[str]) -> None:
        """Delete all in the entry's directory but the parts of these versions, and the state."""
        keep = {"manifest.json", "journal", *(f"{key}.part" for key in wanted)}
        for stray in self.home.iterdir():
            if stray.name not in keep:
                stray.unlink()

    def remove(self) -> None:
        """Forget everything."""
        shutil.rmtree(self.home, ignore_errors=True)
        with contextlib.suppress(OSError):  # others are staged here, too
            self.home.parent.rmdir()

    def _append(self, line: str) -> None:
        with self._lock:
            if self._journal_fd < 0:
                raise OSError(errno.EBADF, "the journal is closed")
            # one write, appended: a process that is killed leaves a line or none
            os.write(self._journal_fd, line.encode() + b"\n")

    def _read(self) -> None:
        manifest = self.home / "manifest.json"
        if manifest.exists():
            self.manifest = _parse_manifest(_capped(manifest), str(manifest))
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        self._journal_fd = os.open(self.home / "journal", flags, 0o600)
        text = _capped(self.home / "journal")
        complete = text[: text.rfind(b"\n") + 1]
        # a power cut may leave half a line, which the next one must not continue
        if len(complete) < len(text):
            os.ftruncate(self._journal_fd, len(complete))
        for line in complete.decode(errors="replace").splitlines():
            self._replay(line)

    def _replay(self, line: str) -> None:
        if found := _BLOCK_LINE.fullmatch(line):
            self.blocks.setdefault(found[1], {})[int(found[2]), int(found[3])] = found[4]
        elif found := _RESET_LINE.fullmatch(line):
            self.blocks.pop(found[1], None)
        elif (found := _PLACED_LINE.fullmatch(line)) and (path := _quoted(found[4])) is not None:
            self.placed[path] = (found[1], int(found[2]), int(found[3]))
        elif (found := _MADE_LINE.fullmatch(line)) and (path := _quoted(found[1])) is not None:
            self.made.append(path)


def open_entry(directory: Path, name: str) -> StageEntry:
    """Open the entry of a name in DIR, made if it is not there; entering it locks it.

    Raises:
        OutputError: The directory is not ours alone.
    """
    hidden = directory / HIDDEN
    for path in (hidden, hidden / _digest(name)):
        with contextlib.suppress(FileExistsError):
            path.mkdir(mode=0o700)
        check_private(path)
    return StageEntry(directory, hidden / _digest(name))


def entries(directory: Path) -> Iterator[StageEntry]:
    """Yield all entries in DIR."""
    hidden = directory / HIDDEN
    if not os.path.lexists(hidden):
        return
    check_private(hidden)
    for home in sorted(hidden.iterdir()):
        check_private(home)
        yield StageEntry(directory, home)


def _capped(path: Path) -> bytes:
    text = read_capped(path, _MAX_BYTES)
    if text is None:
        raise OutputError.because(f"is larger than {_MAX_BYTES} bytes, and damaged", f"delete {path.parent}", path=path)
    return text


def _quoted(text: str) -> str | None:
    """Decode the path that a journal line names; None where it is not one below DIR."""
    try:
        path = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return path if is_below(path) else None


def _parse_manifest(text: bytes, where: str) -> StageManifest:
    document = parse_object(text, path=where, what="the manifest", holds_paths=True)
    if document.get("schema_version") != 1:
        raise OutputError.because(
            "was written by another version of wan-loader", "use that one, or delete it", path=where
        )
    try:
        return _manifest(Doc(document))
    except DocumentError as error:
        home = os.path.dirname(where)
        raise OutputError.because(
            f"is damaged ({error})", f"delete {home}, and what is staged, by hand", path=where
        ) from None


def _manifest(doc: Doc) -> StageManifest:
    return StageManifest(
        doc.text("source"),
        _below(doc, "name"),
        doc.boolean("is_directory"),
        tuple(_planned(file) for file in doc.docs("files")),
        doc.boolean("complete"),
    )


def _planned(doc: Doc) -> PlannedFile:
    doc.only("path", "nbytes", "mtime_ns")
    return PlannedFile(_below(doc, "path"), doc.whole("nbytes"), doc.moment("mtime_ns"))


def _below(doc: Doc, key: str) -> str:
    path = doc.text(key)
    if not is_below(path):
        raise DocumentError(f"{key} names nothing below a directory")
    return path
