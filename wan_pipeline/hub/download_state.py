"""The state of a download: which files a directory is to hold, and which of them have been checked.

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
from typing import TYPE_CHECKING, cast

from wan_loader import OutputError
from wan_loader.documents import Doc, DocumentError
from wan_loader.formats import parse_object
from wan_loader.system import check_private, is_below, lock_or_refuse, plain_path, read_capped, write_text
from wan_pipeline.hub.remote import RemoteFile

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from wan_pipeline.hub.layouts import Layout

__all__ = ["HIDDEN", "DownloadState", "locked_state", "read_state"]

HIDDEN = ".wan-loader-download"
_MAX_BYTES = 64 << 20
_DIGEST = re.compile(r"(sha256|git):[0-9a-f]{1,128}")


@dataclass(slots=True)
class DownloadState:
    """The state of one directory. Its methods may be called from any thread."""

    directory: Path
    repository: str
    revision: str
    layout: Layout
    files: tuple[RemoteFile, ...]
    checked: dict[str, tuple[str, int, int]] = field(default_factory=dict)
    """Path -> digest, length and mtime of a file that was found to be right."""
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def part(self, file: RemoteFile) -> Path:
        """Return the path of a file while it is being downloaded."""
        key = hashlib.sha256(f"{file.path}\0{file.digest}".encode()).hexdigest()[:24]
        return self.directory / HIDDEN / f"{key}.part"

    def target(self, file: RemoteFile) -> Path:
        """Return the path that a file will have.

        Raises:
            OutputError: A link is on the way.
        """
        return plain_path(self.directory, file.path)

    def is_checked(self, file: RemoteFile) -> bool:
        """Return True if the file is there, was found to be right, and has not been touched since."""
        return self.owns(file) and self.checked[file.path][0] == file.digest

    def owns(self, file: RemoteFile) -> bool:
        """Return True if what is there was found to be right for some commit, and has not been touched since."""
        return file.path in self.checked and self.checked[file.path][1:] == _facts(self.target(file))

    def note_checked(self, file: RemoteFile) -> None:
        """Take note that a file is in place and right."""
        facts = _facts(self.target(file))
        with self._lock:
            # under the lock: files end in several threads, and each writes the whole manifest
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
        # of the link itself, where there is one: it was not what was checked
        facts = os.lstat(path)
    except OSError:
        return None
    return facts.st_size, facts.st_mtime_ns


@contextlib.contextmanager
def locked_state(directory: Path) -> Iterator[DownloadState | None]:
    """Keep other downloads out of a directory; gives what an earlier one has left there."""
    hidden = directory / HIDDEN
    # for this user alone: others could put their own content there
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


def read_state(directory: Path) -> DownloadState | None:
    """Read what a download has left in a directory; None where there was none.

    Raises:
        OutputError: The manifest is damaged, or cannot be read.
    """
    path = directory / HIDDEN / "manifest.json"
    try:
        text = read_capped(path, _MAX_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise OutputError.because(f"cannot be read: {error.strerror}", path=path) from error
    if text is None:
        raise _damaged(path, f"larger than {_MAX_BYTES} bytes")
    document = parse_object(text, path=str(path), what="the manifest")
    if document.get("schema_version") != 1:
        raise OutputError.because(
            "was written by another version of wan-loader", "use that one, or delete it", path=path
        )
    try:
        return _state(Doc(document), directory)
    except DocumentError as error:
        raise _damaged(path, str(error)) from None


def _damaged(path: Path, why: str) -> OutputError:
    remedy = "delete it and run the download again, which checks what is there"
    return OutputError.because(f"is damaged ({why})", remedy, path=path)


def _state(doc: Doc, directory: Path) -> DownloadState:
    layout = cast("Layout", doc.choice("layout", ("native", "diffusers")))
    files = [(_remote_file(item), _checked(item)) for item in doc.docs("files")]
    checked = {file.path: facts for file, facts in files if facts is not None}
    return DownloadState(
        directory, doc.text("repository"), doc.text("revision"), layout, tuple(file for file, _ in files), checked
    )


def _remote_file(doc: Doc) -> RemoteFile:
    path, digest = doc.text("path"), doc.text("digest")
    if not is_below(path) or not _DIGEST.fullmatch(digest):
        raise DocumentError("a file has no path below a directory, or no digest")
    return RemoteFile(path, doc.whole("nbytes"), digest)


def _checked(doc: Doc) -> tuple[str, int, int] | None:
    """Read the digest, length and mtime of a file that was found to be right; None if it was not checked."""
    value = doc.optional_list("checked")
    if value is None:
        return None
    if [type(v) for v in value] != [str, int, int]:
        raise DocumentError("checked is not a digest, a length and a time")
    return value[0], value[1], value[2]
