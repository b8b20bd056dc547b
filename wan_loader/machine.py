"""What this machine allows: memory limits, processors, and a card of facts for reports.

Memory and processors are what the cgroup allows, not what the machine has. Nothing here imports torch; device facts are
added by whoever has it imported.
"""

from __future__ import annotations

import os
import platform
import re
from functools import cache
from math import ceil
from pathlib import Path

__all__ = ["available_memory", "machine_card", "memory_limit", "peak_resident", "processors", "reset_peak_resident"]

_CGROUP = Path("/sys/fs/cgroup")
_PROC = Path("/proc")


def processors() -> int:
    """CPUs that this process may keep busy: those it may run on, or fewer where its cgroup has a quota."""
    return max(1, min(len(os.sched_getaffinity(0)), _cpu_quota()))


@cache
def _cpu_quota() -> int:
    """Processors' worth of time that the cgroup allows, rounded up."""
    quotas = [quota for d in _cgroup_directories("cpu") if (quota := _quota(d)) is not None]
    return ceil(min(quotas, default=1 << 16))


def _quota(directory: Path) -> float | None:
    """Of cpu.max (v2), or of cpu.cfs_quota_us and cpu.cfs_period_us (v1), where -1 and "max" are no limit."""
    try:
        words = (directory / "cpu.max").read_text().split()
    except OSError:
        words = [str(_number(directory, f"cpu.cfs_{name}_us")) for name in ("quota", "period")]
    try:
        quota, period = map(int, words)
    except ValueError:
        return None
    return quota / period if quota > 0 and period > 0 else None


def _cgroup_directories(controller: str) -> list[Path]:
    """This process's cgroup for "memory" or "cpu", and its ancestors, v2 or v1; each may set a limit."""
    try:
        lines = (_PROC / "self/cgroup").read_text().splitlines()
    except OSError:
        return []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "" or controller in controllers.split(","):
            root = _CGROUP / controller if controllers else _CGROUP
            leaf = root / path.lstrip("/")
            return [leaf, *leaf.parents[: len(leaf.parts) - len(root.parts)]]
    return []


def _number(directory: Path, *names: str) -> int | None:
    for name in names:
        try:
            return int((directory / name).read_text())
        except (OSError, ValueError):  # absent, or "max": no limit
            continue
    return None


def _limit(directory: Path) -> int | None:
    return _number(directory, "memory.max", "memory.limit_in_bytes")


def _meminfo(field: str) -> int:
    try:
        match = re.search(rf"^{field}:\s+(\d+) kB", (_PROC / "meminfo").read_text(), re.M)
    except OSError:
        return 0
    return int(match[1]) * 1024 if match else 0


def memory_limit() -> int:
    """Bytes of memory this process may use at most: the machine's, or what its cgroup allows."""
    limits = [limit for d in _cgroup_directories("memory") if (limit := _limit(d)) is not None]
    return min([_meminfo("MemTotal") or 1 << 62, *limits])


def available_memory() -> int:
    """Bytes that can be taken now without pushing anything but clean page cache out."""
    headrooms = [_meminfo("MemAvailable")]
    for directory in _cgroup_directories("memory"):
        limit, used = _limit(directory), _number(directory, "memory.current", "memory.usage_in_bytes")
        if limit is not None and used is not None:
            headrooms.append(max(0, limit - used + _inactive_file(directory)))
    return min(headrooms)


def _inactive_file(directory: Path) -> int:
    """Clean page cache charged to a cgroup, which gives way."""
    try:
        text = (directory / "memory.stat").read_text()
    except OSError:
        return 0
    match = re.search(r"^(?:total_)?inactive_file (\d+)", text, re.M)
    return int(match[1]) if match else 0


def reset_peak_resident() -> None:
    """Let `peak_resident` begin anew, where the kernel allows it."""
    try:
        (_PROC / "self/clear_refs").write_text("5")
    except OSError:
        return


def peak_resident() -> int:
    """The largest resident size of this process in bytes, pages of mapped files included."""
    try:
        match = re.search(r"^VmHWM:\s+(\d+) kB", (_PROC / "self/status").read_text(), re.M)
    except OSError:
        return 0
    return int(match[1]) * 1024 if match else 0


@cache
def machine_card() -> dict[str, object]:
    """Facts for a report: processor, cores, memory, kernel, Python."""
    return {
        "cpu": _cpu_model(),
        "cores": processors(),
        "memory_bytes": _meminfo("MemTotal"),
        "memory_limit_bytes": memory_limit(),
        "kernel": platform.release(),
        "python": platform.python_version(),
    }


def _cpu_model() -> str:
    try:
        match = re.search(r"^model name\s*:\s*(.+)$", (_PROC / "cpuinfo").read_text(), re.M)
    except OSError:
        return platform.machine()
    return match[1] if match else platform.machine()
