"""The files behind mappings: whether the path of a mapping still leads to the file that was mapped, and its bytes.

A mapping keeps its file, so that no other file can have the same device and inode meanwhile: where `stat` names both as
the kernel names them for the mapping, the file is the same. Some file systems (btrfs, overlay) give `stat` a device of
their own making. There the path is mapped once more and the kernel's names are compared; in addition, whoever proves
must look at some bytes (`is_sure`).

Overlay file systems have one trap more. A file of a lower layer that is opened for writing is copied to the upper one,
and keeps its inode; mappings that were made before go on showing the old file. So such a file must not have changed
since the first process of this container began: no mapping is older.
"""

from __future__ import annotations

import ctypes
import os
import time
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from wan_loader.errors import CheckpointError, MissingFileError
from wan_loader.formats.checkpoint_facts import stat_file
from wan_loader.provenance.proof import Reason
from wan_loader.system.mappings import read_mappings
from wan_loader.system.mounts import mount_of_device
from wan_loader.system.posix import map_private

if TYPE_CHECKING:
    from types import TracebackType

    from wan_loader.formats.checkpoint_facts import FileFacts
    from wan_loader.system.mappings import FileMapping

__all__ = ["MappedFiles"]

_DELETED = " (deleted)"
#: File systems that put others upon each other, and may show another file than was mapped.
_STACKED = ("overlay", "aufs")
#: The start of a process is counted from the start of the system, in hundredths of a second, and clocks are adjusted.
_CLOCK_DOUBT_NS = 1_000_000_000


class MappedFiles:
    """The files of some mappings, each opened once; a context manager that closes them."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._known: dict[tuple[int, int, str], FileFacts | Reason] = {}
        self._fds: dict[str, int] = {}
        self._unsure: set[str] = set()

    def __enter__(self) -> MappedFiles:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stack.close()

    def identify(self, mapping: FileMapping) -> FileFacts | Reason:
        """Return the file of a mapping as it is now, or the reason why its path does not lead there."""
        key = (mapping.device, mapping.inode, mapping.path)
        if key not in self._known:
            self._known[key] = self._identify(mapping)
        return self._known[key]

    def _identify(self, mapping: FileMapping) -> FileFacts | Reason:
        if not mapping.path.startswith("/"):
            return Reason.DELETED
        try:
            facts = stat_file(mapping.path)
            fd = os.open(mapping.path, os.O_RDONLY | os.O_CLOEXEC)
            self._stack.callback(os.close, fd)
            facts.check_opened(fd)
        except MissingFileError:
            is_replaced = os.path.exists(mapping.path.removesuffix(_DELETED))
            return Reason.REPLACED if is_replaced else Reason.DELETED
        except (CheckpointError, OSError):
            return Reason.UNOPENED
        if facts.inode != mapping.inode:
            return Reason.REPLACED
        if (reason := self._why_not_same(mapping, facts, fd)) is not None:
            return reason
        self._fds[mapping.path] = fd
        return facts

    def _why_not_same(self, mapping: FileMapping, facts: FileFacts, fd: int) -> Reason | None:
        """Return the reason why a file of the same inode may be another; None if it is the same."""
        mount = mount_of_device(mapping.device)
        is_stacked = mount is None or mount.kind in _STACKED
        if facts.device == mapping.device and not is_stacked:
            return None
        self._unsure.add(mapping.path)
        if is_stacked and facts.ctime_ns > _first_process_ns() - _CLOCK_DOUBT_NS:
            return Reason.UNSURE_FILE
        try:
            memory = map_private(fd, 0, 1)
            address = ctypes.addressof(memory)
            again = read_mappings().find(address, address + 1)
        except OSError:
            return Reason.UNSURE_FILE
        if again is None or (again.device, again.inode) != (mapping.device, mapping.inode):
            return Reason.REPLACED
        return None

    def is_sure(self, path: str) -> bool:
        """Say whether the system itself tells two files apart here; else some bytes must be compared as well."""
        return path not in self._unsure

    def read(self, path: str, start: int, nbytes: int) -> bytes:
        """Read bytes of an identified file, fewer at its end.

        Raises:
            OSError: They cannot be read.
        """
        return os.pread(self._fds[path], nbytes, start)


@cache
def _first_process_ns() -> int:
    """Return when the first process of this container or system began; 0 if the system does not say."""
    try:
        ticks = int(Path("/proc/1/stat").read_text().rpartition(")")[2].split()[19])
        since_boot_ns = ticks * 1_000_000_000 // os.sysconf("SC_CLK_TCK")
        return time.time_ns() - time.clock_gettime_ns(time.CLOCK_BOOTTIME) + since_boot_ns
    except (OSError, ValueError, IndexError):
        return 0
