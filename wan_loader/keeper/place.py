"""The place where the keeper of a user and its clients meet: a socket in a directory that nobody else may enter.

It is reached through a descriptor of the directory, which was checked: nothing can be put in its place in between, and
the length of its path does not matter, of which addresses of sockets have only 107 bytes.
"""

from __future__ import annotations

import fcntl
import os
import socket
import stat
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from wan_loader.errors import KeepError
from wan_loader.system.peers import is_own_peer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

__all__ = ["KEEPER_LOG", "connect", "forget", "listen", "opened", "watch"]

_NAME = "keeper.socket"
_LOCK = "keeper.lock"
#: What the keeper says, if anything.
KEEPER_LOG = "keeper.log"


@contextmanager
def opened(directory: Path, *, create: bool = False) -> Iterator[int]:
    """Yield a descriptor of the directory.

    Args:
        directory: The directory.
        create: Make it, if it is not there.

    Raises:
        FileNotFoundError: It is not there.
        KeepError: It is not a directory of the user's alone.
    """
    try:
        if create:
            with suppress(FileExistsError):
                directory.mkdir(mode=0o700)
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise KeepError.because(f"cannot hold the keeper's socket: {error.strerror}", path=directory) from error
    try:
        facts = os.fstat(fd)
        if facts.st_uid != os.geteuid() or stat.S_IMODE(facts.st_mode) & 0o077:
            reason = f"is open to others (owner {facts.st_uid}, mode {stat.S_IMODE(facts.st_mode):o}): it is not used"
            raise KeepError.because(reason, "remove it", path=directory)
        yield fd
    finally:
        os.close(fd)


def _address(directory_fd: int) -> str:
    return f"/proc/self/fd/{directory_fd}/{_NAME}"


def connect(directory: Path, timeout_s: float) -> socket.socket | None:
    """Return a connection to the keeper; None if there is none: no socket, or one that a killed keeper left.

    Raises:
        KeepError: The directory or the keeper is another user's, or the keeper does not take the connection.
    """
    link = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        link.settimeout(timeout_s)
        with opened(directory) as fd:
            link.connect(_address(fd))
        if not is_own_peer(link):
            raise KeepError.because("the keeper's socket belongs to another user: it is not used", path=directory)
    except (FileNotFoundError, ConnectionRefusedError):
        link.close()
        return None
    except KeepError:
        link.close()
        raise
    except OSError as error:
        link.close()
        raise KeepError.because(f"the keeper does not answer: {error}", path=directory) from error
    return link


def listen(directory: Path) -> tuple[socket.socket, int] | None:
    """Become the keeper: return the socket, and a descriptor to be left open, whose lock says that there is one.

    Returns:
        None if there is a keeper already.

    Raises:
        KeepError: The directory is not the user's alone, or cannot be written.
    """
    with opened(directory, create=True) as fd:
        lock = os.open(_LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600, dir_fd=fd)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            return None
        server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            # whoever made it is gone: the lock is ours
            with suppress(FileNotFoundError):
                os.unlink(_NAME, dir_fd=fd)
            server.bind(_address(fd))
            server.listen(64)
        except OSError as error:
            server.close()
            os.close(lock)
            raise KeepError.because(f"cannot hold the keeper's socket: {error.strerror}", path=directory) from error
    return server, lock


def watch(directory: Path) -> Callable[[], bool]:
    """Return a function that says whether the socket there is still the one that is there now."""

    def facts() -> tuple[int, int] | None:
        try:
            found = os.stat(directory / _NAME, follow_symlinks=False)
        except OSError:
            return None
        return found.st_dev, found.st_ino

    at_first = facts()
    return lambda: at_first is not None and facts() == at_first


def forget(directory: Path) -> None:
    """Remove the socket of a keeper that is about to end."""
    with opened(directory) as fd:
        os.unlink(_NAME, dir_fd=fd)
