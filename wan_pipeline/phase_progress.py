"""Progress per phase on stderr: bars on a terminal, a line per finished phase elsewhere."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from wan_loader import clock_ns
from wan_loader.cli import progress_bars, say

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["phase_progress"]


@contextlib.contextmanager
def phase_progress(*, quiet: bool = False) -> Iterator[Callable[[str, int, int], None]]:
    """Give a function that is told of a phase, the steps done and the steps in all."""
    if quiet:
        yield lambda phase, done, total: None
        return
    with progress_bars(steps=True) as tell:
        yield tell or _lines()


def _lines() -> Callable[[str, int, int], None]:
    started: dict[str, int] = {}

    def show(phase: str, done: int, total: int) -> None:
        start_ns = started.setdefault(phase, clock_ns())
        if done == total:
            say(f"{phase}: {total} done in {(clock_ns() - start_ns) / 1e9:.2f} s")

    return show
