"""What is left to do of a load, as far as it is planned. Two threads take from it, each from its own end."""

from __future__ import annotations

from collections import deque
from itertools import chain
from typing import TYPE_CHECKING

from wan_loader.plan.blocks import Transport, apart, split
from wan_loader.plan.limits import TransferMode

if TYPE_CHECKING:
    from collections.abc import Iterable

    from wan_loader.plan.blocks import Block

__all__ = ["PendingBlocks"]

#: Smaller pieces are not worth a read of their own.
_ALONE_BYTES = 256 << 10


class PendingBlocks:
    """Mapped blocks, taken from the front; all others, and mapped ones from the far end, taken in parts for staging.

    The ends of a deque may be taken by different threads, so the split between the two ways needs no tuning: both meet
    when everything is done.
    """

    def __init__(self, slot_bytes: int, *, mode: TransferMode, may_map: bool) -> None:
        """Begin with nothing to do.

        mode: staging takes mapped blocks too if it is `SHARED`; large pieces that are read through the page cache stand
        alone, each in parts of its own, if it is `IN_PLACE`.
        may_map: whether mapped blocks stay mapped.
        """
        self._windows: deque[Block] = deque()
        self._blocks: deque[Block] = deque()
        self._parts: deque[Block] = deque()
        self._slot_bytes = slot_bytes
        self._may_steal = mode is TransferMode.SHARED
        self._apart = mode is TransferMode.IN_PLACE
        self._may_map = may_map

    def add(self, blocks: Iterable[Block]) -> None:
        """More of it; before the second thread begins."""
        for block in blocks:
            (self._windows if block.transport is Transport.MAPPED and self._may_map else self._blocks).append(block)

    @property
    def has_windows(self) -> bool:
        """Whether mapped blocks are left."""
        return bool(self._windows)

    @property
    def is_left(self) -> bool:
        """Whether anything is left for staging."""
        return bool(self._parts or self._blocks or (self._may_steal and self._windows))

    @property
    def n_staged(self) -> int:
        """Blocks that nobody but staging will take."""
        return len(self._blocks)

    def next_window(self) -> Block | None:
        """The next mapped block; for one thread."""
        return _pop(self._windows, first=True)

    def next_part(self) -> Block | None:
        """The next block or part of one that fits a slot; for one thread."""
        if not self._parts:
            block = _pop(self._blocks, first=True)
            if block is None and self._may_steal:
                block = _pop(self._windows, first=False)
            if block is not None:
                transport = Transport.BUFFERED if block.transport is Transport.MAPPED else block.transport
                parts = split(block._replace(transport=transport), self._slot_bytes)
                if self._apart and transport is Transport.BUFFERED:
                    parts = chain.from_iterable(apart(part, _ALONE_BYTES) for part in parts)
                self._parts.extend(parts)
        return _pop(self._parts, first=True)

    def map_nothing(self, refused: Block) -> None:
        """Send a block that cannot be mapped, and all that have not been yet, through staging."""
        self._may_map = False
        self._blocks.append(refused)
        while (block := self.next_window()) is not None:
            self._blocks.append(block)

    def cancel(self) -> None:
        """Nothing is to be done any more."""
        self._windows.clear()
        self._blocks.clear()
        self._parts.clear()


def _pop(blocks: deque[Block], *, first: bool) -> Block | None:
    try:
        return blocks.popleft() if first else blocks.pop()
    except IndexError:  # the other thread took the last one
        return None
