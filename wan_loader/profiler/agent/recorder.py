"""The keeper of spans inside a foreign program: it writes them to one file per process, as lines of JSON.

Per thread there is a stack of open spans. The innermost one gets the time, so spans of a thread never overlap, and
what an outer span shows is its own time only. Lines are written every 100 ms of recorded work, at the end, and at once
after a span of more than 5 ms, so that a killed program leaves what it had done. Nothing here may raise into the
program, or print.
"""

from __future__ import annotations

import os
import sys
import time
from _thread import _local, allocate_lock, get_native_id
from _weakref import ref

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

__all__ = ["MIN_BYTES", "AgentRecorder"]

#: Tensor operations on less than this are not worth a clock reading.
MIN_BYTES = 65536
_FLUSH_NS = 100_000_000
#: Equal spans closer than this become one.
_JOIN_NS = 20_000
#: Waiting is believed at this rate for bytes that were fetched ahead: 200 MB/s.
_NS_PER_BYTE = 5
#: Fewer bytes than this at once are not weights.
_AHEAD_BYTES = 4 << 20
#: A span this long is written at once, since the process may be killed at any time.
_LONG_NS = 5_000_000
#: What one process may write; later spans are left out, and that is said.
_MAX_BYTES = 64 << 20


class _Stack(_local):
    def __init__(self) -> None:
        self.open: list[Any] = []  # [name, label, start of the current segment]
        self.last: Any = None  # the last row written, while it may still grow
        self.last_end = 0
        self.generation = -1
        self.track = ""


class AgentRecorder:
    """The recorder that the hooks report to. `on` turns False when the recording ends."""

    def __init__(
        self, directory: Any, start_facts: Any = None, deadline_ns: Any = None, clock: Any = time.perf_counter_ns
    ) -> None:
        self.on = True
        self.facts: dict[str, Any] = {}
        self.undo: list[Any] = []
        self._directory, self._start_facts, self._clock = directory, start_facts or {}, clock
        self._deadline_ns = deadline_ns
        self._open_files()
        # by a weak reference: what is registered can never be taken back
        me = ref(self)
        os.register_at_fork(after_in_child=lambda: _after_fork_of(me()))

    def _open_files(self) -> None:
        self._stack = _Stack()
        self._lock = allocate_lock()
        self._pending: list[Any] = []
        self._generation, self._flushed_ns = 0, self._clock()
        self._nbytes, self._full = 0, False
        self._pid = os.getpid()
        name = f"{self._pid}-{self._clock()}.jsonl"
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        try:
            self._file = os.open(os.path.join(self._directory, name), flags, 0o600)
        except OSError:  # the directory is gone: a daemon that outlived the profiler
            self.on = False
            return
        self._io = _open_or_none("/proc/self/io")
        self._credit_ns, self._read_bytes = 0, self.io()[0]
        self._write({"begin": {**self._start_facts, "pid": self._pid, "ppid": os.getppid(), "at": self._clock()}})

    def _after_fork(self) -> None:
        if not self.on:
            return
        for fd in (self._file, self._io):
            if fd is not None:
                os.close(fd)
        # a child writes a file of its own, from its fork on
        self._start_facts = {**self._start_facts, "forked": True, "started": self._clock()}
        self.facts = {**self.facts, "files": {}}
        self._open_files()

    # spans

    def begin(self, name: Any, label: Any = "") -> None:
        """Open a span in this thread; what is open already stops getting time."""
        now, stack = self._clock(), self._stack
        if stack.open:
            outer = stack.open[-1]
            self._row(outer[0], outer[1], outer[2], now, 0)
        stack.open.append([name, label, now])
        self._check(now)

    def now(self) -> Any:
        """Return the time on the clock of the spans."""
        return self._clock()

    def around(self) -> Any:
        """Return (name, label, ...) of the innermost span of this thread, or None."""
        stack = self._stack.open
        return stack[-1] if stack else None

    def end(self, nbytes: Any = 0, kind: Any = None, before: Any = None) -> None:
        """Close the innermost span of this thread.

        Args:
            nbytes: The bytes that it worked on.
            kind: Name and label, where they are known only now.
            before: Counters from the beginning, to find page faults.
        """
        now, stack = self._clock(), self._stack
        if not stack.open:  # it was opened before the fork
            return
        name, label, start = stack.open.pop()
        name, label = kind or (name, label)
        if before is not None:
            blocked, fetched = self._faults(before, now - start, nbytes)
            if blocked:
                self._row("read", "page faults in " + label, start, start + blocked, fetched)
                start += blocked
        self._row(name, label, start, now, nbytes)
        if stack.open:
            stack.open[-1][2] = now
        elif now - start > _LONG_NS:
            self.flush(now)
        self._check(now)

    def drop(self) -> None:
        """Forget the innermost span of this thread: its time stays with the one around it."""
        if not self._stack.open:  # it was opened before the fork
            return
        _, _, start = self._stack.open.pop()
        if self._stack.open:
            self._stack.open[-1][2] = start

    def whole(self, name: Any, label: Any, start: Any, end: Any) -> None:
        """Record a span that is over already, outside of all others."""
        self._row(name, label, start, end, 0)

    def foreign(self, name: Any, label: Any, start: Any, end: Any, nbytes: Any, track: Any) -> None:
        """Record a span that somebody else has measured, on a track of its own."""
        if self.on:
            self._pending.append([name, start, end, nbytes, track, label])
            self._check(end)

    @property
    def started(self) -> Any:
        """When the process began."""
        return self._start_facts["started"]

    def _row(self, name: Any, label: Any, start: Any, end: Any, nbytes: Any) -> None:
        stack = self._stack
        start = max(start, stack.last_end)
        if end <= start and not nbytes:
            return
        end = max(start, end)
        stack.last_end = end
        last = stack.last
        if (
            last is not None
            and stack.generation == self._generation
            and (last[0], last[5]) == (name, label)
            and start - last[2] < _JOIN_NS
        ):
            last[2], last[3] = end, last[3] + nbytes
            return
        stack.track = stack.track or _track_name()
        row = [name, start, end, nbytes, stack.track, label]
        self._pending.append(row)
        stack.last, stack.generation = row, self._generation

    # counters

    def counters(self) -> Any:
        """Return (bytes from storage, bytes through read calls, CPU time of this thread) so far."""
        read, rchar = self.io()
        if read - self._read_bytes > _AHEAD_BYTES:
            self._credit_ns += (read - self._read_bytes) * _NS_PER_BYTE
            self._read_bytes = read
        return read, rchar, time.thread_time_ns()

    def io(self) -> Any:
        """Return (bytes from storage, bytes through read calls) of this process; zeros if the kernel does not say."""
        if self._io is None:
            return 0, 0
        try:
            fields = dict(line.split(b": ") for line in os.pread(self._io, 4096, 0).splitlines())
            return int(fields[b"read_bytes"]), int(fields[b"rchar"])
        except (OSError, KeyError, ValueError):
            return 0, 0

    def _faults(self, before: Any, wall_ns: Any, nbytes: Any) -> Any:
        """Tell (time blocked, bytes fetched) of an operation of this thread on `nbytes`.

        Where most of the bytes were fetched meanwhile, time off the CPU was spent waiting for storage. Where fewer
        were, they may have been asked for ahead of time: then waiting is believed as far as the bytes fetched so far
        account for it at a slow disk's rate. Other waiting, such as for other threads, is not reading.
        """
        read, _, cpu_ns = self.counters()
        fetched = read - before[0]
        blocked = min(wall_ns, max(0, wall_ns - (cpu_ns - before[2])))
        if fetched < nbytes // 2 or fetched < MIN_BYTES:
            if blocked < wall_ns * 0.3:
                return 0, 0
            blocked = min(blocked, self._credit_ns)
        self._credit_ns = max(0, self._credit_ns - blocked)
        return blocked, max(0, fetched) if blocked else 0

    # the file

    def note(self, **entry: Any) -> None:
        """Write a line that is not a span."""
        if self.on and not self._full:
            self._write(entry)

    def _check(self, now: Any) -> None:
        if now - self._flushed_ns > _FLUSH_NS:
            if self._deadline_ns is not None and now > self._deadline_ns:
                self.stop("for")
            else:
                self.flush(now)

    def flush(self, now: Any = None) -> None:
        """Write what is pending. Does nothing where another thread, or this one below a signal, is at it."""
        # never waits: a signal handler runs in the thread that may hold it
        if not self._lock.acquire(False):
            return
        try:
            self._flushed_ns = now or self._clock()
            rows, self._pending = self._pending, []
            # rows that were written must not grow any more
            self._generation += 1
            still_open = [[name, start, label] for name, label, start in self._stack.open]
            if self._full:
                self.facts["left_out"] = self.facts.get("left_out", 0) + len(rows)
            elif rows or still_open:
                self._write({"spans": rows, "open": still_open, "at": self._flushed_ns, "track": self._stack.track})
        finally:
            self._lock.release()

    def _write(self, document: Any) -> None:
        try:
            line = (_dumps(document) + "\n").encode()
            self._nbytes += len(line)
            self._full = self._nbytes > _MAX_BYTES
            os.write(self._file, line)
        except (OSError, ValueError):
            self.on = False

    def stop(self, why: Any) -> None:
        """End the recording; the program goes on without hooks."""
        if not self.on or os.getpid() != self._pid:
            return
        now, stack = self._clock(), self._stack
        if stack.open:
            name, label, start = stack.open[-1]
            self._row(name, label, start, now, 0)
        self.on = False
        self.flush(now)
        self._write({"end": {"at": now, "why": why, "facts": self.facts}})
        for undo in reversed(self.undo):
            try:
                undo()
            except Exception:
                continue

    def close(self) -> None:
        """Close the files, after the end."""
        self.on = False
        for fd in (self._file, self._io):
            if fd is not None:
                os.close(fd)
        self._io = None


def _after_fork_of(recorder: Any) -> None:
    if recorder is not None:
        recorder._after_fork()


def _open_or_none(path: Any) -> Any:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None


def _track_name() -> Any:
    threading = sys.modules.get("threading")
    try:
        thread = threading.current_thread()  # type: ignore[union-attr]
        return thread.name if thread is threading.main_thread() else f"{thread.name} {get_native_id()}"  # type: ignore[union-attr]
    except Exception:  # not imported yet, or only half: so there is but one thread
        return "MainThread"


def _dumps(value: Any) -> Any:
    """Write JSON. The json package is used where the program has it: importing it takes longer than all of this."""
    json = sys.modules.get("json")
    if hasattr(json, "dumps"):
        return json.dumps(value)  # type: ignore[union-attr]
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_dumps(str(k))}: {_dumps(v)}" for k, v in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_dumps(v) for v in value) + "]"
    if isinstance(value, str):
        return (
            '"' + "".join(c if " " <= c <= "~" and c not in '"\\' else f"\\u{ord(c) & 0xFFFF:04x}" for c in value) + '"'
        )
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return str(value)
