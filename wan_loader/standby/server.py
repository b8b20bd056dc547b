"""The stand-by server: it imports, listens, and forks for each request; it ends when nobody has asked for long.

    server        one thread, no CUDA, holds the lock; begins anew (by exec) when the environment has changed
      watcher     a fork for each request: checks it, and tells the client what becomes of the program
        program   a fork of that, in a process group of its own; killed when the watcher ends

So a server that is killed takes no program with it, and a client that is killed does. A server listens only while it
can serve: whoever finds none goes on without.
"""

from __future__ import annotations

import fcntl
import json
import os
import select
import socket
import sys
import time
from contextlib import suppress
from typing import Any, NoReturn

from wan_loader.standby import place, program, wire
from wan_loader.standby.imports import Unforkable, joined_modules
from wan_loader.standby.learned import Learned
from wan_loader.standby.prepared import Prepared, prepare
from wan_loader.standby.refusals import refusal
from wan_loader.standby.watcher import watch
from wan_loader.standby.world import FIRST_OWN
from wan_loader.system.peers import is_own_peer

__all__ = ["Server", "main"]

#: How often a server looks whether something was learned.
_TICK_S = 1.0
#: How long a client may take to say what it wants.
_PATIENCE_S = 5.0
_BACKLOG = 128


def main(settings: str) -> NoReturn:
    """Serve, and be the program that is asked for; see `control.start` for the settings, as JSON."""
    while (fd := os.open(os.devnull, os.O_RDWR)) < FIRST_OWN:  # numbers that programs may want
        pass
    os.close(fd)
    Server(**json.loads(settings)).run()


class Server:
    """A server, from its start until it ends or begins anew.

    Args:
        modules: Modules to import beside those that programs need or have needed.
        idle_s: It ends after so many seconds without a request.
        only: Import nothing but `modules`.
        left_out: Module -> why it must not be imported.
        lock: The descriptor that holds the lock, if this is a server that begins anew.
    """

    def __init__(
        self,
        modules: list[str],
        idle_s: float,
        only: bool,
        left_out: dict[str, str] | None = None,
        lock: int = -1,
    ) -> None:
        self._modules, self._idle_s, self._only = modules, idle_s, only
        self._left_out, self._lock = left_out or {}, lock
        self._environ = dict(os.environ)
        self._learned = Learned()
        self._seen_ns = self._learned.changed_ns()
        self._socket = 0

    def run(self) -> NoReturn:
        """Import everything, and serve. In a fork, run the program that it is for."""
        self._take_lock()
        names = self._wanted()
        try:
            prepared = prepare(names, self._environ)
        except Unforkable as found:
            self._left_out[found.module.partition(".")[0]] = found.why
            self._begin_anew()
        with socket.socket(socket.AF_UNIX) as listener:
            beside = f"{place.socket_path()}.{os.getpid()}"
            listener.bind(beside)
            listener.listen(_BACKLOG)
            os.rename(beside, place.socket_path())
            self._socket = _number(place.socket_path())
            connection, changed = self._next(listener, prepared, set(names))
        os.close(self._lock)
        self._answer(connection, prepared, changed)

    def _take_lock(self) -> None:
        """Be the only server of this environment, or end."""
        if self._lock < 0:
            self._lock = os.open(place.lock_path(), os.O_RDWR | os.O_CREAT, 0o600)
        os.set_inheritable(self._lock, False)
        try:
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # forks do not have it, and exec keeps it
        except OSError:
            sys.exit("another server is there")
        with suppress(FileNotFoundError):
            os.unlink(place.socket_path())

    def _wanted(self) -> list[str]:
        others = [] if self._only else [*joined_modules(), *self._learned.modules()]
        names = dict.fromkeys([*others, *self._modules])
        return [name for name in names if name.partition(".")[0] not in self._left_out]

    def _next(self, listener: socket.socket, prepared: Prepared, tried: set[str]) -> tuple[socket.socket, str]:
        """Wait for requests, and fork for each.

        Returns:
            In the fork, the connection to the client, and the file that is not what was imported.
        """
        asked = time.monotonic()
        while True:
            is_asked = bool(select.select([listener], [], [], min(_TICK_S, self._idle_s))[0])
            with suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
            if is_asked:
                asked = time.monotonic()
                with suppress(OSError), listener.accept()[0] as connection:  # no memory, say: it goes on without
                    if is_own_peer(connection):
                        changed = prepared.changed()
                        if not os.fork():
                            return connection.dup(), changed
                        if changed:
                            self._begin_anew()
            elif _number(place.socket_path()) != self._socket:  # nobody can ask: the end of a session removes it, say
                os._exit(0)
            elif time.monotonic() - asked >= self._idle_s:
                os.unlink(place.socket_path())
                os._exit(0)
            if self._learned.changed_ns() != self._seen_ns:
                self._seen_ns = self._learned.changed_ns()
                if not tried.issuperset(self._wanted()):
                    self._begin_anew()

    def _begin_anew(self) -> NoReturn:
        """Become a new server, as which nothing has been imported yet."""
        with suppress(FileNotFoundError):
            os.unlink(place.socket_path())
        os.set_inheritable(self._lock, True)
        settings = {"modules": self._modules, "idle_s": self._idle_s, "only": self._only}
        settings |= {"left_out": self._left_out, "lock": self._lock}
        os.execve(sys.executable, [*sys.orig_argv[:-1], json.dumps(settings)], self._environ)

    def _answer(self, connection: socket.socket, prepared: Prepared, changed: str) -> NoReturn:
        """Be the watcher of a program, and in its process the program; or tell why not, or of the server."""
        connection.settimeout(_PATIENCE_S)
        given, goes, fds = None, None, list[int]()
        with suppress(OSError):  # the client is gone
            given = wire.receive(connection)
            answer = self._decide(prepared, changed, given or {})
            wire.send(connection, answer)
            if "ready" in answer:
                goes, fds = wire.receive_all(connection)
        if given is None or goes is None:  # one that has waited too long has gone on without
            os._exit(0)
        watch(connection, fds)
        program.run(prepared, self._learned, given, fds)

    def _decide(self, prepared: Prepared, changed: str, given: dict[str, Any]) -> dict[str, Any]:
        if "argv" not in given:
            about = {"n_modules": len(prepared.modules), "seconds": prepared.seconds, "failed": prepared.failed}
            return {"pid": os.getppid(), **about, "left_out": self._left_out}
        if changed:
            return {"direct": f"{changed} has changed, and the server imports it again"}
        why = refusal(prepared, self._learned, given)
        return {"direct": why} if why else {"ready": True}


def _number(path: str) -> int:
    """Return what tells a file from another that has its name; 0 if there is none."""
    with suppress(OSError):
        return os.lstat(path).st_ino
    return 0
