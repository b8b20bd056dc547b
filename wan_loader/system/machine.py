"""The limits of this machine: memory, processors, and a card of facts for reports.

Memory and processors are what the cgroup allows, not what the machine has. What the system does not tell (no /proc,
files that may not be read) is unknown: None, never 0. Nothing here imports torch; device facts are added by whoever has
it imported.
"""

from __future__ import annotations

import os
import platform
import re
import resource
from contextlib import suppress
from functools import cache
from math import ceil
from mmap import PAGESIZE
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = [
    "affordable_buffers",
    "available_memory",
    "free_memory",
    "machine_card",
    "memory_limit",
    "peak_resident",
    "process_headrooms",
    "processors",
    "reset_peak_resident",
]

_CGROUP = Path("/sys/fs/cgroup")
_PROC = Path("/proc")
#: Of a line of mountinfo there are more.
_MOUNT_WORDS = 8


def processors() -> int:
    """Return how many CPUs this process may keep busy: those it may run on, or fewer where its cgroup has a quota."""
    return max(1, min(len(os.sched_getaffinity(0)), _cpu_quota()))


@cache
def _cpu_quota() -> int:
    """Return the processors' worth of time that the cgroup allows, rounded up."""
    quotas = [quota for d in _cgroup_directories("cpu") if (quota := _quota(d)) is not None]
    # without a quota: more than any machine has
    return ceil(min(quotas, default=1 << 16))


def _quota(directory: Path) -> float | None:
    """Read cpu.max (v2), or cpu.cfs_quota_us and cpu.cfs_period_us (v1), where -1 and "max" are no limit."""
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
    """List this process's cgroup for "memory" or "cpu", and its ancestors, v1 or v2; each may set a limit.

    Only those that can be seen: in a container often its own alone, at the root of the mount.
    """
    version, path = _cgroup_path(controller)
    root, within = _cgroup_mount(_PROC, _CGROUP, controller if version == 1 else "")
    if within != "/" and (path + "/").startswith(within.rstrip("/") + "/"):
        path = path[len(within) :]
    if ".." in path.split("/"):  # this process is outside of its cgroup namespace
        path = ""
    leaf = root / path.strip("/")
    return [leaf, *leaf.parents[: len(leaf.parts) - len(root.parts)]]


def _cgroup_path(controller: str) -> tuple[int, str]:
    """Return which version manages what "memory" or "cpu" stands for, and this process's path in it."""
    try:
        lines = (_PROC / "self/cgroup").read_text(errors="surrogateescape").splitlines()
    except OSError:  # no /proc
        return (1 if (_CGROUP / controller).is_dir() else 2), ""
    for line in lines:
        _, controllers, path = [*line.split(":", 2), "-", "-"][:3]
        if controllers == "" or controller in controllers.split(","):
            return (1 if controllers else 2), path
    return 2, ""


@cache
def _cgroup_mount(proc: Path, default: Path, controller: str) -> tuple[Path, str]:
    """Find where the hierarchy of a controller of v1, or that of v2 (""), is mounted, and which part of it."""
    kind = ["-", "cgroup"] if controller else ["-", "cgroup2"]
    with suppress(OSError):
        for words in map(str.split, (proc / "self/mountinfo").read_text(errors="surrogateescape").splitlines()):
            if len(words) > _MOUNT_WORDS and words[-4:-2] == kind and controller in ("", *words[-1].split(",")):
                return Path(words[4]), words[3]
    hybrid = default / "unified"
    return (default / controller if controller else hybrid if hybrid.is_dir() else default), "/"


def _number(directory: Path, name: str) -> int | None:
    """Return the number in a file; None where it is absent, unreadable, or holds none: "max" is no limit."""
    try:
        return int((directory / name).read_text())
    except (OSError, ValueError):
        return None


def _statistics(directory: Path) -> dict[str, int]:
    """Read memory.stat; of v1, the numbers that count what is below, too, without their prefix."""
    try:
        text = (directory / "memory.stat").read_text()
    except OSError:
        return {}
    found = re.findall(r"^(total_)?(\w+) (\d+)$", text, re.M)
    return {name: int(number) for _, name, number in sorted(found)}


def _memory_limits() -> Iterator[tuple[Path, int, dict[str, int]]]:
    """Yield cgroups that allow less than the machine has, with the bytes that they allow and with their statistics."""
    total = _total_memory()
    for level, directory in enumerate(_cgroup_directories("memory")):
        # v2: above "max" processes are killed, above "high" slowed down to a crawl; v1 has one limit only
        numbers = [_number(directory, f"memory.{name}") for name in ("max", "high", "limit_in_bytes")]
        limit = min([total, *(n for n in numbers if n is not None)])
        v1_leaf = level == 0 and numbers[-1] is not None  # its statistics tell of ancestors that are hidden, too
        if limit < total or v1_leaf:
            statistics = _statistics(directory)
            limit = min(limit, statistics.get("hierarchical_memory_limit", total))
            if limit < total:
                yield directory, limit, statistics


def _meminfo(field: str) -> int | None:
    try:
        match = re.search(rf"^{field}:\s+(\d+) kB", (_PROC / "meminfo").read_text(), re.M)
    except OSError:
        return None
    return int(match[1]) * 1024 if match else None


def _total_memory() -> int:
    """Return the bytes that the machine has, whatever may be used of it here."""
    return _meminfo("MemTotal") or os.sysconf("SC_PHYS_PAGES") * PAGESIZE


def memory_limit() -> int:
    """Return the bytes of memory this process may use at most: the machine's, or what its cgroup allows."""
    return min([_total_memory(), *(limit for _, limit, _ in _memory_limits())])


def available_memory() -> int | None:
    """Return the bytes that can be taken now without pushing anything but clean page cache out; None where unknown.

    Of the machine, of the cgroup, or of one of its ancestors: whichever has least.
    """
    free = _meminfo("MemAvailable")
    headrooms = [] if free is None else [free]
    for directory, limit, statistics in _memory_limits():
        # page cache is charged to the cgroup and counts as used, but gives way to allocations
        used = _number(directory, "memory.current")
        used = _number(directory, "memory.usage_in_bytes") if used is None else used
        if used is not None:
            headrooms.append(min(limit, max(0, limit - used + _reclaimable(statistics))))
    return min(headrooms, default=None)


def _reclaimable(statistics: Mapping[str, int]) -> int:
    """Return the page cache charged to a cgroup that gives way; not the pages that programs are running from."""
    mapped = statistics.get("file_mapped", statistics.get("mapped_file", 0))
    in_use = max(0, statistics.get("active_file", 0) - mapped) // PAGESIZE * PAGESIZE
    return statistics.get("inactive_file", 0) + in_use


def process_headrooms() -> dict[str, int]:
    """Return the bytes that limits of the process itself leave it, by what sets them; those that are known and set.

    `ulimit -v` counts all that is mapped, `ulimit -d` what may be written.
    """
    # the numbers are fields of statm, in pages: 0 is all that is mapped, 5 is data and stack
    kinds = {"ulimit -v": (resource.RLIMIT_AS, 0), "ulimit -d": (resource.RLIMIT_DATA, 5)}
    limits = {name: (resource.getrlimit(kind)[0], word) for name, (kind, word) in kinds.items()}
    if all(limit == resource.RLIM_INFINITY for limit, _ in limits.values()):
        return {}
    try:
        words = (_PROC / "self/statm").read_text().split()
    except OSError:
        return {}
    return {
        name: max(0, limit - int(words[word]) * PAGESIZE)
        for name, (limit, word) in limits.items()
        if limit != resource.RLIM_INFINITY
    }


def free_memory() -> int | None:
    """Bytes that this process may still allocate, by the machine, its cgroup and its limits; None: unknown."""
    available = available_memory()
    return min([*process_headrooms().values(), *([] if available is None else [available])], default=None)


def affordable_buffers(count: int, nbytes: int) -> int:
    """Return how many of `count` wanted buffers fit into a quarter of the available memory: at least one."""
    free = available_memory()
    return count if free is None else max(1, min(count, free // 4 // nbytes))


def reset_peak_resident() -> None:
    """Let `peak_resident` begin anew, where the kernel allows it."""
    try:
        # 5 sets VmHWM back, see proc(5)
        (_PROC / "self/clear_refs").write_text("5")
    except OSError:
        return


def peak_resident() -> int:
    """Return the largest resident size of this process in bytes, pages of mapped files included.

    Counted from `reset_peak_resident` on; without /proc, from the start of the process.
    """
    with suppress(OSError):
        if match := re.search(r"^VmHWM:\s+(\d+) kB", (_PROC / "self/status").read_text(), re.M):
            return int(match[1]) * 1024
    # Linux counts it in KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@cache
def machine_card() -> dict[str, object]:
    """Return facts for a report: processor, cores, memory, kernel, Python."""
    return {
        "cpu": _cpu_model(),
        "cores": processors(),
        "memory_bytes": _total_memory(),
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
