"""The other end of a UNIX socket. Imports little: each program that looks for a server asks."""

from __future__ import annotations

import os
import socket
import struct

__all__ = ["MAX_FDS", "is_own_peer"]

#: The descriptors that Linux passes with one message (SCM_MAX_FD).
MAX_FDS = 253
_CREDENTIALS = struct.Struct("3i")


def is_own_peer(connection: socket.socket) -> bool:
    """Say whether a process of this user is at the other end."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    _, user, _ = _CREDENTIALS.unpack(credentials)
    return bool(user == os.geteuid())
