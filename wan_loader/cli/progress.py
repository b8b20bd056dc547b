"""Progress on stderr, where that is a terminal: the one place where bars are made, for both programs."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

from wan_loader.console import PlainConsole
from wan_loader.distributed.processes import is_first, world_size
from wan_loader.printable import printable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import TypeAlias

    from rich.progress import Progress

    from wan_loader.events import Observer, Span

    #: Told of a title, what is done, and what there is to do; 0 where that is not known.
    Tell: TypeAlias = Callable[[str, int, int], None]

__all__ = ["byte_progress", "counting_progress", "progress_bars", "reading_progress"]


@contextmanager
def progress_bars(title: str = "", total: int = 0, *, steps: bool = False) -> Iterator[Tell | None]:
    """Show how far some work is.

    Args:
        title: What is shown before anything was told.
        total: What there is to do, as far as it is known beforehand.
        steps: Count steps, with a bar for each title that stays; otherwise bytes, in one bar that goes at the end.

    Yields:
        A function that is told of the work, from any thread; None where stderr is no terminal.
    """
    console = PlainConsole(stderr=True)
    if not console.is_terminal:
        yield None
        return
    with (_step_bars if steps else _byte_bar)(console) as progress:
        tasks = {} if steps else {"": progress.add_task(printable(title), total=total or None)}

        def tell(title: str, done: int, total: int) -> None:
            key = title if steps else ""
            if key not in tasks:
                tasks[key] = progress.add_task("")
            progress.update(tasks[key], description=printable(title), completed=done, total=total or None)

        yield tell


def _byte_bar(console: PlainConsole) -> Progress:
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    description = TextColumn("{task.description}", markup=False)
    columns = (description, BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True)


def _step_bars(console: PlainConsole) -> Progress:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    description = TextColumn("{task.description:8}", markup=False)
    return Progress(description, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console)


class _Sum:
    """Adds up the bytes that are done, from any thread."""

    def __init__(self, tell: Tell, title: str, total: int) -> None:
        self._tell, self._title, self._total = tell, title, total
        self._done = 0
        self._lock = threading.Lock()

    def add(self, nbytes: int) -> None:
        """Count bytes that were done since."""
        with self._lock:
            self._done += nbytes
            self._tell(self._title, self._done, self._total)

    def record(self, span: Span) -> None:
        """Count what was read, as the observer of a load."""
        if span.name == "read":
            self.add(span.nbytes)


@contextmanager
def byte_progress(title: str) -> Iterator[Callable[[int, int], None] | None]:
    """Give a function that is told (done, total) bytes, or None where stderr is no terminal."""
    with progress_bars(title) as tell:
        yield None if tell is None else lambda done, total: tell(title, done, total)


@contextmanager
def counting_progress(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show a progress bar that is told how many bytes more are done, where stderr is a terminal."""
    with progress_bars(title, total) as tell:
        yield (lambda nbytes: None) if tell is None else _Sum(tell, title, total).add


@contextmanager
def reading_progress(total: int) -> Iterator[Observer | None]:
    """Give an observer that shows a progress bar, where stderr is a terminal; in a distributed run the first's."""
    if not is_first():
        yield None
        return
    total //= world_size()
    with progress_bars("reading", total) as tell:
        yield None if tell is None else _Sum(tell, "reading", total)
