"""The process that watches over a program which was forked: what the client is told, and what it tells."""

from __future__ import annotations

import os
import select
import signal
from contextlib import suppress
from typing import TYPE_CHECKING

from wan_loader.standby import wire

if TYPE_CHECKING:
    import socket

__all__ = ["watch"]


def watch(connection: socket.socket, fds: list[int]) -> None:
    """Fork a program, which returns, and stay until it has ended.

    Args:
        connection: To the client: signals come from there, and what becomes of the program goes there. It is this
            process's alone. When the client is gone, the program is killed.
        fds: Those of the program alone.
    """
    # a byte comes when a child has changed; what waits for it must not miss one
    ended, told = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    signal.set_wakeup_fd(told, warn_on_full_buffer=False)
    before = signal.signal(signal.SIGCHLD, lambda *_: None)
    pid = os.fork()
    if not pid:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, before)
        os.close(ended)
        os.close(told)
        connection.close()
        return
    for fd in fds:
        os.close(fd)
    connection.settimeout(None)
    is_running = True
    while is_running:
        ready, _, _ = select.select([connection.fileno(), ended], [], [])
        if ended in ready:
            os.read(ended, 4096)
            is_running = _tell_changes(connection, pid)
        if is_running and connection.fileno() in ready:
            _pass_on(connection, pid)
    os._exit(0)


def _tell_changes(connection: socket.socket, pid: int) -> bool:
    """Tell what has become of the program; say whether it goes on."""
    while True:
        found, status = os.waitpid(pid, os.WNOHANG | os.WUNTRACED)
        if not found:
            return True
        is_stopped = os.WIFSTOPPED(status)
        with suppress(OSError):  # nobody wants to know
            wire.send(connection, {"stopped": True} if is_stopped else {"ended": os.waitstatus_to_exitcode(status)})
        if not is_stopped:
            return False


def _pass_on(connection: socket.socket, pid: int) -> None:
    """Give the program a signal; SIGKILL if the client is gone."""
    message = wire.receive(connection)
    if message is None:
        os.kill(pid, signal.SIGKILL)
        os._exit(0)
    with suppress(ProcessLookupError):
        (os.killpg if message["group"] else os.kill)(pid, message["signal"])
