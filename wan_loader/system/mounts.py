"""The file system that a path lies on, from /proc/self/mountinfo."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from wan_loader.types import StrPath

__all__ = ["IN_MEMORY", "NETWORK", "Mount", "mount_of", "mount_of_device"]

#: File systems whose bytes come over a network.
NETWORK = ("nfs", "nfs4", "cifs", "smb3", "ceph", "lustre", "glusterfs", "beegfs", "gpfs", "9p", "afs", "fuse.sshfs")
#: File systems that keep their files in memory.
IN_MEMORY = ("tmpfs", "ramfs")


@dataclass(frozen=True, slots=True)
class Mount:
    """A mounted file system."""

    kind: str
    """The file system's type, such as ext4, tmpfs, nfs4."""
    source: str
    """The device or the server."""
    point: str
    """The directory on which it is mounted."""

    @property
    def in_memory(self) -> bool:
        """True for file systems that keep their files in memory."""
        return self.kind in IN_MEMORY

    @property
    def network(self) -> bool:
        """True for file systems whose bytes come over a network."""
        return self.kind in NETWORK


def mount_of(path: StrPath | int) -> Mount | None:
    """Return the file system under an existing path, or an open file; None where the system does not say."""
    try:
        return mount_of_device(os.stat(path).st_dev)
    except OSError:
        return None


def mount_of_device(device: int) -> Mount | None:
    """Return the file system of a device number, as `stat` or a mapping names it; None if it is mounted nowhere."""
    number = f"{os.major(device)}:{os.minor(device)}"
    try:
        lines = [line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines()]
        # what was mounted last hides what lies below it
        mount = next(line for line in reversed(lines) if line[2] == number)
        # optional fields come before a single hyphen, a varying number of them
        kind, source = mount[mount.index("-") + 1 : mount.index("-") + 3]
    except (OSError, StopIteration, ValueError, IndexError):
        return None
    return Mount(kind, source, mount[4])
