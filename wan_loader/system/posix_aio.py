"""Reads that the C library carries out in threads of its own, by ctypes: POSIX AIO, aio(7).

Nothing of a read needs the interpreter: Python threads that read with preadv hand its lock around at every block, which
on some machines takes longer than the reads. glibc runs the reads of one descriptor one after the other and those of
different descriptors side by side, in up to 20 threads, which end when they have been idle for a second.

A process that was forked has none of its parent's threads, which the library does not notice: reads would wait for
ever. There, after any read of the parent, another backend is better (`why_not` says so); a read that is started all the
same is carried out at once, as it is where no thread may be made.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import resource
import threading
from contextlib import ExitStack, suppress
from functools import cache
from time import monotonic
from typing import TYPE_CHECKING, Any

from wan_loader.system.posix import read_at

if TYPE_CHECKING:
    from collections.abc import Collection

__all__ = ["AioRequest", "PosixAio", "get_ready", "wait_all", "wait_any", "why_not"]

_SIGEV_NONE = 1  # bits/sigevent-consts.h

#: Descriptors that the process's table is to have room for.
_ROOM = 1024
#: What keeps a thread busy while the others are made: half a millisecond of random numbers.
_BUSY_BYTES = 256 << 10

#: How long threads that were made are there for certain: the library ends them after an idle second.
_READY_S = 0.5

_used = False
_orphaned = False
_ready_at = -_READY_S


def _after_fork() -> None:
    global _orphaned
    _orphaned = _used


os.register_at_fork(after_in_child=_after_fork)


class _ControlBlock(ctypes.Structure):
    """The struct aiocb of glibc's aio.h, as it is on every 64-bit Linux; what has no name here is the library's own."""

    _fields_ = [
        ("aio_fildes", ctypes.c_int),
        ("aio_lio_opcode", ctypes.c_int),
        ("aio_reqprio", ctypes.c_int),
        ("aio_buf", ctypes.c_void_p),
        ("aio_nbytes", ctypes.c_size_t),
        ("sigev_value", ctypes.c_void_p),
        ("sigev_signo", ctypes.c_int),
        ("sigev_notify", ctypes.c_int),
        ("_sigevent", ctypes.c_char * 48),
        ("_internal", ctypes.c_char * 32),
        ("aio_offset", ctypes.c_int64),
        ("_reserved", ctypes.c_char * 32),
    ]


class _Timespec(ctypes.Structure):
    _fields_ = [("tv_sec", ctypes.c_long), ("tv_nsec", ctypes.c_long)]


@cache
def _library(kind: type[ctypes.CDLL]) -> Any:
    lib = kind(None, use_errno=True)
    if not hasattr(lib, "aio_read"):  # before glibc 2.34
        lib = kind("librt.so.1", use_errno=True)
    lib.aio_read.argtypes = lib.aio_error.argtypes = lib.aio_return.argtypes = [ctypes.c_void_p]
    lib.aio_return.restype = ctypes.c_ssize_t
    lib.aio_suspend.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p]
    lib.aio_cancel.argtypes = [ctypes.c_int, ctypes.c_void_p]
    return lib


def why_not() -> str | None:
    """Say why another backend should read in this process; None if this one is fine."""
    if _orphaned:
        return "this process was forked from one that had read, whose threads it lacks"
    return _what_is_missing()


@cache
def _what_is_missing() -> str | None:
    try:
        is_glibc = hasattr(_library(ctypes.PyDLL), "gnu_get_libc_version")
    except (OSError, AttributeError):
        return "the C library has no POSIX AIO"
    return None if is_glibc else "the C library is not glibc, whose POSIX AIO this is made for"


class AioRequest:
    """One read at a time. The memory that it fills, and the request itself, must stay until it is no longer running."""

    __slots__ = ("_address", "_block", "_outcome", "running")

    def __init__(self) -> None:
        self._block = _ControlBlock(sigev_notify=_SIGEV_NONE)
        self._address = ctypes.addressof(self._block)
        self._outcome: int | OSError | None = None
        self.running = False

    def start(self, fd: int, address: int, nbytes: int, offset: int) -> None:
        """Begin to read `nbytes` of a file at `offset` into memory at `address`.

        Where the library has no threads and may not make any, the read is carried out now.

        Raises:
            OSError: The read cannot be queued.
        """
        global _used
        if _orphaned:
            self._outcome, self.running = _read(fd, address, nbytes, offset), True
            return
        _used = True
        block = self._block
        block.aio_fildes, block.aio_buf, block.aio_nbytes, block.aio_offset = fd, address, nbytes, offset
        self.running = True  # first: Ctrl-C may come right after the call
        if _library(ctypes.PyDLL).aio_read(self._address):
            code = ctypes.get_errno()
            # no thread, and none may be made: the read is carried out here
            if code == errno.EAGAIN:
                self._outcome = _read(fd, address, nbytes, offset)
                return
            self.running = False
            raise OSError(code, os.strerror(code))

    def result(self) -> int | None:
        """Return how many bytes were read, once after each start; None while the read is under way.

        Raises:
            OSError: The read failed.
        """
        if self._outcome is not None:
            outcome, self._outcome, self.running = self._outcome, None, False
            if isinstance(outcome, OSError):
                raise outcome
            return outcome
        lib = _library(ctypes.PyDLL)
        code = lib.aio_error(self._address)
        if code == errno.EINPROGRESS:
            return None
        self.running = False
        nbytes = int(lib.aio_return(self._address))
        if code:
            raise OSError(code, os.strerror(code))
        return nbytes

    def cancel(self) -> None:
        """Take the read back if it has not begun; `result` is to be asked all the same."""
        if self._outcome is None:
            _library(ctypes.PyDLL).aio_cancel(self._block.aio_fildes, self._address)


def _read(fd: int, address: int, nbytes: int, offset: int) -> int | OSError:
    try:
        return read_at(fd, address, nbytes, offset)
    except OSError as error:
        return error


def wait_any(requests: Collection[AioRequest], timeout_s: float) -> None:
    """Return when one of the running `requests` is over, after `timeout_s`, or when a signal came."""
    if any(request._outcome is not None for request in requests):
        return
    # CDLL below, not PyDLL: this call waits, and other threads are to run meanwhile; the others return at once
    addresses = (ctypes.c_void_p * len(requests))(*(request._address for request in requests))
    timeout = _Timespec(int(timeout_s), int(timeout_s % 1 * 1e9))
    _library(ctypes.CDLL).aio_suspend(addresses, len(requests), ctypes.byref(timeout))


def wait_all(requests: Collection[AioRequest]) -> None:
    """Return when none of the `requests` is running any more, whatever came of them."""
    while running := [request for request in requests if request.running]:
        wait_any(running, 1.0)
        for request in running:
            with suppress(OSError):
                request.result()


def get_ready(n_reads: int) -> None:
    """Do beforehand, in a thread of its own, what would hold up `n_reads` reads side by side. Returns at once.

    Nothing is done again within half a second.

    In a process that has threads, a table of descriptors that must grow waits for every processor (RCU): 7 to 28 ms,
    at the first reads or in the middle of a load. Making a thread while others fault memory in takes 1 to 2 ms.
    """
    global _ready_at
    now = monotonic()
    if not why_not() and now - _ready_at >= _READY_S:
        _ready_at = now
        with suppress(RuntimeError):  # no further thread is allowed here: reads then take what they take
            threading.Thread(target=_get_ready, args=(n_reads,), name="get ready", daemon=True).start()


def _get_ready(n_reads: int) -> None:
    if resource.getrlimit(resource.RLIMIT_NOFILE)[0] < _ROOM:
        return  # the few descriptors that are allowed are for the load
    with ExitStack() as stack, suppress(OSError):  # as above
        source = os.open("/dev/urandom", os.O_RDONLY | os.O_CLOEXEC)
        stack.callback(os.close, source)
        os.close(fcntl.fcntl(source, fcntl.F_DUPFD_CLOEXEC, _ROOM - 1))
        memory = bytearray(_BUSY_BYTES)
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        requests = [AioRequest() for _ in range(n_reads)]
        own = []
        for _ in requests:
            own.append(os.dup(source))
            stack.callback(os.close, own[-1])
        stack.callback(wait_all, requests)  # before any of them is closed: its number may be another file's by then
        for request, fd in zip(requests, own, strict=True):
            request.start(fd, address, len(memory), 0)


class PosixAio:
    """The `ReadBackend` of this module."""

    wait_any = staticmethod(wait_any)
    wait_all = staticmethod(wait_all)
    get_ready = staticmethod(get_ready)

    def request(self) -> AioRequest:
        """Return a request, which may be started again and again."""
        return AioRequest()
