"""What the files lie on, and what this system allows: read from /proc and /sys, never by writing or timing.

What a system does not tell (no /proc, a container without /sys) is left out.
"""

from __future__ import annotations

import os
import re
import resource
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wan_loader.linux import cached_bytes
from wan_loader.machine import available_memory, memory_limit

if TYPE_CHECKING:
    from collections.abc import Iterable

    from wan_loader.types import StrPath

__all__ = ["NETWORK", "limits", "resident_bytes", "storage_facts"]

#: File systems whose bytes come over a network.
NETWORK = ("nfs", "nfs4", "cifs", "smb3", "ceph", "lustre", "glusterfs", "beegfs", "gpfs", "9p", "afs", "fuse.sshfs")


def storage_facts(path: StrPath) -> dict[str, Any]:
    """File system, mount point and device under a path."""
    facts: dict[str, Any] = {}
    with suppress(OSError, StopIteration, ValueError):
        device = os.stat(path).st_dev
        number = f"{os.major(device)}:{os.minor(device)}"
        lines = [line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines()]
        mount = next(line for line in reversed(lines) if line[2] == number)
        kind, source = mount[mount.index("-") + 1 : mount.index("-") + 3]
        facts |= {"filesystem": kind, "mounted_at": mount[4], "source": source, "network": kind in NETWORK}
        facts |= {"in_memory": kind in ("tmpfs", "ramfs")}
        facts |= _block_device(number)
    return facts


def _block_device(number: str) -> dict[str, Any]:
    """Rotational, scheduler, read-ahead of the disk behind a partition."""
    directory = Path("/sys/dev/block") / number
    facts: dict[str, Any] = {}
    for queue in (directory / "queue", directory / ".." / "queue"):
        with suppress(OSError, ValueError):
            facts["rotational"] = (queue / "rotational").read_text().strip() == "1"
            facts["read_ahead_bytes"] = int((queue / "read_ahead_kb").read_text()) * 1024
            break
    return facts


def limits() -> dict[str, Any]:
    """Memory that is allowed and free, memlock, huge pages, memory pressure so far."""
    facts: dict[str, Any] = {"memory_limit_bytes": memory_limit(), "memory_available_bytes": available_memory()}
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    facts["memlock_bytes"] = None if soft == resource.RLIM_INFINITY else soft
    with suppress(OSError):
        text = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
        if found := re.search(r"\[(\w+)\]", text):
            facts["transparent_huge_pages"] = found[1]
    with suppress(OSError):
        if found := re.search(r"^some .*total=(\d+)", Path("/proc/pressure/memory").read_text(), re.MULTILINE):
            facts["memory_stall_s"] = int(found[1]) / 1e6
    return facts


def resident_bytes(paths: Iterable[StrPath]) -> int | None:
    """Bytes of the files that lie in the page cache; None where the kernel does not say."""
    total = 0
    for path in paths:
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            total += cached_bytes(fd, 0, os.fstat(fd).st_size)
        except OSError:
            return None
        finally:
            os.close(fd)
    return total
