"""Progress per phase on stderr: bars on a terminal, a line per finished phase elsewhere."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING

from wan_loader.cli.output import say
from wan_loader.events import clock_ns

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["phase_progress"]


@contextlib.contextmanager
def phase_progress(*, quiet: bool = False) -> Iterator[Callable[[str, int, int], None]]:
    """Yields a function that is told of a phase, the steps done and the steps in all."""
    if quiet:
        yield lambda phase, done, total: None
        return
    if not sys.stderr.isatty():
        yield _lines()
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from wan_loader.console import PlainConsole

    columns = (TextColumn("{task.description:8}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=PlainConsole(stderr=True)) as bar:
        tasks = {}

        def show(phase: str, done: int, total: int) -> None:
            if phase not in tasks:
                tasks[phase] = bar.add_task(phase, total=total)
            bar.update(tasks[phase], completed=done, total=total)

        yield show


def _lines() -> Callable[[str, int, int], None]:
    started: dict[str, int] = {}

    def show(phase: str, done: int, total: int) -> None:
        start_ns = started.setdefault(phase, clock_ns())
        if done == total:
            say(f"{phase}: {total} done in {(clock_ns() - start_ns) / 1e9:.2f} s")

    return show
