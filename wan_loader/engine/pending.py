"""The blocks of a load that are left to do, as far as planned. Two threads take from them, each from its own end."""

from __future__ import annotations

from collections import deque
from itertools import chain
from typing import TYPE_CHECKING

from wan_loader.plan.blocks import Transport, apart, split
from wan_loader.plan.engine_settings import TransferMode

if TYPE_CHECKING:
    from collections.abc import Iterable

    from wan_loader.plan.blocks import Block

__all__ = ["PendingBlocks"]

#: Smaller segments are not worth a read of their own.
_MIN_ALONE_BYTES = 256 << 10


class PendingBlocks:
    """Blocks that stay mapped, taken from the front, and blocks to be read, cut to the slots of the pinned ring.

    Where both may take mapped blocks, reading takes them from the far end. The ends of a deque may be taken by
    different threads, so the split between mapping and reading needs no tuning: both meet when everything is done.
    """

    def __init__(self, slot_bytes: int, *, mode: TransferMode, may_map: bool) -> None:
        """Begin with nothing to do.

        Args:
            slot_bytes: The most that one read brings.
            mode: If it is `SHARED`, mapped blocks are read too; if it is `IN_PLACE`, large segments that are read
                through the page cache stand alone, each in reads of its own.
            may_map: False if no block stays mapped: all are read.
        """
        self._mapped: deque[Block] = deque()
        self._blocks: deque[Block] = deque()
        self._cut: deque[Block] = deque()
        self._slot_bytes = slot_bytes
        self._shares_mapped = mode is TransferMode.SHARED
        self._apart = mode is TransferMode.IN_PLACE
        self._may_map = may_map

    def add(self, blocks: Iterable[Block]) -> None:
        """Add blocks to what is left; before the second thread begins."""
        for block in blocks:
            (self._mapped if block.transport is Transport.MAPPED and self._may_map else self._blocks).append(block)

    @property
    def has_mapped(self) -> bool:
        """True if mapped blocks are left."""
        return bool(self._mapped)

    @property
    def is_left(self) -> bool:
        """True if anything is left to be read."""
        return bool(self._cut or self._blocks or (self._shares_mapped and self._mapped))

    @property
    def n_unmapped(self) -> int:
        """The number of blocks that can only be read, whoever is quicker."""
        return len(self._blocks)

    def next_mapped(self) -> Block | None:
        """Take the next mapped block; for one thread. None: there is none."""
        return _pop(self._mapped, first=True)

    def next_read(self) -> Block | None:
        """Take the next block to read, cut so that it fits a slot; for one thread. None: there is none."""
        if not self._cut:
            # one thread cuts: what it has cut is its own, and no other looks at it
            block = _pop(self._blocks, first=True)
            # from the far end: the mapper takes from the front, and both meet once
            if block is None and self._shares_mapped:
                block = _pop(self._mapped, first=False)
            if block is not None:
                transport = Transport.BUFFERED if block.transport is Transport.MAPPED else block.transport
                block = block._replace(transport=transport)
                parts = list(split(block, self._slot_bytes))
                cut: Iterable[Block] = (part._replace(whole=block) for part in parts) if len(parts) > 1 else parts
                if self._apart and transport is Transport.BUFFERED:
                    cut = chain.from_iterable(apart(each, _MIN_ALONE_BYTES) for each in cut)
                self._cut.extend(cut)
        return _pop(self._cut, first=True)

    def map_nothing(self, refused: Block) -> None:
        """Have a block that cannot be mapped, and all that have not been yet, read instead."""
        self._may_map = False
        self._blocks.append(refused)
        while (block := self.next_mapped()) is not None:
            self._blocks.append(block)

    def cancel(self) -> None:
        """Drop everything that is left."""
        self._mapped.clear()
        self._blocks.clear()
        self._cut.clear()


def _pop(blocks: deque[Block], *, first: bool) -> Block | None:
    try:
        return blocks.popleft() if first else blocks.pop()
    except IndexError:  # the other thread took the last one
        return None
