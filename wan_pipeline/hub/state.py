"""What `download` knows of a directory: which files it is to hold, and which of them have been checked.

DIR/.wan-loader-download/manifest.json   repository, commit, files with lengths and digests, what was checked
DIR/.wan-loader-download/KEY.part        a file that is being downloaded; KEY stands for name and digest
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from wan_loader.errors import OutputError
from wan_loader.formats.strict_json import parse_object
from wan_loader.system.files import check_private, is_below, lock_or_refuse, plain_path, read_capped, write_text
from wan_pipeline.hub.remote import RemoteFile

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from wan_pipeline.hub.layouts import Layout

__all__ = ["HIDDEN", "State", "locked_state", "read_state"]

HIDDEN = ".wan-loader-download"
_MAX_BYTES = 64 << 20
_DIGEST = re.compile(r"(sha256|git):[0-9a-f]{1,128}")


@dataclass(slots=True)
class State:
    """Of one directory. Its methods may be called from any thread."""

    directory: Path
    repository: str
    revision: str
    layout: Layout
    files: tuple[RemoteFile, ...]
    checked: dict[str, tuple[str, int, int]] = field(default_factory=dict)
    """Path -> digest, length and mtime of a file that was found to be right."""
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def part(self, file: RemoteFile) -> Path:
        """The file that is being downloaded."""
        key = hashlib.sha256(f"{file.path}\0{file.digest}".encode()).hexdigest()[:24]
        return self.directory / HIDDEN / f"{key}.part"

    def target(self, file: RemoteFile) -> Path:
        """Where it will be. Raises `OutputError` if a link is on the way."""
        return plain_path(self.directory, file.path)

    def is_checked(self, file: RemoteFile) -> bool:
        """Whether the file is there, was found to be right, and has not been touched since."""
        return self.owns(file) and self.checked[file.path][0] == file.digest

    def owns(self, file: RemoteFile) -> bool:
        """Whether what is there was found to be right for some commit, and has not been touched since."""
        return file.path in self.checked and self.checked[file.path][1:] == _facts(self.target(file))

    def note_checked(self, file: RemoteFile) -> None:
        """A file is in place and right."""
        facts = _facts(self.target(file))
        with self._lock:
            if facts is not None:
                self.checked[file.path] = (file.digest, *facts)
            self.write()

    def write(self) -> None:
        """Replace the manifest."""
        document = {
            "schema_version": 1,
            "repository": self.repository,
            "revision": self.revision,
            "layout": self.layout,
            "files": [
                {"path": f.path, "nbytes": f.nbytes, "digest": f.digest, "checked": self.checked.get(f.path)}
                for f in self.files
            ],
        }
        write_text(self.directory / HIDDEN / "manifest.json", json.dumps(document, indent=1) + "\n")

    def discard_parts(self, wanted: set[Path]) -> None:
        """Delete what no file of this commit needs."""
        for stray in (self.directory / HIDDEN).iterdir():
            if stray.name != "manifest.json" and stray not in wanted:
                stray.unlink()


def _facts(path: Path) -> tuple[int, int] | None:
    try:
        facts = os.lstat(path)
    except OSError:
        return None
    return facts.st_size, facts.st_mtime_ns


@contextlib.contextmanager
def locked_state(directory: Path) -> Iterator[State | None]:
    """Keep other downloads out of a directory; gives what an earlier one has left there."""
    hidden = directory / HIDDEN
    with contextlib.suppress(FileExistsError):
        hidden.mkdir(mode=0o700)
    check_private(hidden)
    locked = lock_or_refuse(hidden, f"{directory}: another download is going on there: wait for it")
    try:
        yield read_state(directory)
    finally:
        with contextlib.suppress(OSError):  # not empty: the state is kept
            hidden.rmdir()
        locked.close()


def read_state(directory: Path) -> State | None:
    """What a download has left in a directory; None where there was none. Raises for a damaged manifest."""
    path = directory / HIDDEN / "manifest.json"
    try:
        text = read_capped(path, _MAX_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise OutputError(f"{path} cannot be read: {error.strerror}") from error
    if text is None:
        raise _damaged(path)
    document = parse_object(text, path=str(path), what="the manifest")
    if document.get("schema_version") != 1:
        raise OutputError(f"{path} was written by another version of wan-loader: use that one, or delete it")
    repository, revision, layout, files = (document.get(k) for k in ("repository", "revision", "layout", "files"))
    if not isinstance(repository, str) or not isinstance(revision, str) or not isinstance(files, list):
        raise _damaged(path)
    if layout not in ("native", "diffusers"):
        raise _damaged(path)
    remote = tuple(_remote_file(item, path) for item in files)
    checked = {item["path"]: _checked(item.get("checked"), path) for item in files if item.get("checked") is not None}
    return State(directory, repository, revision, layout, remote, checked)


def _damaged(path: Path) -> OutputError:
    return OutputError(f"{path} is damaged: delete it and run the download again, which checks what is there")


def _remote_file(item: Any, path: Path) -> RemoteFile:
    if not isinstance(item, dict) or not is_below(item.get("path")) or type(item.get("nbytes")) is not int:
        raise _damaged(path)
    nbytes, digest = item["nbytes"], item.get("digest")
    if not 0 <= nbytes < 1 << 63 or not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
        raise _damaged(path)
    return RemoteFile(item["path"], nbytes, digest)


def _checked(value: Any, path: Path) -> tuple[str, int, int]:
    if not isinstance(value, list) or [type(v) for v in value] != [str, int, int]:
        raise _damaged(path)
    return value[0], value[1], value[2]
