"""What client and server say: JSON documents over a UNIX socket, each behind its length, descriptors with the first.

Both ends are processes of one user, which either checks; so a document is taken as it is.
"""

from __future__ import annotations

import json
import socket
import struct
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from wan_loader.system.peers import MAX_FDS

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["receive", "receive_all", "send"]

_LENGTH = struct.Struct("!I")


def send(connection: socket.socket, document: dict[str, Any], fds: Sequence[int] = ()) -> None:
    """Send a document, and descriptors with it.

    Raises:
        OSError: Nobody reads.
    """
    body = json.dumps(document).encode()
    head = _LENGTH.pack(len(body))
    if fds:
        sent = socket.send_fds(connection, [head], list(fds))
        head = head[sent:]
    connection.sendall(head + body)


def receive(connection: socket.socket) -> dict[str, Any] | None:
    """Wait for a document; None if the other end is gone, or says nothing before the socket's time is over."""
    return receive_all(connection, 0)[0]


def receive_all(connection: socket.socket, n_fds: int = MAX_FDS) -> tuple[dict[str, Any] | None, list[int]]:
    """Wait for a document and the descriptors that came with it."""
    fds: list[int] = []
    with suppress(OSError, ValueError):
        head, fds, _, _ = socket.recv_fds(connection, _LENGTH.size, n_fds)
        head += _exactly(connection, _LENGTH.size - len(head)) if head else b""
        if len(head) == _LENGTH.size:
            return json.loads(_exactly(connection, *_LENGTH.unpack(head))), fds
    return None, fds


def _exactly(connection: socket.socket, nbytes: int) -> bytes:
    parts = []
    while nbytes and (part := connection.recv(min(nbytes, 1 << 20))):
        parts.append(part)
        nbytes -= len(part)
    return b"".join(parts)
