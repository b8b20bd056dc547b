"""The stand-by server: it imports, listens, and forks for each request; it ends when nobody has asked for long.

    server        one thread, no CUDA, holds the lock; begins anew (by exec) when the environment has changed
      watcher     a fork for each request: checks it, and tells the client what becomes of the program
        program   a fork of that, in a process group of its own; killed when the watcher ends

So a server that is killed takes no program with it, and a client that is killed does. A server listens only while it
can serve: whoever finds none goes on without.
"""

from __future__ import annotations

import fcntl
import gc
import importlib
import json
import os
import select
import signal
import socket
import sys
import time
from contextlib import suppress
from importlib.machinery import all_suffixes
from typing import Any, NoReturn

import wan_loader
from wan_loader.standby import place, wire, world
from wan_loader.standby.ending import run_to_end
from wan_loader.standby.imports import Unforkable, files_of_modules, import_all, joined_modules
from wan_loader.standby.learned import Learned
from wan_loader.standby.variables import NOT_COMPARED, comes_late, different, names_set, recorded_reads, watch_writes
from wan_loader.standby.watcher import watch

__all__ = ["Server", "main"]

#: How often a server looks whether something was learned.
_TICK_S = 1.0
#: How long a client may take to say what it wants.
_PATIENCE_S = 5.0
_BACKLOG = 128


def main(settings: str) -> NoReturn:
    """Serve, and be the program that is asked for; see `control.start` for the settings, as JSON."""
    while (fd := os.open(os.devnull, os.O_RDWR)) < world.FIRST_OWN:  # numbers that programs may want
        pass
    os.close(fd)
    server = Server(**json.loads(settings))
    server.take_lock()
    server.prepare()
    entry = server.serve()
    module, _, function = entry.partition(":")
    run_to_end(getattr(importlib.import_module(module), function), server.known)


class Server:
    """What a server knows; its forks have a copy.

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
        self._environ = dict(os.environ)
        self._left_out = left_out or {}
        self._locked = lock
        self._learned = Learned()
        self._tried: set[str] = set()
        self._reads: set[str] = set()
        self._set_by_imports: dict[str, str | None] = {}
        self._files: dict[str, tuple[int, int, int]] = {}
        self._outdated = ""
        self._facts: dict[str, Any] = {}
        self.known: frozenset[str] = frozenset()
        """The modules that its forks have from it."""
        self._seen_ns = 0

    def take_lock(self) -> None:
        """Be the only server of this environment, or end."""
        if self._locked < 0:
            self._locked = os.open(place.lock_path(), os.O_RDWR | os.O_CREAT, 0o600)
        os.set_inheritable(self._locked, False)
        try:
            fcntl.lockf(self._locked, fcntl.LOCK_EX | fcntl.LOCK_NB)  # forks do not have it, and exec keeps it
        except OSError:
            sys.exit("another server is there")
        with suppress(FileNotFoundError):
            os.unlink(place.socket_path())

    def prepare(self) -> None:
        """Import everything."""
        begin, before = time.monotonic(), self._environ
        self._seen_ns = self._learned.changed_ns()
        names = self._wanted()
        gc.disable()
        with recorded_reads() as self._reads:
            try:
                failed = import_all(names).failed
            except Unforkable as found:
                self._left_out[found.module.partition(".")[0]] = found.why
                self._begin_anew()
        if "torch" in sys.modules:  # in a fork this would take longer than all the rest
            wan_loader.install()
        gc.collect()
        gc.freeze()  # nothing of it is looked at again, or copied into a fork
        self._tried = set(names)
        self._set_by_imports = {
            name: os.environ.get(name)
            for name in {*before, *os.environ} - NOT_COMPARED
            if before.get(name) != os.environ.get(name)
        }
        self._files = files_of_modules()
        self.known = frozenset(sys.modules)
        self._facts = {
            "pid": os.getpid(),
            "n_modules": len(sys.modules),
            "seconds": time.monotonic() - begin,
            "failed": failed,
            "left_out": self._left_out,
            "identity": world.identity(),
        }

    def _wanted(self) -> list[str]:
        others = [] if self._only else [*joined_modules(), *self._learned.modules()]
        names = dict.fromkeys([*self._modules, *others])
        return [name for name in names if name.partition(".")[0] not in self._left_out]

    def serve(self) -> str:
        """Listen. Returns in the process of a program alone, with what it is to call."""
        with socket.socket(socket.AF_UNIX) as listener:
            beside = f"{place.socket_path()}.{os.getpid()}"
            listener.bind(beside)
            listener.listen(_BACKLOG)
            os.rename(beside, place.socket_path())
            connection = self._next(listener)
        os.close(self._locked)
        return self._begin(connection)

    def _next(self, listener: socket.socket) -> socket.socket:
        """Wait for requests, and fork for each; returns in the fork."""
        asked = time.monotonic()
        while True:
            is_asked = bool(select.select([listener], [], [], min(_TICK_S, self._idle_s))[0])
            with suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
            if is_asked:
                asked = time.monotonic()
                with suppress(OSError), listener.accept()[0] as connection:  # no memory, say: it goes on without
                    if wire.is_own(connection) and self._fork_for(connection):
                        return connection.dup()
            elif time.monotonic() - asked >= self._idle_s:
                os.unlink(place.socket_path())
                os._exit(0)
            if self._learned.changed_ns() != self._seen_ns:
                self._seen_ns = self._learned.changed_ns()
                if not self._tried.issuperset(self._wanted()):
                    self._begin_anew()

    def _fork_for(self, connection: socket.socket) -> bool:
        """Fork, and begin anew if what was imported is not what lies on the disk any more.

        Returns:
            Whether this is the fork.
        """
        self._outdated = self._changed()
        if not os.fork():
            return True
        if self._outdated:
            connection.close()
            self._begin_anew()
        return False

    def _changed(self) -> str:
        for path, known in self._files.items():
            try:
                facts = os.stat(path)
            except OSError:
                return path
            if known != (facts.st_mtime_ns, facts.st_size, facts.st_ino):
                return path
        return ""

    def _begin_anew(self) -> NoReturn:
        """Become a new server, as which nothing has been imported yet."""
        with suppress(FileNotFoundError):
            os.unlink(place.socket_path())
        os.set_inheritable(self._locked, True)
        settings = {"modules": self._modules, "idle_s": self._idle_s, "only": self._only}
        settings |= {"left_out": self._left_out, "lock": self._locked}
        os.execve(sys.executable, [*sys.orig_argv[:-1], json.dumps(settings)], self._environ)

    def _begin(self, connection: socket.socket) -> str:
        """Be the watcher of a request; returns in the process of its program."""
        connection.settimeout(_PATIENCE_S)
        given = wire.receive(connection)
        if given is None or "argv" not in given:
            if given is not None:
                wire.send(connection, {name: fact for name, fact in self._facts.items() if name != "identity"})
            os._exit(0)
        if why := self._refusal(given):
            wire.send(connection, {"direct": why})
            os._exit(0)
        wire.send(connection, {"ready": True})
        goes, fds = wire.receive_all(connection)
        if goes is None:  # it has gone on without
            os._exit(0)
        watch(connection, fds)
        world.assume(given, fds, self._environ, self._set_by_imports)
        self._begin_program(given)
        return str(given["entry"])

    def _refusal(self, given: dict[str, Any]) -> str:
        """Say why this program is to be started directly; nothing if it can be forked."""
        if self._outdated:
            return f"{self._outdated} has changed, and the server imports it again"
        if name := different(self._reads, self._environ, given["environ"]):
            return f"{name} is another than when the server's imports read it"
        if why := world.different_identity(self._facts["identity"], given["identity"]):
            return why
        if why := world.assume_limits(given):
            return why
        return self._own_modules(given["first"]) or self._own_variables(given["program"])

    def _own_modules(self, directory: str) -> str:
        """Say whether a program has modules of its own in place of those that were imported."""
        for name in _modules_in(directory):
            file = getattr(sys.modules.get(name) if name in self.known else None, "__file__", None)
            if file and name != "__main__" and not _lies_in(file, directory, name):
                return f"{name} beside the program takes the place of the installed one"
        return ""

    def _own_variables(self, program: str) -> str:
        """Say whether a program sets variables that imports have read."""
        names: list[str] = []
        with suppress(OSError, UnicodeDecodeError):
            if program and os.path.isfile(program):
                names = sorted(self._learned.variables(program))
                with open(program, encoding="utf-8") as file:
                    names += names_set(file.read())
        late = next((name for name in names if comes_late(name, self._reads)), "")
        return late and f"the program sets {late}, which the server's imports have read"

    def _begin_program(self, given: dict[str, Any]) -> None:
        """Leave the process as one in which nothing was served."""
        import atexit

        from wan_loader.system import forks

        gc.enable()  # what is frozen stays so: looking at it would copy all of it
        signal.set_wakeup_fd(-1)
        forks.begin_anew(given["pid"])
        if "torch" in self.known and not given["fast_path"]:
            wan_loader.uninstall()
        importlib.invalidate_caches()
        program, pid, told = str(given["program"]), os.getpid(), set[str]()

        def learn() -> None:
            if program and os.getpid() == pid:
                self._learned.learn(program, self.known)

        def tell(name: str) -> None:
            if name not in told and os.getpid() == pid:
                told.add(name)
                _say(f"{name} is set after imports have read it: start this program with --no-standby")
                if program:
                    self._learned.learn_variable(program, name)

        atexit.register(learn)
        watch_writes(self._reads, tell)


def _say(line: str) -> None:
    with suppress(OSError, ValueError, AttributeError):
        sys.stderr.write(f"wan-loader: {line}\n")


def _modules_in(directory: str) -> list[str]:
    """Name the modules and packages in a directory. What has no __init__ comes after those of that name which have."""
    suffixes = tuple(all_suffixes())
    names = []
    with suppress(OSError), os.scandir(directory) as entries:
        for entry in entries:
            is_package = entry.is_dir() and any(os.path.exists(f"{entry.path}/__init__{end}") for end in suffixes)
            if is_package or entry.name.endswith(suffixes):
                names.append(entry.name.partition(".")[0])
    return sorted(names)


def _lies_in(file: str, directory: str, name: str) -> bool:
    """Say whether a module's file is the one of that name in a directory."""
    path = os.path.join(os.path.realpath(directory), name)
    return os.path.realpath(file).startswith((f"{path}.", f"{path}{os.sep}"))
