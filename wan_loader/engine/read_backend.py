"""The seam between the read queue and the system, which carries reads out, and the choice of what is behind it.

A further way to read (io_uring, say) is a module in `system` and a line in `choose_backend`; the contract that it must
keep is in `tests/contracts`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from wan_loader.system import posix_aio
from wan_loader.system.posix import copy_memory
from wan_loader.system.posix_aio import PosixAio
from wan_loader.system.read_threads import ReadThreads

if TYPE_CHECKING:
    from collections.abc import Collection

__all__ = ["ReadBackend", "ReadRequest", "choose_backend"]


class ReadRequest(Protocol):
    """One read at a time. The memory that it fills, and the request itself, must stay until it is no longer running."""

    running: bool
    """True from the start until `result` has told of the end."""

    def start(self, fd: int, address: int, nbytes: int, offset: int) -> None:
        """Begin to read `nbytes` of a file at `offset` into memory at `address`; OSError if it cannot be queued."""

    def result(self) -> int | None:
        """Return how many bytes were read, once after each start; None while the read is under way. Raises OSError."""

    def cancel(self) -> None:
        """Take the read back if it has not begun; `result` is to be asked all the same."""


class ReadBackend(Protocol):
    """A means to carry out reads without the thread that asks for them.

    Reads of one descriptor are carried out one after the other, in the order in which they were started; those of
    different descriptors side by side. Only requests of this backend may be given to it.
    """

    def request(self) -> ReadRequest:
        """Make a request, which may be started again and again."""

    def wait_any(self, requests: Collection[Any], timeout_s: float) -> None:
        """Return when one of the running `requests` is over, after `timeout_s`, or when a signal came."""

    def wait_all(self, requests: Collection[Any]) -> None:
        """Return when none of the `requests` is running any more, whatever came of them."""

    def get_ready(self, n_reads: int) -> None:
        """Do beforehand what would hold up `n_reads` reads side by side. Returns at once."""


def choose_backend(fallbacks: list[str] | None = None, *, own_memory: bool = False) -> ReadBackend:
    """Return the best backend here: POSIX AIO, or else a few Python threads; `fallbacks` is then told why.

    For what is this process's own memory, Python threads copy.
    """
    if own_memory:
        return ReadThreads(copy_memory)
    if (reason := posix_aio.why_not()) is None:
        return PosixAio()
    if fallbacks is not None:
        fallbacks.append(f"files are read by Python threads, which is slower: {reason}")
    return ReadThreads()
