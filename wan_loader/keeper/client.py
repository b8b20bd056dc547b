"""The side of a program: it asks the keeper, and starts one if there is none and it has something to keep."""

from __future__ import annotations

import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wan_loader.errors import KeepError
from wan_loader.keeper.messages import PROTOCOL, close_all, receive, send
from wan_loader.keeper.place import connect
from wan_loader.system.peers import own_directory

if TYPE_CHECKING:
    import socket
    from collections.abc import Sequence

    from wan_loader.keeper.shelf import Identity

__all__ = ["KeeperLink", "drop", "find_keeper", "need_keeper", "status", "stop"]

#: The keeper answers in less than a millisecond: one that takes so long is stopped, or something else.
_TIMEOUT_S = 5.0
_START_TIMEOUT_S = 60.0
_TRIES, _PAUSE_S = 5, 0.1
_OTHER_VERSION = "end it with `wan-loader standby keep stop`; memory that is in use stays until it is not"


class KeeperLink:
    """A connection to the keeper, for one purpose. A context manager that closes it, unless it became a lease."""

    def __init__(self, link: socket.socket) -> None:
        self._link = link

    def __enter__(self) -> KeeperLink:
        return self

    def __exit__(self, *_: object) -> None:
        self._link.close()

    def ask(
        self, do: str, fds: Sequence[int] = (), *, any_version: bool = False, **fields: object
    ) -> tuple[dict[str, Any], list[int]]:
        """Ask the keeper; return its answer, and descriptors, which are the caller's to close.

        Args:
            do: What it is to do.
            fds: Descriptors that go with it.
            any_version: Take the answer of a keeper that speaks another version.
            **fields: The rest of the message.

        Raises:
            KeepError: It is gone, does not answer, refuses, or speaks another version.
        """
        try:
            send(self._link, {"do": do, **fields}, tuple(fds))
            reply, given = receive(self._link)
        except KeepError:
            raise
        except (EOFError, ConnectionResetError, BrokenPipeError) as error:
            raise KeepError.because("the keeper ended before it answered", "try again") from error
        except OSError as error:
            raise KeepError.because(f"the keeper does not answer: {error}", _OTHER_VERSION) from error
        is_other = reply.get("protocol") != PROTOCOL
        if (is_other and not any_version) or "error" in reply:
            close_all(given)
            if is_other:
                raise KeepError.because("the keeper that runs is of another version", _OTHER_VERSION)
            raise KeepError(str(reply["error"]))
        return reply, given

    def attach(self, identity: Identity) -> tuple[list[int], list[int]] | str:
        """Ask for kept weights: sizes of the chunks, and descriptors of the table and of these. Or say why not."""
        reply, fds = self.ask("attach", **identity._asdict())
        if "missing" in reply:
            return str(reply["missing"])
        sizes = [int(size) for size in reply["sizes"]]
        if len(fds) != len(sizes) + 1:
            close_all(fds)
            raise KeepError("the keeper has given other descriptors than it said")
        return sizes, fds

    def wait_for_end(self) -> None:
        """Return once the keeper is gone, or does not go in time."""
        with suppress(OSError, EOFError):
            receive(self._link)

    def lease(self) -> int:
        """Return the descriptor of the connection, which is not closed any more: while it is open, we are a user."""
        return self._link.detach()


def find_keeper(directory: Path | None = None) -> KeeperLink | None:
    """Connect to the keeper of this user; None if there is none.

    Raises:
        KeepError: It cannot be trusted, or does not answer.
    """
    link = connect(directory or Path(own_directory()), _TIMEOUT_S)
    return None if link is None else KeeperLink(link)


def need_keeper() -> KeeperLink:
    """Connect to the keeper of this user, and start it where there is none. Raises `KeepError`."""
    for _ in range(_TRIES):  # one that was told to stop may not be gone yet
        if (link := find_keeper()) is not None:
            return link
        _start()
        if (link := find_keeper()) is not None:
            return link
        time.sleep(_PAUSE_S)
    raise KeepError.because(f"no keeper came to be in {own_directory()}", "look into keeper.log there")


def _start() -> None:
    import subprocess  # who only attaches does without

    from wan_loader.system.programs import environment

    command = [sys.executable, "-m", "wan_loader.keeper.serve"]
    package = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    # so that it finds this very package, wherever the program has it from
    nothing = subprocess.DEVNULL
    try:
        done = subprocess.run(
            command,
            stdin=nothing,
            stdout=nothing,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            env=environment(package),
            timeout=_START_TIMEOUT_S,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise KeepError.because(f"the keeper could not be started: {error}") from error
    if done.returncode:
        raise KeepError.because(f"the keeper could not be started: {done.stderr.strip()[-500:]}")


def status() -> dict[str, Any] | None:
    """Return what is kept: pid, items, limits; None if there is no keeper. Raises `KeepError`."""
    if (link := find_keeper()) is None:
        return None
    with link:
        return link.ask("status")[0]


def drop(*, label: str | None = None, key: str | None = None) -> list[dict[str, Any]]:
    """Have the keeper let go of weights; return what it had of them. Memory in use stays until it is not.

    Args:
        label: Those of this path; None: of any.
        key: Those whose key begins so; None: all.

    Raises:
        KeepError: The keeper does not answer.
    """
    if (link := find_keeper()) is None:
        return []
    with link:
        dropped: list[dict[str, Any]] = link.ask("drop", label=label, key=key)[0]["dropped"]
        return dropped


def stop() -> bool:
    """End the keeper, of whatever version; return False if there is none.

    Raises:
        KeepError: It does not answer.
    """
    if (link := find_keeper()) is None:
        return False
    with link:
        link.ask("stop", any_version=True)
        link.wait_for_end()
    return True
