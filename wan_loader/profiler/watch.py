"""The processes of a program as they look from outside: who started whom, when each ended, what each has read.

From /proc alone, ten times a second at most; a process that lives shorter may be missed. This is all that is known of
processes that run no Python. A process's counters hold those of the children that it has waited for, as the kernel
adds them.
"""

from __future__ import annotations

import os
import select
import stat
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from wan_loader.events import clock_ns
from wan_loader.formats.file_names import is_weight_name
from wan_loader.profiler.blocked import blocked_by

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Counters", "SeenProcess", "Watcher", "is_idle"]

_INTERVAL_S = 0.1
#: The share of one processor that looking may take: where it takes longer, it is done more rarely.
_SHARE = 0.03
_MAX_PROCESSES = 2000
_MAX_POLLED = 400
#: Of a program that runs for hours, every second look is forgotten again and again.
_MAX_COUNTERS = 20_000
_MAX_FDS = 256
_MAX_FILES = 1000
#: A file of any name counts as weights from this size on.
_LARGE_BYTES = 32 << 20
#: Python's own .pth files are no weights.
_LEAST_BYTES = 65536
_MAPS_EVERY = 5
_MAX_MAPS_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Counters:
    """The kernel's counters of a process at one moment."""

    at_ns: int
    read_bytes: int
    """Bytes fetched from storage so far, page faults included."""
    resident_bytes: int
    called_bytes: int = 0
    """Bytes that came through read calls so far, pipes and sockets included."""
    cpu_ns: int = 0
    """Processor time so far; 10 ms exact."""
    has_weights: bool = False
    """A weight file is open."""
    blocked_by: str = ""
    """What it waits for, if it has hardly used a processor since the look before."""


@dataclass(slots=True)
class SeenProcess:
    """One process, seen from outside."""

    pid: int
    parent: int
    """The process that started it, where it was seen before that ended."""
    start_ns: int
    """When it began; 10 ms exact."""
    command: tuple[str, ...]
    end_ns: int | None = None
    """When it ended; None while it runs."""
    counters: list[Counters] = field(default_factory=list)
    files: dict[str, int] = field(default_factory=dict)
    """Weight files that it had open or mapped, and their lengths."""
    others: set[str] = field(default_factory=set)
    """Files that it had open which are too small for weights."""


class Watcher:
    """A thread that looks at a program's processes until it is told to finish.

    Args:
        root: The program's first process, a child of this one that nobody has waited for yet.
        each_round: Is called each time.
    """

    def __init__(self, root: int, each_round: Callable[[], None] = lambda: None) -> None:
        self.seen: list[SeenProcess] = []
        """All processes that were seen, in the order in which they were found."""
        self._alive: dict[int, SeenProcess] = {}
        self._strangers: set[int] = set(_pids())
        self._strangers.discard(root)
        self._each_round = each_round
        self._poll = select.poll()
        self._fds: dict[int, int] = {}
        self._over, self._wake = os.pipe()
        self._poll.register(self._over, select.POLLIN)
        self._rounds = 0
        self._boot_ns = _boot_ns()
        self._adopt(root)
        self._thread = threading.Thread(target=self._watch, name="watcher", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def finish(self) -> None:
        """End: the program has ended, and its first process was not waited for yet, so it is looked at once more."""
        os.write(self._wake, b".")
        self._thread.join()
        self._look()
        for fd in (*self._fds, self._over, self._wake):
            os.close(fd)

    def _watch(self) -> None:
        pause_s = _INTERVAL_S
        while not self._ended(pause_s):
            before_ns = time.thread_time_ns()
            self._look()
            self._each_round()
            pause_s = max(_INTERVAL_S, (time.thread_time_ns() - before_ns) / 1e9 / _SHARE)

    def _ended(self, pause_s: float) -> bool:
        """Wait, and note meanwhile when processes end; return True when all is over."""
        until_ns = clock_ns() + int(pause_s * 1e9)
        while (left_ns := until_ns - clock_ns()) > 0:
            for fd, _ in self._poll.poll(left_ns // 1_000_000 + 1):
                if fd == self._over:
                    return True
                self._poll.unregister(fd)
                self._note_end(self._fds.pop(fd))
                os.close(fd)
        return False

    def _note_end(self, pid: int) -> None:
        process = self._alive.pop(pid, None)
        if process is not None:
            process.end_ns = clock_ns()
            if found := _counters(pid):  # nobody has waited for it yet
                process.counters.append(found)

    def _look(self) -> None:
        self._rounds += 1
        present = _pids()
        self._strangers &= present
        for pid in sorted(present - self._strangers - self._alive.keys()):
            self._adopt(pid)
        for pid, process in list(self._alive.items()):
            found = _counters(pid)
            if found is None:
                self._alive.pop(pid).end_ns = clock_ns()
                continue
            has_weights = self._look_at_files(pid, process)
            idle = not process.counters or is_idle(process.counters[-1], found)
            blocked = blocked_by(pid) if idle else ""
            process.counters.append(replace(found, has_weights=has_weights, blocked_by=blocked))
            if len(process.counters) > _MAX_COUNTERS:
                process.counters[:] = process.counters[::2]
            if found.resident_bytes == 0 and _state(pid) == "Z":  # where there is no descriptor that tells
                self._alive.pop(pid).end_ns = found.at_ns
                continue
            if len(process.counters) <= 3:  # it may have become another program since
                process.command = _command(pid)

    def _look_at_files(self, pid: int, process: SeenProcess) -> bool:
        if len(process.files) + len(process.others) > _MAX_FILES:
            return bool(process.files)
        # a Python process says itself what it maps, and its list is long
        if self._rounds % _MAPS_EVERY == 1 and not _is_python(process.command):
            process.files |= _mapped_files(pid, process)
        return _note_open_files(pid, process)

    def _adopt(self, pid: int) -> None:
        """Take a new process in, if it belongs to the program."""
        try:
            fields = _stat(pid)
        except (OSError, ValueError, IndexError):
            return
        parent = int(fields[1])
        is_root = not self.seen
        if not is_root and parent not in self._alive and all(parent != p.pid for p in self.seen):
            self._strangers.add(pid)
            return
        if len(self.seen) >= _MAX_PROCESSES:
            return
        start_ns = int(fields[19]) * 1_000_000_000 // os.sysconf("SC_CLK_TCK") - self._boot_ns
        process = SeenProcess(pid, parent, start_ns, _command(pid))
        self.seen.append(process)
        self._alive[pid] = process
        if len(self._fds) < _MAX_POLLED and hasattr(os, "pidfd_open"):
            with suppress(OSError):
                fd = os.pidfd_open(pid)
                self._fds[fd] = pid
                self._poll.register(fd, select.POLLIN)


def is_idle(before: Counters, after: Counters) -> bool:
    """Tell whether a process used a processor for less than a fifth of the time between two looks."""
    return (after.cpu_ns - before.cpu_ns) * 5 <= after.at_ns - before.at_ns


def _boot_ns() -> int:
    """Return how far the clock of process starts is ahead of the clock of the spans."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME) - clock_ns()


def _pids() -> set[int]:
    try:
        return {int(name) for name in os.listdir("/proc") if name.isdigit()}
    except OSError:
        return set()


def _stat(pid: int) -> list[str]:
    """Return the fields of proc(5) stat from the third on."""
    return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()


def _state(pid: int) -> str:
    try:
        return _stat(pid)[0]
    except (OSError, IndexError):
        return "Z"


def _is_python(command: tuple[str, ...]) -> bool:
    return bool(command) and "python" in os.path.basename(command[0])


def _command(pid: int) -> tuple[str, ...]:
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return tuple(os.fsdecode(word) for word in file.read(20_000).split(b"\0")[:64] if word)
    except OSError:
        return ()


def _counters(pid: int) -> Counters | None:
    """Return the counters of a process; None where it has ended, or the kernel does not tell."""
    io: dict[str, str] = {}
    try:
        fields = _stat(pid)
        with suppress(OSError):  # another user's
            io = dict(line.split(": ") for line in Path(f"/proc/{pid}/io").read_text().splitlines())
        ticks = int(fields[11]) + int(fields[12])
        return Counters(
            clock_ns(),
            int(io.get("read_bytes", 0)),
            int(fields[21]) * os.sysconf("SC_PAGE_SIZE"),
            int(io.get("rchar", 0)),
            ticks * 1_000_000_000 // os.sysconf("SC_CLK_TCK"),
        )
    except (OSError, ValueError, IndexError):
        return None


def _note_open_files(pid: int, process: SeenProcess) -> bool:
    """Note the weight files that a process has open; return whether there is one."""
    found = False
    directory = f"/proc/{pid}/fd"
    with suppress(OSError):
        for name in os.listdir(directory)[:_MAX_FDS]:
            with suppress(OSError):
                path = os.readlink(f"{directory}/{name}")
                if path in process.files:
                    found = True
                elif path.startswith("/") and path not in process.others:
                    found |= _note_file(path, process)
    return found


def _note_file(path: str, process: SeenProcess) -> bool:
    """Note a file that a process has open, if it holds weights or is as large."""
    facts = os.stat(path)
    least = _LEAST_BYTES if is_weight_name(os.path.basename(path)) else _LARGE_BYTES
    if stat.S_ISREG(facts.st_mode) and facts.st_size >= least:
        process.files[path] = facts.st_size
        return True
    process.others.add(path)
    return False


def _mapped_files(pid: int, process: SeenProcess) -> dict[str, int]:
    """Return the weight files that a process has mapped, unless it has mapped very many."""
    found: dict[str, int] = {}
    with suppress(OSError), open(f"/proc/{pid}/maps", "rb") as file:
        for line in file.read(_MAX_MAPS_BYTES).splitlines():
            path = os.fsdecode(line[line.find(b"/") :]) if b"/" in line else ""
            if path and path not in process.files and is_weight_name(os.path.basename(path)):
                with suppress(OSError):
                    found[path] = os.stat(path).st_size
    return found
