"""UNIX sockets of one user's processes. Imports little: each program that looks for a server asks."""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import socket

__all__ = ["MAX_FDS", "is_own_peer", "not_private", "own_directory"]

#: The descriptors that Linux passes with one message (SCM_MAX_FD).
MAX_FDS = 253


def is_own_peer(connection: socket.socket) -> bool:
    """Say whether a process of this user is at the other end."""
    import socket
    import struct

    kind = struct.Struct("3i")
    _, user, _ = kind.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, kind.size))
    return bool(user == os.geteuid())


def own_directory() -> str:
    """Return the directory of this user's sockets, which need not be there: below what the session gives, or /tmp."""
    user = os.geteuid()
    for path in (os.environ.get("XDG_RUNTIME_DIR"), f"/run/user/{user}"):
        if path and os.path.isabs(path) and not not_private(path):
            return os.path.join(path, "wan-loader")
    return f"/tmp/wan-loader-{user}"


def not_private(path: str) -> str:
    """Say why a directory is not this user's alone; nothing if it is."""
    try:
        facts = os.lstat(path)
    except OSError as error:
        return error.strerror or "cannot be looked at"
    if not stat.S_ISDIR(facts.st_mode):
        return "is no directory"
    if facts.st_uid != os.geteuid():
        return "is somebody else's"
    return "others may enter it" if facts.st_mode & 0o077 else ""
