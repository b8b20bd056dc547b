"""Downloads of what text-to-video needs of WAN2.2: resumable at the byte, checked against the hub's lengths and hashes.

A file comes under a temporary name, is hashed while it comes, and is renamed into place only if its hash is the hub's:
a file that is there is right. What is there already is hashed once, whoever downloaded it.
"""

from __future__ import annotations

import os
import shutil
import threading
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from wan_loader import HubError, OptionError, OutputError, WanLoaderError, clock_ns
from wan_loader.sizes import format_bytes
from wan_loader.system import StoppedError, run_all
from wan_pipeline.hub.download_state import DownloadState, locked_state, read_state
from wan_pipeline.hub.layouts import REPOSITORIES, layouts_in, missing_files, wanted_files
from wan_pipeline.hub.modelscope import list_on_modelscope
from wan_pipeline.hub.remote import Digest, RemoteFile, list_repository, quiet_hub, transfer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from wan_loader import StrPath
    from wan_pipeline.hub.layouts import Layout
    from wan_pipeline.hub.remote import Listing

    Progress = Callable[[str, int, int], None]

__all__ = ["Downloaded", "Source", "Status", "download"]

_THREADS = 8
_ATTEMPTS = 4
_PAUSE_S = 1.0
_BLOCK_BYTES = 4 << 20

#: checked: there and right; unchecked: there, of the right length; partial: begun; wrong: there, of another length.
Status = Literal["checked", "unchecked", "partial", "missing", "wrong"]


Source = Literal["hub", "modelscope"]


@dataclass(frozen=True, slots=True)
class Downloaded:
    """A download that has ended: what there was to do, and what was done (nothing, if it was only asked for)."""

    directory: str
    repository: str
    revision: str
    layout: Layout
    files: tuple[tuple[RemoteFile, Status], ...]
    """All files, with the state in which they were found."""
    nbytes: int
    """The bytes of all files."""
    nbytes_missing: int
    """The bytes that had to be downloaded when it began."""
    nbytes_received: int
    nbytes_hashed: int
    """The bytes of files that were there and had not been checked."""
    seconds: float


def download(
    directory: StrPath,
    repository: str | None = None,
    *,
    layout: Layout | None = None,
    revision: str | None = None,
    source: Source = "hub",
    dry_run: bool = False,
    force: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Downloaded:
    """Download a WAN2.2 checkpoint from the hub, or what is missing of it.

    After an error or an interruption, the same call goes on where it stopped.

    Args:
        directory: The place for it; it is made if only its last part is missing.
        repository: OWNER/NAME; T2V-A14B in `layout` if None.
        layout: The layout to take; None takes what the repository holds, and native where no repository is named.
        revision: A branch, a tag or a commit; None is the default branch.
        source: Where the files come from; ModelScope has Wan-AI's repositories under the same names.
        dry_run: Ask the hub, write nothing.
        force: Replace files that are there and are others than the hub's.
        threads: The number of files at a time (8).
        progress: Told (step, done, total) bytes.

    Raises:
        HubError: No network, no such repository or revision, gated, other bytes than promised.
        OptionError: The repository is not WAN2.2 in that layout.
        OutputError: The target cannot be written, is too small or holds other files.
    """
    start_ns = clock_ns()
    place = Path(directory)
    try:
        with quiet_hub():
            list_files = list_on_modelscope if source == "modelscope" else list_repository
            listing = list_files(repository or REPOSITORIES[layout or "native"], revision)
            chosen, files = _choose(listing, layout)
            state = DownloadState(place, listing.repository, listing.revision, chosen, files)
            if dry_run:
                job = _DownloadJob(listing, _with_history(state, read_state(place)), threads, progress)
                job.look()
            else:
                _make_directory(place)
                with locked_state(place) as before:
                    job = _DownloadJob(listing, _with_history(state, before), threads, progress)
                    job.look()
                    job.run(force)
    except WanLoaderError:
        raise
    except OSError as error:
        reason = f"{error.filename or ''}: {error.strerror or error}"
        raise OutputError(f"cannot download to {place}: {reason}", path=place, reason=reason) from error
    return Downloaded(
        directory=str(place),
        repository=listing.repository,
        revision=listing.revision,
        layout=chosen,
        files=tuple(job.found.items()),
        nbytes=sum(file.nbytes for file in files),
        nbytes_missing=job.nbytes_missing,
        nbytes_received=job.nbytes_received,
        nbytes_hashed=job.nbytes_hashed,
        seconds=(clock_ns() - start_ns) / 1e9,
    )


def _choose(listing: Listing, layout: Layout | None) -> tuple[Layout, tuple[RemoteFile, ...]]:
    names = [file.path for file in listing.files]
    held = layouts_in(names)
    if not held:
        raise OptionError.because(f"{listing.repository} is no WAN2.2 repository in the native or the diffusers layout")
    chosen = layout or held[0]
    if chosen not in held:
        raise OptionError.because(
            f"{listing.repository} holds the {held[0]} layout", f"use --layout {held[0]}, or another name"
        )
    wanted = set(wanted_files(names, chosen))
    return chosen, tuple(file for file in listing.files if file.path in wanted)


def _with_history(state: DownloadState, before: DownloadState | None) -> DownloadState:
    """Add what was found right of this repository; another one's files are replaced like anybody's, only by force."""
    if before is not None and before.repository == state.repository:
        state.checked.update(before.checked)
    return state


def _make_directory(place: Path) -> None:
    if place.is_dir():
        return
    if os.path.lexists(place):
        raise OutputError.because("is not a directory", "name another place", path=place)
    if not place.absolute().parent.is_dir():
        raise OutputError.because("does not exist", "is the disk mounted?", path=place.absolute().parent)
    place.mkdir()


class _DownloadJob:
    """A run of `download`."""

    def __init__(self, listing: Listing, state: DownloadState, threads: int | None, progress: Progress | None) -> None:
        self._listing = listing
        self._state = state
        self._threads = threads or _THREADS
        self._progress = progress
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._done = 0
        self._differs: list[RemoteFile] = []
        self.found: dict[RemoteFile, Status] = {}
        self.nbytes_missing = 0
        self.nbytes_received = 0
        self.nbytes_hashed = 0

    def look(self) -> None:
        """Find out what is there; read no file."""
        for file in self._state.files:
            self.found[file] = self._status(file)
        fetched = [f for f, status in self.found.items() if status in ("missing", "partial", "wrong")]
        self.nbytes_missing = sum(f.nbytes - self._nbytes_of_part(f) for f in fetched)

    def _status(self, file: RemoteFile) -> Status:
        target = self._state.target(file)
        if self._state.is_checked(file):
            return "checked"
        if os.path.lexists(target) and not self._state.owns(file):
            same = target.is_file() and not target.is_symlink() and target.stat().st_size == file.nbytes
            return "unchecked" if same else "wrong"
        return "partial" if self._nbytes_of_part(file) else "missing"

    def _nbytes_of_part(self, file: RemoteFile) -> int:
        try:
            return min(file.nbytes, os.lstat(self._state.part(file)).st_size)
        except OSError:
            return 0

    def run(self, force: bool) -> None:
        """Check what nobody has checked, then download what is missing or wrong."""
        state = self._state
        self._refuse_foreign([f for f, status in self.found.items() if status == "wrong"], force)
        unchecked = [f for f, status in self.found.items() if status == "unchecked"]
        self._each("checking", (partial(self._check, f) for f in unchecked), sum(f.nbytes for f in unchecked))
        self._refuse_foreign(self._differs, force)
        todo = [f for f, status in self.found.items() if status not in ("checked", "unchecked")] + self._differs
        self._check_space(todo)
        # before the first byte: the next run knows by it which files are these
        state.write()
        state.discard_parts({state.part(file) for file in todo})
        todo.sort(key=lambda file: -file.nbytes)  # so that no long one is left at the end
        total = sum(file.nbytes for file in todo)
        self._each("downloading", (partial(self._fetch, file) for file in todo), total)
        state.discard_parts(set())
        if missing := missing_files(state.directory, state.layout):
            raise HubError.because(f"{self._listing.repository} itself lacks {', '.join(missing)}: it is not complete")

    def _refuse_foreign(self, files: Sequence[RemoteFile], force: bool) -> None:
        directories = [file for file in files if self._state.target(file).is_dir()]
        if files and (directories or not force):
            names = ", ".join(str(self._state.target(file)) for file in (directories or files)[:3])
            reason = "is a directory" if directories else "is there and differs from what the hub has"
            remedy = "choose another --to, or replace it with --force"
            first = self._state.target((directories or files)[0])
            message = f"{names} {reason} ({len(files)} in all): {remedy}"
            raise OutputError(message, path=first, reason=reason, remedy=remedy)

    def _check_space(self, todo: Iterable[RemoteFile]) -> None:
        needed = sum(file.nbytes - self._nbytes_of_part(file) for file in todo)
        free = shutil.disk_usage(self._state.directory).free
        if needed > free:
            raise OutputError.because(
                f"has {format_bytes(free)} free, {format_bytes(needed)} are to be downloaded",
                "free space, or choose another --to",
                path=self._state.directory,
            )

    def _each(self, step: str, tasks: Iterable[Callable[[], None]], total: int) -> None:
        self._done = 0
        tick = None if self._progress is None else lambda: self._progress(step, self._done, total)  # type: ignore[misc]
        run_all(tasks, threads=self._threads, stop=self._stop, tick=tick)

    def _check(self, file: RemoteFile) -> None:
        """Hash a file that somebody put there."""
        with self._state.target(file).open("rb", buffering=0) as opened:
            digest = self._hash(opened.fileno(), file)
        with self._lock:
            self.nbytes_hashed += file.nbytes
            if not digest.is_right:
                self._differs.append(file)
                return
        self._state.note_checked(file)

    def _hash(self, fd: int, file: RemoteFile) -> Digest:
        """Return the digest of what is there; its bytes count as done."""
        digest, position, buffer = Digest(file), 0, memoryview(bytearray(_BLOCK_BYTES))
        while count := os.preadv(fd, [buffer], position):
            if self._stop.is_set():
                raise StoppedError
            digest.update(buffer[:count])
            position += count
            self._advance(count)
        return digest

    def _advance(self, nbytes: int) -> None:
        with self._lock:
            self._done += nbytes

    def _received(self, nbytes: int) -> None:
        with self._lock:
            self._done += nbytes
            self.nbytes_received += max(0, nbytes)

    def _fetch(self, file: RemoteFile) -> None:
        """Download until the file is right; a broken connection is taken up again, other bytes than promised once."""
        failures = mismatches = 0
        while True:
            before = self._nbytes_of_part(file)
            try:
                right = self._transfer(file)
            except HubError as error:
                # a connection that brings something before it breaks may break as often as it likes
                failures = 0 if self._nbytes_of_part(file) > before else failures + 1
                if failures == _ATTEMPTS or error.status in (401, 403, 404):
                    raise
                if self._stop.wait(_PAUSE_S * failures):
                    raise StoppedError from error
                continue
            if right:
                break
            self._advance(-self._nbytes_of_part(file))
            self._state.part(file).unlink()
            # once may be a proxy that took up the wrong byte; twice, the hub and its hash disagree
            mismatches += 1
            if mismatches == 2:
                raise HubError.because(
                    f"came twice with another content than the hub's hash ({file.digest}) stands for",
                    "check proxies and mirrors, or try again later",
                    path=file.path,
                )
        self._place(file)

    def _transfer(self, file: RemoteFile) -> bool:
        """Get the rest of a file; return whether the whole is right. Bytes count as done while they are in the part."""
        part = self._state.part(file)
        # not through a link: it would be somebody else's
        fd = os.open(part, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        with open(fd, "r+b", buffering=0) as opened:
            # of an older revision, or of another program
            if os.fstat(fd).st_size > file.nbytes:
                opened.truncate(0)
            digest = self._hash(fd, file)
            opened.seek(0, os.SEEK_END)
            try:
                if opened.tell() < file.nbytes:
                    digest = transfer(self._listing, file, opened, digest, stop=self._stop, told=self._received)
            except HubError:
                self._advance(-opened.tell())  # counted again when it is hashed again
                raise
            # before the rename: after a crash no name may stand over less than the whole
            os.fsync(fd)
        return digest.is_right

    def _place(self, file: RemoteFile) -> None:
        target = self._state.target(file)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(self._state.part(file), target)
        self._state.note_checked(file)
