"""The shared state of a load, under one lock: what is to do, what is ready, what failed.

Readers `take` work and `put` results; the carrying thread takes results with `next_ready`. Whoever fails says so with
`fail`, and everybody else ends at the next step.
"""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from wan_loader.plan import Block, Way, split

if TYPE_CHECKING:
    from collections.abc import Sequence

    from wan_loader.plan import Plan
    from wan_loader.staging import Slot

__all__ = ["Board", "CancelledError", "Filled", "Window"]

#: Windows faulted in ahead of the one being registered; readers no longer take these for staging.
_AHEAD = 3


class CancelledError(Exception):
    """Ends a thread whose work is no longer wanted. Never leaves the engine."""


@dataclass(frozen=True, slots=True)
class Window:
    """A mapped block whose pages are faulted in, at `address`."""

    block: Block
    address: int


@dataclass(frozen=True, slots=True)
class Filled:
    """A part of a block that lies in a slot, and the way it came."""

    block: Block
    slot: Slot
    way: Way


class Board:
    """What is to do, what is ready, what failed."""

    def __init__(self, plan: Plan, slot_bytes: int, *, may_steal: bool) -> None:
        self._lock = threading.Lock()
        self._for_readers = threading.Condition(self._lock)
        self._for_carrier = threading.Condition(self._lock)
        self._slot_bytes = slot_bytes
        self._windows = deque(b for b in plan.blocks if b.way is Way.MAPPED)
        self._blocks = deque(b for b in plan.blocks if b.way is not Way.MAPPED)
        self._parts: deque[Block] = deque()
        self._mapped_ahead = 0
        self._free: deque[Slot] = deque()
        self._filled: deque[Filled] = deque()
        self._mapped: deque[Window] = deque()
        self._to_submit = len(self._windows) + len(self._blocks)
        self._failure: BaseException | None = None
        self._cancelled = False
        self._may_steal = may_steal

    # for readers

    def take(self) -> Block | None:
        """The next thing for a reader: a mapped block to fault in, or a part of another to read into a slot.

        None when everything is done or cancelled.
        """
        with self._lock:
            while not self._cancelled and self._to_submit:
                if self._windows and self._mapped_ahead < _AHEAD:
                    self._mapped_ahead += 1
                    return self._windows.popleft()
                if not self._parts and self._blocks:
                    self._cut(self._blocks.popleft())
                elif not self._parts and self._windows and self._may_steal and self._free:
                    self._cut(self._windows.pop())
                if self._parts:
                    return self._parts.popleft()
                self._for_readers.wait()
        return None

    def acquire_slot(self) -> Slot:
        """A slot to fill, once its pending ticket is done."""
        with self._lock:
            while not self._free:
                if self._cancelled:
                    raise CancelledError
                self._for_readers.wait()
            return self._free.popleft()

    def put(self, ready: Window | Filled) -> None:
        """Hand over what a reader has done."""
        with self._lock:
            if isinstance(ready, Window):
                self._mapped.append(ready)
            else:
                self._filled.append(ready)
            self._for_carrier.notify()

    def fail(self, failure: BaseException) -> None:
        """Remember the first failure and let everybody else end."""
        with self._lock:
            self._failure = self._failure or failure
        self.cancel()

    def cancel(self) -> None:
        """Let every thread end at its next step."""
        with self._lock:
            self._cancelled = True
            self._for_readers.notify_all()
            self._for_carrier.notify_all()

    # for the carrying thread

    def next_ready(self) -> Window | Filled | None:
        """The next thing to pin or to submit; None when everything was submitted. Raises the first failure.

        Slots first: registering a window takes long.
        """
        with self._lock:
            while self._to_submit:
                if self._failure is not None:
                    raise self._failure
                if self._filled:
                    return self._filled.popleft()
                if self._mapped:
                    self._mapped_ahead -= 1
                    self._for_readers.notify()
                    return self._mapped.popleft()
                self._for_carrier.wait()
        return None

    def submitted(self, slot: Slot | None = None) -> None:
        """One ready thing has been submitted; its slot may be used again once its ticket is done."""
        with self._lock:
            self._to_submit -= 1
            if slot is not None:
                self._free.append(slot)
            if self._to_submit == 0:
                self._for_readers.notify_all()
            elif slot is not None:
                self._for_readers.notify()

    def add_slots(self, slots: Sequence[Slot]) -> None:
        """Give readers slots to fill."""
        with self._lock:
            self._free.extend(slots)
            self._for_readers.notify_all()

    def give_up_windows(self, refused: Window) -> None:
        """Send a refused window, and all that are not yet submitted, through staging."""
        with self._lock:
            self._mapped_ahead -= len(self._mapped)
            for block in (refused.block, *(w.block for w in self._mapped), *self._windows):
                self._cut(block)
            self._mapped.clear()
            self._windows.clear()
            self._for_readers.notify_all()

    def _cut(self, block: Block) -> None:
        """Turn a block into parts that fit a slot."""
        way = Way.BUFFERED if block.way is Way.MAPPED else block.way
        parts = split(replace(block, way=way), self._slot_bytes)
        self._parts.extend(parts)
        self._to_submit += len(parts) - 1
