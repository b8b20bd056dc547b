"""Daemon threads: one that does something in the background, or a few that carry out tasks.

The few are for work on files (copies, checks, downloads) whose tasks are independent: the first failure, or Ctrl-C,
ends all of them. The caller's thread only waits and reports progress, so that a signal is handled at once whatever the
threads are doing.
"""

from __future__ import annotations

import threading
from contextlib import suppress
from typing import TYPE_CHECKING

from wan_loader.system.machine import processors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

__all__ = ["StoppedError", "default_threads", "in_background", "run_all"]

_TICK_S = 0.1
#: How long a failed or interrupted run waits for its threads; one that hangs in a system call is left behind.
_GRACE_S = 0.3


class StoppedError(Exception):
    """A task saw `stop` and gave up; not a failure of its own."""


def default_threads() -> int:
    """Return as many threads as keep a disk or the memory busy, and no more."""
    return max(4, min(8, processors()))


def in_background(work: Callable[[], object], name: str) -> threading.Thread | None:
    """Start a daemon thread that does `work`. Where no further thread is allowed, do it now and return None."""
    thread = threading.Thread(target=work, name=name, daemon=True)
    with suppress(RuntimeError):
        thread.start()
    if thread.ident is not None:  # it began, even if a signal disturbed the wait for that
        return thread
    work()
    return None


class _Crew:
    def __init__(self, tasks: Iterator[Callable[[], None]], stop: threading.Event) -> None:
        self._tasks = tasks
        self._lock = threading.Lock()
        self._stop = stop
        self.error: BaseException | None = None

    def _take(self) -> Callable[[], None] | None:
        with self._lock:
            # under the lock: a generator must not be entered by two threads at once
            return None if self._stop.is_set() else next(self._tasks, None)

    def work(self) -> None:
        try:
            while (task := self._take()) is not None:
                task()
        except StoppedError:
            self._stop.set()
        except BaseException as error:
            with self._lock:
                self.error = self.error or error
            self._stop.set()


def run_all(
    tasks: Iterable[Callable[[], None]],
    *,
    threads: int,
    stop: threading.Event,
    tick: Callable[[], None] | None = None,
) -> None:
    """Carry out `tasks`, each once, by `threads` threads; return when all are done.

    Args:
        tasks: Calls that do not depend on each other; long ones look at `stop` and raise `StoppedError`.
        threads: The number of daemon threads, at least one.
        stop: Set at the first failure, and by whoever wants to end the tasks.
        tick: Called about ten times a second in the caller's thread.

    Raises:
        BaseException: The first exception of a task or of `tick`, or Ctrl-C, after `stop` was set.
    """
    crew = _Crew(iter(tasks), stop)
    workers = [threading.Thread(target=crew.work, name=f"worker {i}", daemon=True) for i in range(max(1, threads))]
    try:
        for worker in workers:
            worker.start()
        for worker in workers:
            # never a join without a limit: signals are handled by this thread, between its own instructions
            while worker.is_alive():
                worker.join(_TICK_S)
                if tick is not None:
                    tick()
    except BaseException:
        stop.set()
        for worker in workers:
            # one that hangs in a system call is left behind; it is a daemon, so the program can end
            if worker.ident is not None:
                worker.join(_GRACE_S / len(workers))
        raise
    if crew.error is not None:
        raise crew.error
