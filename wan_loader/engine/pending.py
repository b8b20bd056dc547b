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
_MIN_ALONE_BYTES = 256 << 10


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
        self._mapped: deque[Block] = deque()
        self._blocks: deque[Block] = deque()
        self._cut: deque[Block] = deque()
        self._slot_bytes = slot_bytes
        self._shares_mapped = mode is TransferMode.SHARED
        self._apart = mode is TransferMode.IN_PLACE
        self._may_map = may_map

    def add(self, blocks: Iterable[Block]) -> None:
        """More of it; before the second thread begins."""
        for block in blocks:
            (self._mapped if block.transport is Transport.MAPPED and self._may_map else self._blocks).append(block)

    @property
    def has_mapped(self) -> bool:
        """Whether mapped blocks are left."""
        return bool(self._mapped)

    @property
    def is_left(self) -> bool:
        """Whether anything is left for staging."""
        return bool(self._cut or self._blocks or (self._shares_mapped and self._mapped))

    @property
    def n_unmapped(self) -> int:
        """Blocks that nobody but staging will take."""
        return len(self._blocks)

    def next_mapped(self) -> Block | None:
        """The next mapped block; for one thread."""
        return _pop(self._mapped, first=True)

    def next_read(self) -> Block | None:
        """The next block or part of one that fits a slot; for one thread."""
        if not self._cut:
            block = _pop(self._blocks, first=True)
            if block is None and self._shares_mapped:
                block = _pop(self._mapped, first=False)
            if block is not None:
                transport = Transport.BUFFERED if block.transport is Transport.MAPPED else block.transport
                cut = split(block._replace(transport=transport), self._slot_bytes)
                if self._apart and transport is Transport.BUFFERED:
                    cut = chain.from_iterable(apart(each, _MIN_ALONE_BYTES) for each in cut)
                self._cut.extend(cut)
        return _pop(self._cut, first=True)

    def map_nothing(self, refused: Block) -> None:
        """Send a block that cannot be mapped, and all that have not been yet, through staging."""
        self._may_map = False
        self._blocks.append(refused)
        while (block := self.next_mapped()) is not None:
            self._blocks.append(block)

    def cancel(self) -> None:
        """Nothing is to be done any more."""
        self._mapped.clear()
        self._blocks.clear()
        self._cut.clear()


def _pop(blocks: deque[Block], *, first: bool) -> Block | None:
    try:
        return blocks.popleft() if first else blocks.pop()
    except IndexError:  # the other thread took the last one
        return None
