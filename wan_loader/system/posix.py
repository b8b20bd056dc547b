"""The few system calls that Python does not offer, by ctypes: raw mappings and page-cache residency.

Each function raises OSError with the errno. Addresses are plain ints; whoever maps must unmap.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import weakref
from functools import cache

__all__ = [
    "OWN_MEMORY",
    "PAGE",
    "cached_bytes",
    "copy_memory",
    "forbid",
    "map_anonymous",
    "map_file",
    "map_over",
    "map_private",
    "move_over",
    "populate",
    "prefer_huge_pages",
    "read_at",
    "reserve_addresses",
    "start_writeback",
    "trim_heap",
    "unmap",
]

_PAGE = mmap.PAGESIZE
#: What O_DIRECT reads and mapped windows are rounded to, in bytes.
PAGE = max(4096, _PAGE)
#: The file that shows a process its own memory, each byte at its address.
OWN_MEMORY = "/proc/self/mem"
_MADV_POPULATE_READ = 22  # linux/mman.h, since 5.14
_MADV_POPULATE_WRITE = 23
_PROT_NONE = 0
_SYNC_FILE_RANGE_WRITE = 2  # linux/fs.h
_SYS_CACHESTAT = 451  # the same number on every architecture, since 6.5
_SYS_FACCESSAT2 = 439  # likewise, since 5.8
_AT_EACCESS = 0x200  # linux/fcntl.h
_AT_EMPTY_PATH = 0x1000

# a CDLL lets other threads run during a call; use_errno gives each thread a copy that they cannot overwrite
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
_libc.sync_file_range.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
_libc.syscall.restype = ctypes.c_long

#: The same library, but no other thread runs Python meanwhile.
_libc_alone = ctypes.PyDLL(None)
_libc_alone.mremap.restype = ctypes.c_void_p
_libc_alone.mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]

_MREMAP_MAYMOVE_FIXED = 1 | 2  # linux/mman.h
_MAP_NORESERVE = 0x4000  # asm-generic/mman.h, and the same on x86
_MAP_FIXED = 0x10
_MAP_FAILED = ctypes.c_void_p(-1).value


class _CachestatRange(ctypes.Structure):
    _fields_ = [("off", ctypes.c_uint64), ("len", ctypes.c_uint64)]


class _Cachestat(ctypes.Structure):
    _fields_ = [
        ("nr_cache", ctypes.c_uint64),
        ("nr_dirty", ctypes.c_uint64),
        ("nr_writeback", ctypes.c_uint64),
        ("nr_evicted", ctypes.c_uint64),
        ("nr_recently_evicted", ctypes.c_uint64),
    ]


def _check(result: int, what: str) -> None:
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")


def map_file(fd: int, start: int, nbytes: int, noted: list[int] | None = None) -> int:
    """Map `nbytes` of a file from page-aligned `start`, shared and read-only; return the address.

    Args:
        fd: The open file.
        start: A whole number of pages, in bytes.
        nbytes: The length of the mapping.
        noted: Gets the address appended. Ctrl-C may come right after the call, before anything else: it is there even
            then.
    """
    noted = [] if noted is None else noted
    # one call, in C: a signal handler runs before it or after it
    noted.extend(map(_libc.mmap, (None,), (nbytes,), (mmap.PROT_READ,), (mmap.MAP_SHARED,), (fd,), (start,)))
    address = noted[-1]
    if address is None or address == _MAP_FAILED:
        code = ctypes.get_errno()
        noted.clear()
        raise OSError(code, f"mmap: {os.strerror(code)}")
    return address


def map_private(fd: int, start: int, nbytes: int) -> ctypes.Array[ctypes.c_char]:
    """Map `nbytes` of a file from page-aligned `start`, to read and to write: written pages become copies.

    Unlike `mmap.mmap`, this keeps no descriptor, of which a process may have a thousand.

    Returns:
        The memory, for the buffer protocol; it is unmapped when nothing refers to that any more.

    Raises:
        OSError: The file ends before, or the system refuses.
    """
    if os.fstat(fd).st_size < start + nbytes:
        raise OSError(errno.EINVAL, "the file is shorter")
    protection, flags = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | _MAP_NORESERVE
    address = _libc.mmap(None, nbytes, protection, flags, fd, start)
    if address is None or address == _MAP_FAILED:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    memory = (ctypes.c_char * nbytes).from_address(address)
    # not at the interpreter's exit: whoever has tensors may use them until the end
    weakref.finalize(memory, unmap, address, nbytes).atexit = False
    return memory


def map_anonymous(nbytes: int) -> int:
    """Map fresh memory that is no file's, to read and to write; return the address."""
    protection, flags = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    address = _libc.mmap(None, nbytes, protection, flags, -1, 0)
    if address is None or address == _MAP_FAILED:
        code = ctypes.get_errno()
        raise OSError(code, f"mmap: {os.strerror(code)}")
    return int(address)


def reserve_addresses(nbytes: int) -> int:
    """Return the start of addresses that nothing else will be mapped to, and that hold nothing yet."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    address = _libc.mmap(None, nbytes, _PROT_NONE, flags, -1, 0)
    if address is None or address == _MAP_FAILED:
        code = ctypes.get_errno()
        raise OSError(code, f"mmap: {os.strerror(code)}")
    return int(address)


def map_over(fd: int, nbytes: int, place: int, *, shared: bool) -> None:
    """Map a whole file to addresses that are ours, to read and to write.

    Args:
        fd: The open file, of whole pages.
        nbytes: Its length.
        place: The first of the addresses.
        shared: Writes go to the file, for everybody who has mapped it; else written pages become copies.
    """
    flags = _MAP_FIXED | (mmap.MAP_SHARED if shared else mmap.MAP_PRIVATE | _MAP_NORESERVE)
    if _libc.mmap(place, nbytes, mmap.PROT_READ | mmap.PROT_WRITE, flags, fd, 0) != place:
        code = ctypes.get_errno()
        raise OSError(code, f"mmap: {os.strerror(code)}")


def move_over(address: int, nbytes: int, place: int) -> None:
    """Move a mapping to where another one of the same length is, at once; that one is gone.

    For whoever reads there, it is one step. No other thread runs Python meanwhile.
    """
    if _libc_alone.mremap(address, nbytes, nbytes, _MREMAP_MAYMOVE_FIXED, place) != place:
        raise OSError(errno.ENOMEM, "mremap: a mapping cannot be moved")


def forbid(address: int, nbytes: int) -> None:
    """Have every further access to a mapping end the process."""
    _check(_libc.mprotect(address, nbytes, _PROT_NONE), "mprotect")


def unmap(address: int, nbytes: int) -> bool:
    """Undo `map_file`, and return True."""
    _libc.munmap(address, nbytes)
    return True


def populate(address: int, nbytes: int, *, write: bool = False) -> None:
    """Fault in a mapping for reading, or anonymous memory for writing.

    A page that cannot be read is an OSError here, not a SIGBUS later. Kernels before 5.14 do not know the call: nothing
    happens there.
    """
    advice = _MADV_POPULATE_WRITE if write else _MADV_POPULATE_READ
    try:
        _check(_libc.madvise(address, nbytes, advice), "madvise(MADV_POPULATE)")
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise


def read_at(fd: int, address: int, nbytes: int, offset: int) -> int:
    """Read a file at `offset` into memory at `address`; returns how many bytes were read."""
    return os.preadv(fd, [(ctypes.c_char * nbytes).from_address(address)], offset)


def copy_memory(fd: int, address: int, nbytes: int, offset: int) -> int:
    """Copy what `OWN_MEMORY` shows at `offset` to `address`, as `read_at` would; returns `nbytes`.

    The same bytes several times as fast: of a read, the kernel looks for each page by itself, under a lock. Other
    threads run meanwhile. Memory that is not there ends the process, as for whoever else looks at it.
    """
    ctypes.memmove(address, offset, nbytes)
    return nbytes


def prefer_huge_pages(address: int, nbytes: int, *, prefer: bool = True) -> None:
    """Ask for huge pages in fresh anonymous memory, or, to take that back, for none. May do nothing.

    What they cost depends on the machine: `fresh_memory` measures it.
    """
    # whole pages inside of the range: the call refuses other addresses, and neighbours are not ours
    start, end = -(-address // _PAGE) * _PAGE, (address + nbytes) // _PAGE * _PAGE
    if start < end:
        _libc.madvise(start, end - start, mmap.MADV_HUGEPAGE if prefer else mmap.MADV_NOHUGEPAGE)


def cached_bytes(fd: int, start: int, nbytes: int) -> int:
    """Return how many bytes of a file range lie in the page cache, in whole pages, at most `nbytes`.

    Costs microseconds for a resident range of 16 MiB with cachestat(2), some more with mincore(2) on older kernels.

    Raises:
        OSError: The kernel does not tell; a PermissionError for a file that one neither owns nor may write.
    """
    if nbytes == 0:
        return 0
    first, last = start // _PAGE * _PAGE, -(-(start + nbytes) // _PAGE) * _PAGE
    pages = (last - first) // _PAGE
    cached = _cachestat(fd, first, last - first)
    if cached is None:
        if not (_is_told_of(fd) and _mincore_is_honest()):
            raise PermissionError(errno.EPERM, "the kernel tells only who owns a file, or may write it")
        cached = _mincore(fd, first, last - first)
    return nbytes if cached >= pages else min(cached * _PAGE, nbytes)


def _cachestat(fd: int, start: int, nbytes: int) -> int | None:
    """Return the number of pages in the page cache; None where the call is refused, or not known."""
    window, stat = _CachestatRange(start, nbytes), _Cachestat()
    if _libc.syscall(_SYS_CACHESTAT, fd, ctypes.byref(window), ctypes.byref(stat), 0) != 0:
        return None
    return int(stat.nr_cache)


def _is_told_of(fd: int) -> bool:
    """Return whether mincore(2) tells this user the truth about a file: of others' it says that every page is there."""
    if os.fstat(fd).st_uid == os.geteuid():
        return True
    # AT_EACCESS asks for the effective user, as the kernel does before it answers mincore
    return bool(_libc.syscall(_SYS_FACCESSAT2, fd, b"", os.W_OK, _AT_EACCESS | _AT_EMPTY_PATH) == 0)


@cache
def _mincore_is_honest() -> bool:
    """Return whether mincore(2) knows a page that cannot be there: some sandboxes say of every page that it is."""
    try:
        fd = os.memfd_create("wan-loader", os.MFD_CLOEXEC)
        try:
            # a file in memory that was only made longer has no page yet
            os.ftruncate(fd, _PAGE)
            return _mincore(fd, 0, _PAGE) == 0
        finally:
            os.close(fd)
    except OSError:
        return False


def _mincore(fd: int, start: int, nbytes: int) -> int:
    vector = (ctypes.c_ubyte * (nbytes // _PAGE))()
    # a mapping brings no page in: mincore looks, and nothing is touched
    address = map_file(fd, start, nbytes)
    try:
        _check(_libc.mincore(address, nbytes, vector), "mincore")
    finally:
        unmap(address, nbytes)
    return sum(flag & 1 for flag in bytes(vector))


def trim_heap() -> None:
    """Give back what the program has freed and the C library has kept; where that is not glibc, nothing happens."""
    if hasattr(_libc, "malloc_trim"):
        _libc.malloc_trim(0)


def start_writeback(fd: int, start: int, nbytes: int) -> None:
    """Begin to write dirty pages of a range to the disk, without waiting. Only a hint: errors are left to fsync."""
    _libc.sync_file_range(fd, start, nbytes, _SYNC_FILE_RANGE_WRITE)
