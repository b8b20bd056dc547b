"""The keeper: a process of one thread that holds descriptors of shared memory, and gives copies of them to clients.

It imports neither torch nor a driver, and touches no GPU: the memory is kept by the descriptors alone, and by whoever
has mapped it. So it takes some megabytes, nothing of the device, and nothing that a program does can bring it down.
A client that is done, or dead, closes its connection: that is how the keeper knows who uses what.

Run by `python -m wan_loader.keeper.serve` it goes into the background, once it can be reached.
"""

from __future__ import annotations

import os
import resource
import selectors
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wan_loader.errors import KeepError
from wan_loader.keeper.messages import PROTOCOL, close_all, receive, send
from wan_loader.keeper.place import KEEPER_LOG, forget, listen, watch
from wan_loader.keeper.shelf import Identity, Item, Shelf
from wan_loader.system.peers import MAX_FDS, is_own_peer, own_directory

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

__all__ = ["Keeper", "main"]

#: A keeper that has nothing, and whom nobody asks, ends after so long.
_IDLE_S = 60.0
#: How often a keeper looks whether its socket is still there: the end of a session may remove it.
_LOOK_S = 30.0
_PAUSE_S = 0.01

#: So many things that are kept of the same files are told of at most.
_MOST_FOUND = 32

_Answer = tuple[dict[str, Any], list[int]]


class Keeper:
    """The keeper's loop.

    Args:
        server: The socket that listens.
        idle_s: How long to stay with nothing to keep.
        clock: Tells the time.
    """

    def __init__(
        self, server: socket.socket, idle_s: float = _IDLE_S, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._server = server
        self._idle_s = idle_s
        self._clock = clock
        self._shelf = Shelf()
        self._held: dict[socket.socket, Item | None] = {}
        """What each connection has reserved, or uses."""
        self._stops = False
        self._answers: dict[str, Callable[[socket.socket, dict[str, Any], list[int]], _Answer]] = {
            "attach": self._attach,
            "reserve": self._reserve,
            "put": self._put,
            "find": self._find,
            "status": self._status,
            "drop": self._drop,
        }

    def run(self) -> None:
        """Serve until told to stop, until there is nothing to keep, or until nobody can reach the socket any more."""
        self._server.setblocking(False)
        is_reachable = watch(Path(own_directory()))
        with selectors.DefaultSelector() as selector:
            selector.register(self._server, selectors.EVENT_READ)
            while not self._stops:
                is_idle = not self._shelf.items and not self._held
                events = selector.select(self._idle_s if is_idle else _LOOK_S)
                if not events and (is_idle or not is_reachable()):
                    break
                for event, _ in events:
                    if event.fileobj is self._server:
                        self._accept(selector)
                    else:
                        self._serve(event.fileobj, selector)
        self._close([item for item in self._shelf.items if item.fds is not None])

    def _accept(self, selector: selectors.BaseSelector) -> None:
        try:
            link, _ = self._server.accept()
        except OSError:  # it is gone already, or there are too many: then it still waits
            time.sleep(_PAUSE_S)
            return
        if not is_own_peer(link):
            link.close()
            return
        link.setblocking(False)
        self._held[link] = None
        selector.register(link, selectors.EVENT_READ)

    def _serve(self, link: Any, selector: selectors.BaseSelector) -> None:
        """Answer one message; whoever is gone, or cannot be understood, is left alone from here on."""
        try:
            message, fds = receive(link)
            try:
                reply, given = self._answer(link, message, fds)
            finally:
                close_all(fds)  # those that were not taken
            send(link, reply, given)
        except (EOFError, OSError):  # `KeepError` among them
            selector.unregister(link)
            link.close()
            if (item := self._held.pop(link)) is not None:
                self._shelf.leave(item, self._clock())

    def _answer(self, link: socket.socket, message: dict[str, Any], fds: list[int]) -> _Answer:
        if message.get("do") == "stop":  # of any version
            self._stops = True
            return {"pid": os.getpid()}, []
        try:
            if message.get("protocol") != PROTOCOL:
                raise KeepError(f"the keeper speaks version {PROTOCOL}, and not {message.get('protocol')}")
            if (answer := self._answers.get(message.get("do", ""))) is None:
                raise KeepError("the keeper does not know what it is asked")
            return answer(link, message, fds)
        except (KeepError, KeyError, TypeError, ValueError, OverflowError) as error:
            return {"error": str(error)}, []

    def _attach(self, link: socket.socket, message: dict[str, Any], fds: list[int]) -> _Answer:
        identity = _identity(message)
        _check_free(self._held[link])
        item = self._shelf.attach(identity, self._clock())
        if item is None:
            return {"missing": self._shelf.why_not(identity)}, []
        self._held[link] = item
        return {"sizes": item.sizes}, item.fds or []

    def _reserve(self, link: socket.socket, message: dict[str, Any], fds: list[int]) -> _Answer:
        identity, nbytes, free = _identity(message), int(message["nbytes"]), message["free"]
        _check_free(self._held[link])
        if (limit := message.get("limit")) is not None:
            self._shelf.limits[identity.device] = int(limit)
        if (item := self._shelf.find(identity)) is not None:
            return {"state": "kept" if item.fds is not None else "busy"}, []
        self._held[link], going = self._shelf.reserve(identity, nbytes, free, self._clock())
        return {"state": "reserved", "dropped": self._close(going)}, []

    def _put(self, link: socket.socket, message: dict[str, Any], fds: list[int]) -> _Answer:
        item, sizes = self._held[link], tuple(int(size) for size in message["sizes"])
        files = frozenset(map(str, message["files"]))
        if item is None or item.fds is not None or len(fds) != len(sizes) + 1 or len(fds) > MAX_FDS:
            raise KeepError("what is put was not reserved, or lacks descriptors")
        self._shelf.put(item, list(fds), sizes, int(message["n_tensors"]), self._clock())
        fds.clear()
        item.files = files
        self._held[link] = None
        return {"state": "kept"}, []

    def _find(self, link: socket.socket, message: dict[str, Any], fds: list[int]) -> _Answer:
        found = self._shelf.of_files(str(message["device"]), frozenset(map(str, message["files"])))
        return {"items": [item.identity for item in found[:_MOST_FOUND]]}, []

    def _status(self, link: socket.socket, message: dict[str, Any], fds: list[int]) -> _Answer:
        return {"pid": os.getpid(), "items": self._told(self._shelf.items), "limits": self._shelf.limits}, []

    def _drop(self, link: socket.socket, message: dict[str, Any], fds: list[int]) -> _Answer:
        return {"dropped": self._close(self._shelf.drop(label=message.get("label"), key=message.get("key")))}, []

    def _told(self, items: list[Item]) -> list[dict[str, Any]]:
        now_s = self._clock()
        return [
            {
                **item.identity._asdict(),
                "nbytes": item.nbytes,
                "n_tensors": item.n_tensors,
                "n_users": item.n_users,
                "idle_s": now_s - item.used_s,
                "state": "loading" if item.fds is None else "kept",
            }
            for item in items
        ]

    def _close(self, items: list[Item]) -> list[dict[str, Any]]:
        """Let go of memory: it is free once nobody uses it. Return what is told of it."""
        told = self._told(items)
        for item in items:
            close_all(item.fds or [])
            item.fds = []
        return told


def _identity(message: dict[str, Any]) -> Identity:
    return Identity(*(str(message[name]) for name in Identity._fields))


def _check_free(item: Item | None) -> None:
    if item is not None:
        raise KeepError("a connection is for one thing")


def main() -> None:
    """Become the keeper of this user, in the background; return once it can be reached, or if there is one already."""
    directory = Path(own_directory())
    try:
        listening = listen(directory)
    except KeepError as error:
        sys.exit(str(error))
    if listening is None:
        return
    if os.fork():
        os._exit(0)
    os.setsid()
    os.chdir("/")
    os.umask(0o077)
    # its own end is no business of whoever started it, nor are his streams
    log = os.open(directory / KEEPER_LOG, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, fd in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(source, fd)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with suppress(ValueError, OSError):
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    Keeper(listening[0]).run()
    with suppress(OSError):
        forget(directory)
    os._exit(0)  # connections end with the process, and its lock


if __name__ == "__main__":
    main()
