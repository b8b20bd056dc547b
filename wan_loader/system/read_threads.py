"""Reads by a few Python threads, for where POSIX AIO is not to be had: the `ReadBackend` that works everywhere.

Slower than `posix_aio`, since threads that read with preadv hand the interpreter's lock around at every block, but the
promises are the same: reads of one descriptor are carried out one after the other, those of different descriptors side
by side. The threads serve all loads of the process, and end when they have been idle for a second.
"""

from __future__ import annotations

import errno
import os
import threading
from _thread import start_new_thread
from collections import deque
from contextlib import suppress
from queue import Empty, SimpleQueue
from time import monotonic
from typing import TYPE_CHECKING

from wan_loader.system.posix import read_at

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    Read = Callable[[int, int, int, int], int]
    """Descriptor, address, number of bytes and offset, as `read_at` has them -> how many bytes were read."""

__all__ = ["ReadThreads", "ThreadRequest"]

#: As many as glibc has for POSIX AIO.
_MOST_THREADS = 20
_IDLE_S = 1.0


class _Read:
    """One read, from its start to its outcome."""

    __slots__ = ("arguments", "done", "fd", "has_begun", "outcome", "read")

    def __init__(self, read: Read, arguments: tuple[int, int, int, int], done: SimpleQueue[None]) -> None:
        self.read, self.arguments, self.fd = read, arguments, arguments[0]
        self.done = done
        """Gets an entry when the outcome is there."""
        self.has_begun = False
        self.outcome: int | OSError | None = None

    def carry_out(self) -> None:
        try:
            self.end(self.read(*self.arguments))
        except OSError as error:
            self.end(error)
        except Exception as error:  # whoever waits for this must not wait for ever
            self.end(OSError(errno.EINVAL, str(error)))

    def end(self, outcome: int | OSError) -> None:
        self.outcome = outcome
        self.done.put(None)


class _Pool:
    """The threads, and what they are to read."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._asked: SimpleQueue[_Read] = SimpleQueue()
        self._waiting: dict[int, deque[_Read]] = {}
        """The reads that wait for a thread to end its read of the same descriptor, by that descriptor."""
        self._threads: list[int] = []
        self._n_idle = 0

    def put(self, read: _Read) -> None:
        """Have a read carried out."""
        self._asked.put(read)
        # without the lock: at worst a thread more than needed, which ends after an idle second
        if self._asked.qsize() > self._n_idle and len(self._threads) < _MOST_THREADS:
            self.grow()

    def take_back(self, read: _Read) -> None:
        """End a read that has not begun, whether it was put or not."""
        with self._lock:
            if not read.has_begun and read.outcome is None:
                read.end(OSError(errno.ECANCELED, os.strerror(errno.ECANCELED)))

    def grow(self) -> None:
        """Start another thread. Where none is allowed and there is none, carry out here what was asked for.

        Not by `threading`: Ctrl-C may come at any time, and take a lock along that the new thread waits for.
        """
        try:
            self._threads.extend(map(start_new_thread, (self._work,), ((),)))  # one call: it is noted if it is started
        except RuntimeError:
            with suppress(Empty):
                while not self._threads:
                    self._asked.get_nowait().carry_out()

    def _work(self) -> None:
        while True:
            read = self._next()
            if read is None:
                return
            with self._lock:
                if (waiting := self._waiting.get(read.fd)) is not None:
                    waiting.append(read)  # for the thread that reads this descriptor
                    continue
                self._waiting[read.fd] = deque([read])
            self._carry_out_waiting(read.fd)

    def _next(self) -> _Read | None:
        """Return what was asked for first; None if this thread has been idle for long, and is to end."""
        while True:
            with self._lock:
                self._n_idle += 1
            read = None
            with suppress(Empty):
                read = self._asked.get(timeout=_IDLE_S)
            with self._lock:
                self._n_idle -= 1
                if read is None and self._asked.empty():  # whoever puts a read from here on finds one idle thread less
                    self._threads.remove(threading.get_ident())
                    return None
            if read is not None:
                return read

    def _carry_out_waiting(self, fd: int) -> None:
        waiting = self._waiting[fd]
        while True:
            with self._lock:
                if not waiting:
                    del self._waiting[fd]
                    return
                read = waiting.popleft()
                read.has_begun = True
                is_taken_back = read.outcome is not None
            if not is_taken_back:
                read.carry_out()


_pool = _Pool()


def _after_fork() -> None:
    """Begin anew in a child, which has none of the threads, and perhaps a lock that nobody releases."""
    global _pool
    _pool = _Pool()


os.register_at_fork(after_in_child=_after_fork)


class ThreadRequest:
    """One read at a time, as `ReadRequest` has it."""

    __slots__ = ("_carry_out", "_done", "_read", "running")

    def __init__(self, read: Read, done: SimpleQueue[None]) -> None:
        self._carry_out = read
        self._done = done
        self._read: _Read | None = None
        self.running = False

    def start(self, fd: int, address: int, nbytes: int, offset: int) -> None:
        """Begin to read. Where no thread may be started and there is none, the read is carried out now."""
        # a new one each time: the last may still wait in the queue, if it was taken back
        self._read = _Read(self._carry_out, (fd, address, nbytes, offset), self._done)
        self.running = True  # first: Ctrl-C may come at any time
        _pool.put(self._read)

    def result(self) -> int | None:
        """Return how many bytes were read, once after each start; None while the read is under way.

        Raises:
            OSError: The read failed.
        """
        if self._read is None or (outcome := self._read.outcome) is None:
            return None
        self._read, self.running = None, False
        if isinstance(outcome, OSError):
            raise outcome
        return outcome

    def cancel(self) -> None:
        """Take the read back if it has not begun; `result` is to be asked all the same."""
        if self._read is not None:
            _pool.take_back(self._read)

    @property
    def is_over(self) -> bool:
        """True if `result` has something to say."""
        return self._read is not None and self._read.outcome is not None


class ReadThreads:
    """The `ReadBackend` of these threads, for the requests of one load.

    Args:
        read: Carries out one read.
    """

    def __init__(self, read: Read = read_at) -> None:
        self._read = read
        self._done: SimpleQueue[None] = SimpleQueue()

    def request(self) -> ThreadRequest:
        """Return a request, which may be started again and again."""
        return ThreadRequest(self._read, self._done)

    def wait_any(self, requests: Collection[ThreadRequest], timeout_s: float) -> None:
        """Return when one of the running `requests` is over, after `timeout_s`, or when a signal came."""
        deadline = monotonic() + timeout_s
        while not any(request.is_over for request in requests) and (left_s := deadline - monotonic()) > 0:
            with suppress(Empty):  # entries of reads whose result was asked for before anybody waited are left, too
                self._done.get(timeout=left_s)

    def wait_all(self, requests: Collection[ThreadRequest]) -> None:
        """Return when none of the `requests` is running any more, whatever came of them."""
        while running := [request for request in requests if request.running]:
            self.wait_any(running, 1.0)
            for request in running:
                with suppress(OSError):
                    request.result()

    def get_ready(self, n_reads: int) -> None:
        """Start a thread beforehand: the others follow when they are needed."""
        _pool.grow()
