"""Facts of what the files lie on, and of what this system allows: from /proc and /sys, never by writing or timing.

What a system does not tell (no /proc, a container without /sys) is left out.
"""

from __future__ import annotations

import os
import re
import resource
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wan_loader.system.machine import available_memory, memory_limit
from wan_loader.system.mounts import mount_of

if TYPE_CHECKING:
    from wan_loader.types import StrPath

__all__ = ["limits", "nvidia_gpus", "storage_facts"]

_NVIDIA, _DISPLAY = "0x10de", "0x03"


def nvidia_gpus(root: StrPath = "/") -> int:
    """Count the GPUs of NVIDIA that the driver tells of, or else the bus; 0 where neither says anything."""
    driven = list(Path(root, "proc/driver/nvidia/gpus").glob("*"))
    if driven:
        return len(driven)
    count = 0
    for device in Path(root, "sys/bus/pci/devices").glob("*"):
        with suppress(OSError):
            words = [(device / name).read_text() for name in ("vendor", "class")]
            count += words[0].startswith(_NVIDIA) and words[1].startswith(_DISPLAY)
    return count


def storage_facts(path: StrPath) -> dict[str, Any]:
    """Return file system, mount point and device under a path."""
    facts: dict[str, Any] = {}
    if mount := mount_of(path):
        facts |= {"filesystem": mount.kind, "mounted_at": mount.point, "source": mount.source}
        facts |= {"network": mount.network, "in_memory": mount.in_memory}
        device = os.stat(path).st_dev
        facts |= _block_device(f"{os.major(device)}:{os.minor(device)}")
    return facts


def _block_device(number: str) -> dict[str, Any]:
    """Read whether the disk behind a partition is rotational, and its read-ahead."""
    directory = Path("/sys/dev/block") / number
    facts: dict[str, Any] = {}
    for queue in (directory / "queue", directory / ".." / "queue"):
        with suppress(OSError, ValueError):
            facts["rotational"] = (queue / "rotational").read_text().strip() == "1"
            facts["read_ahead_bytes"] = int((queue / "read_ahead_kb").read_text()) * 1024
            break
    return facts


def limits() -> dict[str, Any]:
    """Return memory that is allowed and free, memlock, huge pages, memory pressure so far."""
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
