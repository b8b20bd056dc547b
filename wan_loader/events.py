"""Spans: what happened when, told to an observer. The one place of the package that reads a clock.

Code that does work opens a span at each stage border; what becomes of it is the observer's business. Without an
observer a span costs nothing. Closing a span never synchronises a device: device time comes from events that are
resolved after the final synchronise and is recorded like any other span.
"""

from __future__ import annotations

import contextlib
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

__all__ = ["Observer", "Recorder", "Span", "busy_ns", "clock_ns", "span"]


@dataclass(frozen=True, slots=True)
class Span:
    """One interval of work on one track (a thread or a device stream)."""

    name: str
    """One of `phases.ALL_PHASES`."""
    start_ns: int
    end_ns: int
    nbytes: int = 0
    """Bytes of the checkpoint that passed through in this interval, 0 where bytes make no sense."""
    track: str = ""


class Observer(Protocol):
    """An object that is told of spans, from any thread, while the work goes on; it must be quick.

    It only observes. One that raises is told nothing more and named in the report's warnings; the work goes on.
    """

    def record(self, span: Span) -> None:
        """Take a span that has just ended."""


class Recorder:
    """The observer that keeps everything: a list of spans in the order in which they ended."""

    def __init__(self) -> None:
        self.spans: list[Span] = []

    def __repr__(self) -> str:
        return f"Recorder({len(self.spans)} spans)"

    def record(self, span: Span) -> None:
        """Keep a span."""
        self.spans.append(span)  # list.append is atomic


def clock_ns() -> int:
    """Return nanoseconds on the monotonic clock that all spans share."""
    return time.perf_counter_ns()


@contextlib.contextmanager
def span(
    observer: Observer | None, name: str, nbytes: int = 0, *, track: str = "", clock: Callable[[], int] = clock_ns
) -> Iterator[None]:
    """Record the body as a span of this thread, or of `track`, also when it raises."""
    if observer is None:
        yield
        return
    start_ns = clock()
    try:
        yield
    finally:
        observer.record(Span(name, start_ns, clock(), nbytes, track or threading.current_thread().name))


def busy_ns(spans: Iterable[Span]) -> int:
    """Return the length of the union of the spans' intervals: overlapping spans count once."""
    total, frontier = 0, 0
    for start_ns, end_ns in sorted((s.start_ns, s.end_ns) for s in spans):
        if end_ns > frontier:
            # sorted by start, so that all before the frontier was counted
            total += end_ns - max(start_ns, frontier)
            frontier = end_ns
    return total
