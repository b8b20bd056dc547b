"""The hub: the files of a repository, and the bytes of one. All through huggingface_hub, imported late.

Endpoint and token are huggingface_hub's own: HF_ENDPOINT, HF_TOKEN, or what `hf auth login` has stored. Files come by
plain HTTP with ranges, so that a download goes on at the byte where it stopped. Nothing that is sent is trusted:
names are checked here, lengths and digests by whoever downloads.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

from wan_loader import HubError, OutputError
from wan_loader.system import StoppedError

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Iterator
    from io import FileIO

__all__ = ["MAX_FILES", "Digest", "Listing", "RemoteFile"]
__all__ += ["checked_file", "explain", "list_repository", "quiet_hub", "transfer"]

MAX_FILES = 100_000
#: Whose models are on ModelScope, too, under the same names.
_ON_MODELSCOPE = "Wan-AI/"


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file of a repository, as the hub describes it."""

    path: str
    nbytes: int
    digest: str
    """`sha256:HEX` of the content, or, for small files outside large-file storage, `git:HEX`."""


@dataclass(frozen=True, slots=True)
class Listing:
    """A repository at one commit."""

    repository: str
    revision: str
    """The commit, whatever name it was asked for by."""
    files: tuple[RemoteFile, ...]
    files_at: str | None = None
    """The address that their names are put behind, if they come from elsewhere than the hub; no token is sent there."""


class Digest:
    """A digest of the kind that the hub gives for a file."""

    def __init__(self, file: RemoteFile) -> None:
        self._wanted = file.digest
        git = file.digest.startswith("git:")
        self._hash = hashlib.sha1(b"blob %d\0" % file.nbytes, usedforsecurity=False) if git else hashlib.sha256()

    def update(self, data: bytes | memoryview) -> None:
        """Add bytes, in their order."""
        self._hash.update(data)

    @property
    def found(self) -> str:
        """The digest of all bytes so far, in hex."""
        return self._hash.hexdigest()

    @property
    def is_right(self) -> bool:
        """True if it is the hub's."""
        return self._wanted.partition(":")[2] == self.found


def list_repository(repository: str, revision: str | None) -> Listing:
    """List what a repository holds.

    Raises:
        HubError: The hub does not tell, or tells what cannot be trusted; says why.
    """
    from huggingface_hub import HfApi

    try:
        info: Any = HfApi(library_name="wan-loader").model_info(repository, revision=revision, files_metadata=True)
    except Exception as error:
        raise explain(error, repository, revision) from error
    siblings = info.siblings or []
    if not isinstance(info.sha, str) or not info.sha.isalnum() or len(siblings) > MAX_FILES:
        raise HubError.because(f"the hub's answer about {repository} is not one about a model", "check HF_ENDPOINT")
    return Listing(repository, info.sha, tuple(_remote_file(repository, sibling) for sibling in siblings))


def _remote_file(repository: str, sibling: Any) -> RemoteFile:
    lfs = sibling.lfs
    digest = f"sha256:{lfs['sha256']}" if lfs else f"git:{sibling.blob_id}"
    return checked_file(repository, sibling.rfilename, sibling.size, digest)


def checked_file(repository: str, path: Any, nbytes: Any, digest: str) -> RemoteFile:
    """Make a file of what a server says; raises `HubError` for what cannot be trusted."""
    if not isinstance(path, str) or any(part in ("", ".", "..") for part in path.split("/")) or not path.isprintable():
        raise HubError.because(f"{repository} holds a file named {path!r}: not a name to be trusted")
    if type(nbytes) is not int or nbytes < 0 or not digest.partition(":")[2].isalnum():
        reason = f"the hub does not say how long {path} of {repository} is, or its hash: it cannot be checked"
        raise HubError(reason, path=path, reason=reason)
    return RemoteFile(path, nbytes, digest)


class _TooMuchError(Exception):
    """More bytes came than were promised; older versions of huggingface_hub do so where all is sent again."""


class _Sink:
    """The file as huggingface_hub writes it: counts, hashes, and looks whether to stop."""

    def __init__(
        self, file: FileIO, remote: RemoteFile, digest: Digest, stop: threading.Event, told: Callable[[int], None]
    ) -> None:
        self._file = file
        self._remote = remote
        self._stop = stop
        self._told = told
        self.digest = digest

    def write(self, data: bytes) -> int:
        """Write all of `data`, and count it."""
        if self._stop.is_set():
            raise StoppedError
        if self._file.tell() + len(data) > self._remote.nbytes:
            raise _TooMuchError
        view = memoryview(data)
        while view:
            try:
                view = view[self._file.write(view) :]
            except OSError as error:
                full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
                advice = "free space and run it again, which goes on where it stopped" if full else "check the disk"
                raise OutputError.because(
                    f"cannot be written: {error.strerror}", f"{advice}", path=self._remote.path
                ) from error
        self.digest.update(data)
        self._told(len(data))
        return len(data)

    def tell(self) -> int:
        """Return the position in the file."""
        return self._file.tell()

    def seek(self, offset: int) -> int:
        """Begin anew, where the hub sends all again instead of the rest."""
        if offset != 0:
            raise HubError.because(f"a download of {self._remote.path} cannot go on at byte {offset}")
        self._told(-self._file.tell())
        self.digest = Digest(self._remote)
        return self._file.seek(0)

    def truncate(self) -> int:
        """Cut the file off here."""
        return self._file.truncate()

    def flush(self) -> None:
        """Do nothing: the file has no buffer."""


def transfer(
    listing: Listing,
    remote: RemoteFile,
    file: FileIO,
    digest: Digest,
    *,
    stop: threading.Event,
    told: Callable[[int], None],
) -> Digest:
    """Append what is missing of a file, at whose end `file` stands.

    Args:
        listing: The repository.
        remote: The file as the hub describes it.
        file: The file here, unbuffered.
        digest: Of what is there already.
        stop: Set by whoever wants to end it.
        told: Told how many bytes have come; less than none where the hub begins anew.

    Returns:
        The digest of the whole; a wrong one if too much comes.

    Raises:
        HubError: The hub cannot be reached, or sends other than promised.
        OutputError: The bytes cannot be written.
        StoppedError: `stop` was set.
    """
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    sink = _Sink(file, remote, digest, stop, told)
    # compressed bytes would have other lengths and other offsets
    token = None if listing.files_at is None else False
    headers = build_hf_headers(library_name="wan-loader", token=token, headers={"Accept-Encoding": "identity"})
    url = hf_hub_url(listing.repository, remote.path, revision=listing.revision)
    if listing.files_at is not None:
        url = f"{listing.files_at}/{quote(remote.path)}"
    try:
        http_get(
            url,
            sink,  # type: ignore[arg-type]
            resume_size=file.tell(),
            headers=headers,
            expected_size=remote.nbytes,
            displayed_filename=remote.path,
        )
    except (StoppedError, HubError, OutputError):
        raise
    except _TooMuchError:
        return sink.digest
    except Exception as error:
        # http_get compares lengths, too; below it is said better
        if "Consistency check failed" not in str(error):
            raise explain(error, listing.repository, listing.revision, remote.path, url=url) from error
    if file.tell() != remote.nbytes:
        raise HubError.because(
            f"the hub sent {file.tell()} of the {remote.nbytes} bytes of {remote.path}", "try again later"
        )
    return sink.digest


@contextlib.contextmanager
def quiet_hub() -> Iterator[None]:
    """Silence huggingface_hub's own bars and warnings, which is undone afterwards."""
    from huggingface_hub import utils

    hub: Any = utils
    was_disabled, verbosity = hub.are_progress_bars_disabled(), hub.logging.get_verbosity()
    hub.disable_progress_bars()
    hub.logging.set_verbosity_error()
    try:
        yield
    finally:
        hub.logging.set_verbosity(verbosity)
        if not was_disabled:
            hub.enable_progress_bars()


def explain(
    error: Exception, repository: str, revision: str | None, path: str | None = None, *, url: str = ""
) -> HubError:
    """Say what went wrong, in one line. By the names of classes, as they moved between versions and HTTP libraries.

    Args:
        error: What was raised.
        repository: What was asked for.
        revision: Its revision, if one was named.
        path: The file, if it was about one.
        url: What was asked, where the error does not say it; "": the hub.
    """
    kinds = {kind.__name__ for kind in type(error).__mro__}
    status = getattr(getattr(error, "response", None), "status_code", None)
    what = f"{path} of {repository}" if path else repository
    host = _host(error, url)
    if "GatedRepoError" in kinds:
        reason = f"is gated: accept its terms on its page at {host}, then set HF_TOKEN or run `hf auth login`"
    elif "RevisionNotFoundError" in kinds:
        reason = f"has no revision {revision!r} on {host}: check --revision"
    elif "RepositoryNotFoundError" in kinds:
        reason = f"is not on the hub ({host}), or is private: check the name; for a private one set HF_TOKEN"
    elif "HFValidationError" in kinds:
        reason = "is not a name of a repository: write OWNER/NAME"
    elif status in (401, 403):
        reason = f"is not open to you ({host} answers {status}): check HF_TOKEN"
    elif status == 404:
        reason = f"is not there any more ({host} answers 404): run it again"
    elif status == 416:
        reason = f"is shorter on the hub than the hub says ({host}): try again later"
    elif status is not None:
        reason = f"cannot be had: {host} answers {status}: try again later, or {_other_source(repository, host)}"
    elif "OfflineModeIsEnabled" in kinds:
        reason = "cannot be asked for: HF_HUB_OFFLINE is set"
    else:
        detail = " ".join(str(error).split())[:200] or type(error).__name__
        remedy = f"check the network and proxies, or {_other_source(repository, host)}"
        reason = f"cannot be reached at {host}: {detail}: {remedy}"
    return HubError(f"{what} {reason}", status=status, path=path, reason=reason)


def _host(error: Exception, url: str) -> str:
    """Return the host that was asked: of the request that failed, where it is known, or the hub's."""
    from huggingface_hub import constants

    try:
        url = str(error.request.url)  # type: ignore[attr-defined]
    except (AttributeError, RuntimeError):  # httpx raises where there is no request
        url = url or constants.ENDPOINT
    return urlsplit(url).netloc.rpartition("@")[2] or "the hub"


def _other_source(repository: str, host: str) -> str:
    """Say where the same files are, if they are anywhere else."""
    if "modelscope" in host:
        return "take the files from the hub: leave out --source"
    mirror = "set HF_ENDPOINT to a mirror"
    is_there = repository.startswith(_ON_MODELSCOPE)
    return f"{mirror}, or take the same files from ModelScope: --source modelscope" if is_there else mirror
