"""The messages between the keeper and its clients: a small JSON object each, with descriptors beside it.

A connection carries one request and its answer, and another request of the same client if it puts what it has
reserved. Then it stays open for as long as the client uses what it was given.
"""

from __future__ import annotations

import json
import os
import socket
from typing import Any

from wan_loader.errors import KeepError
from wan_loader.system.peers import MAX_FDS

__all__ = ["PROTOCOL", "close_all", "receive", "send"]

#: Keeper and client must agree on it.
PROTOCOL = 1
_MAX_BYTES = 1 << 16


def send(link: socket.socket, message: dict[str, Any], fds: list[int] | tuple[int, ...] = ()) -> None:
    """Send a message; descriptors stay open here, too.

    Raises:
        OSError: The other side is gone, or does not take it in time.
    """
    text = json.dumps({"protocol": PROTOCOL, **message}).encode()
    socket.send_fds(link, [text], list(fds))


def receive(link: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """Receive a message, and the descriptors that came with it, which are ours now.

    Raises:
        EOFError: The other side is gone.
        OSError: It said nothing in time.
        KeepError: It said something else than a message, or this process may not open that many files.
    """
    text, fds, flags, _ = socket.recv_fds(link, _MAX_BYTES, MAX_FDS, socket.MSG_CMSG_CLOEXEC)
    try:
        if not text and not fds:
            raise EOFError("the other side is gone")
        if flags & socket.MSG_CTRUNC:
            raise KeepError.because("not all descriptors arrived", "allow more open files (ulimit -n)")
        try:
            message = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise KeepError("what came is no message of a keeper") from error
        if flags & socket.MSG_TRUNC or not isinstance(message, dict):
            raise KeepError("what came is no message of a keeper")
    except BaseException:
        close_all(fds)
        raise
    return message, fds


def close_all(fds: list[int] | tuple[int, ...]) -> None:
    """Close descriptors."""
    for fd in fds:
        os.close(fd)
