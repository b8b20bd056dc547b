"""Private mappings of files that stay as they are, whatever becomes of the files: by leases.

A private mapping shows what others write into its file, and using it ends the process once the file was shortened. A
lease makes the kernel hold back whoever opens the file for writing or shortens it, tell us, and wait (for 45 seconds,
/proc/sys/fs/lease-break-time). Meanwhile the mapping is *settled*: what it shows is copied to memory of its own, which
takes its place at the same addresses, so that tensors and pointers know nothing of it. Then the lease is let go.

    lease -> map ... map -> [somebody wants to write] -> settle -> let go

Deleting the file and putting another in its place change nothing: the mapping keeps its file. A forked process would
have the mapping and no lease, so a fork settles first. Where no lease is to be had, nothing is mapped (`lease` says
why): a file of another user, one that is open for writing, one on a file system that others write to from elsewhere.

What it cannot do: a thread that sees the signal needs the interpreter, and so does the copy. A writer within this
process that keeps the interpreter to itself while it opens the file must have it settled before (`settle`), and a
process that is stopped for longer than the kernel waits finds its mappings closed: using them ends the process, which
is better than wrong bytes. What another thread writes to the mapping while written pages are taken over may be lost.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import logging
import os
import resource
import signal
import struct
import threading
import weakref
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from wan_loader.system.files import close_own, is_of
from wan_loader.system.mounts import mount_of
from wan_loader.system.own_pages import PAGE, written_pages
from wan_loader.system.posix import forbid, map_anonymous, map_private, move_over, read_at, unmap

__all__ = ["LeasedFile", "Leases"]

_LOG = logging.getLogger("wan_loader")

#: File systems all of whose writers this kernel sees.
_LOCAL = ("ext2", "ext3", "ext4", "xfs", "btrfs", "f2fs", "tmpfs")
#: Each lease keeps a descriptor, of which a process may have a thousand, or fewer: then one of so many.
_MAX_FILES = 64
_FILES_SHARE = 16
#: What is copied to settle a mapping, at the least: a writer waits, and the kernel waits no longer than its time.
_COPIED_PER_S = 256 << 20
_COPY_BYTES = 32 << 20
#: Real-time, so that it is no other signal's; directed at one thread, which waits for it: no handler ever runs.
_SIGNAL = signal.SIGRTMAX - 2
#: Where the queue of signals is full, none comes: so often the leases are looked at, while there are any.
_TICK_S = 5.0
_F_SETSIG, _F_SETOWN_EX, _F_OWNER_TID = 10, 15, 0  # asm-generic/fcntl.h


#: What it means that the kernel grants none.
_REFUSALS = {errno.EACCES: "it belongs to another user", errno.EAGAIN: "somebody has it open for writing"}


class LeasedFile:
    """A file with a lease on it, and its mappings. The lease is let go with the last of them."""

    def __init__(self, path: str, lock: threading.RLock) -> None:
        self._path = os.path.abspath(path)
        self._lock = lock
        self._open()
        self.facts = os.fstat(self.fd)
        self._regions: list[_Region] = []
        self.is_leased = False

    def _open(self) -> None:
        self.fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        self.close = weakref.finalize(self, close_own, self.fd, os.fstat(self.fd))
        # not at exit: a program's own exit handlers come later, and may save over the file
        self.close.atexit = False

    def _has_descriptor(self) -> bool:
        """Say whether the descriptor is ours still: a program may have closed it with all others."""
        return is_of(self.fd, self.facts)

    def _open_again(self) -> None:
        self.close.detach()
        self._open()
        if not self._has_descriptor():
            raise OSError(errno.ESTALE, "its descriptor was closed, and its path leads to another file")

    def map(self, start: int, nbytes: int) -> ctypes.Array[ctypes.c_char]:
        """Map bytes of the file, privately, from page-aligned `start` on, to read and to write.

        Returns:
            The memory, for the buffer protocol; it is unmapped when nothing refers to that any more.

        Raises:
            OSError: The lease was broken, the file ends before, or the system refuses.
        """
        with self._lock:
            if not self.is_leased:
                raise OSError(errno.EAGAIN, "the lease on the file is gone")
            memory = map_private(self.fd, start, nbytes)
            # the file stays open as long as the memory is there
            weakref.finalize(memory, _forget, self).atexit = False
            self._regions.append(_Region(weakref.ref(memory), ctypes.addressof(memory), start, nbytes))
            return memory

    def is_wanted(self) -> bool:
        """Say whether somebody waits for the lease to be let go."""
        if not self.is_leased:
            return False
        if self._has_descriptor():
            return fcntl.fcntl(self.fd, fcntl.F_GETLEASE) != fcntl.F_RDLCK
        # the mappings keep the lease, of which nobody can be asked now: settled while the file can be opened again
        with suppress(OSError):
            return os.path.samestat(os.stat(self._path), self.facts)
        return False

    def settle(self) -> None:
        """Give all mappings memory of their own, and let the lease go. Again does nothing.

        Raises:
            OSError: There is no memory for them, or the file is not there. Then they and the lease are as before.
        """
        with self._lock:
            if not self.is_leased:
                return
            if not self._has_descriptor():
                self._open_again()
            # held, so that none is unmapped while it is copied
            held = [(memory, region) for region in self._regions if (memory := region.memory()) is not None]
            copies: dict[int, int] = {}
            try:
                for _, region in held:
                    copies[region.address] = _copy(self.fd, region)
                now = os.fstat(self.fd)
                for _, region in held:
                    _take_over(copies[region.address], region)
                    del copies[region.address]
            except BaseException:
                for _, region in held:
                    if region.address in copies:
                        unmap(copies[region.address], _whole(region.nbytes))
                raise
            self.is_leased = False
            try:
                fcntl.fcntl(self.fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
            except OSError:  # there is none: the kernel has waited long enough, and what was copied may be new bytes
                if (now.st_size, now.st_mtime_ns) != (self.facts.st_size, self.facts.st_mtime_ns):
                    _LOG.critical("a file was rewritten before its mappings could be saved; they are closed")
                    self.close_mappings()
            self.close()

    def close_mappings(self) -> None:
        """Have every further use of the mappings end the process, and let the lease go."""
        with self._lock:
            self.is_leased = False
            for region in self._regions:
                if (memory := region.memory()) is not None:
                    forbid(region.address, _whole(len(memory)))
            self.close()


class _Region(NamedTuple):
    """A mapping: its memory, as long as that is there, its address, and where in the file it begins."""

    memory: weakref.ref[Any]
    address: int
    start: int
    nbytes: int


def _forget(file: LeasedFile) -> None:
    """Hold a file until its mapping is gone."""


def _whole(nbytes: int) -> int:
    return -(-nbytes // PAGE) * PAGE


def _copy(fd: int, region: _Region) -> int:
    """Return the address of memory of its own with the bytes of the file: there an error is an error, and no signal."""
    nbytes = region.nbytes
    copy = map_anonymous(_whole(nbytes))
    try:
        for done in range(0, nbytes, _COPY_BYTES):
            _read_all(fd, copy + done, min(_COPY_BYTES, nbytes - done), region.start + done)
    except BaseException:
        unmap(copy, _whole(nbytes))
        raise
    return copy


def _take_over(copy: int, region: _Region) -> None:
    """Bring what this process has written into a copy, and put it in the place of the mapping."""
    address = region.address
    for first, last in written_pages([(address, address + region.nbytes)]):
        # no other thread runs Python from here on
        _view(copy + first - address, last - first)[:] = _view(first, last - first)
    move_over(copy, _whole(region.nbytes), address)


def _view(address: int, nbytes: int) -> memoryview:
    return memoryview((ctypes.c_char * nbytes).from_address(address)).cast("B")


def _read_all(fd: int, address: int, nbytes: int, offset: int) -> None:
    done = 0
    while done < nbytes:
        if not (count := read_at(fd, address + done, nbytes - done, offset + done)):
            raise OSError(errno.EIO, "the file has become shorter")
        done += count


class Leases:
    """The leases of this process, and the thread that settles mappings when somebody wants to write to their file."""

    def __init__(self) -> None:
        self._files: weakref.WeakSet[LeasedFile] = weakref.WeakSet()
        self._lock = threading.RLock()
        self._thread: threading.Thread | None = None
        self._watches_forks = False

    def lease(self, path: str) -> LeasedFile:
        """Open a file and put a lease on it.

        Raises:
            OSError: There is no such file, or no lease is to be had; the message says why.
        """
        file = LeasedFile(path, self._lock)
        try:
            self._check(file.fd)
            with self._lock:
                self._lease(file.fd)
                file.is_leased, file.facts = True, os.fstat(file.fd)
                self._files.add(file)
        except BaseException:
            file.close()
            raise
        return file

    def _check(self, fd: int) -> None:
        mount = mount_of(fd)
        if mount is None or mount.kind not in _LOCAL:
            raise OSError(errno.EINVAL, "its file system is not known to see all writers")
        patience_s = int(Path("/proc/sys/fs/lease-break-time").read_text())
        if os.fstat(fd).st_size > patience_s * _COPIED_PER_S:
            raise OSError(errno.EFBIG, "it is too large to be copied while a writer waits")
        # the program needs descriptors, too
        if len(self._files) >= min(_MAX_FILES, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // _FILES_SHARE):
            raise OSError(errno.EMFILE, "many files have leases already")
        # asked for when it comes to settling
        written_pages([])

    def _lease(self, fd: int) -> None:
        self._watch_forks()
        # both before the lease: no signal ever goes to the program
        fcntl.fcntl(fd, _F_SETSIG, _SIGNAL)
        fcntl.fcntl(fd, _F_SETOWN_EX, struct.pack("ii", _F_OWNER_TID, self._watching()))
        try:
            fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        except OSError as error:
            why = _REFUSALS.get(error.errno or 0, "the system grants no lease")
            raise OSError(error.errno, why) from error

    def settle(self, path: str | os.PathLike[str] | None = None) -> None:
        """Settle the mappings of a file, or of all files, so that whoever writes to it need not wait.

        Raises:
            OSError: There is no memory for them.
        """
        if not self._files:
            return
        try:
            wanted = None if path is None else os.stat(path)
        except (OSError, ValueError):  # it will be a new one
            return
        with self._lock:
            for file in list(self._files):
                if wanted is None or os.path.samestat(wanted, file.facts):
                    file.settle()
                    self._files.discard(file)

    def _watching(self) -> int:
        """Return the thread that signals are for. It begins with the first lease, and ends some time after the last."""
        if self._thread is None:
            ready = threading.Event()
            thread = threading.Thread(target=self._watch, args=(ready,), name="wan-loader leases", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:
                raise OSError(errno.EAGAIN, "no further thread is allowed") from error
            ready.wait()
            self._thread = thread
        return self._thread.native_id or 0

    def _watch(self, ready: threading.Event) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, [_SIGNAL, signal.SIGIO])
        ready.set()
        while True:
            signal.sigtimedwait([_SIGNAL], _TICK_S)
            with self._lock:
                # calls: a name here would keep a file leased while the thread waits
                any(map(self._serve, list(self._files)))
                if not self._files:
                    self._thread = None
                    return

    def _serve(self, file: LeasedFile) -> None:
        if file.is_wanted():
            try:
                file.settle()
            except OSError as error:
                _LOG.critical("mappings of a file that is being rewritten cannot be saved (%s): closed", error)
                file.close_mappings()
        if not file.is_leased:
            self._files.discard(file)

    def _watch_forks(self) -> None:
        """Have forks settle: a child has the mappings, and not the thread."""
        if not self._watches_forks:
            this = weakref.ref(self)
            before, after, in_child = (
                partial(_call, this, name) for name in ("_before_fork", "_after_fork", "_after_fork_in_child")
            )
            os.register_at_fork(before=before, after_in_parent=after, after_in_child=in_child)
            self._watches_forks = True

    def _before_fork(self) -> None:
        self._lock.acquire()
        with suppress(OSError):
            self.settle()

    def _after_fork(self) -> None:
        self._lock.release()

    def _after_fork_in_child(self) -> None:
        self._thread = None
        for file in list(self._files):  # there was no memory for them
            file.close_mappings()
        self._files.clear()
        self._lock.release()


def _call(this: weakref.ref[Leases], name: str) -> None:
    if (leases := this()) is not None:
        getattr(leases, name)()
