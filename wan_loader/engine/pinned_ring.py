"""The pinned ring: a bounded number of slots that bytes pass through between a file and a device, used again and again.

One anonymous mapping, cut into page-aligned slots, and asked to be of huge pages (`pin_memory=True` faults 4 KiB pages
in one by one, ten times slower) unless they are never pinned. Registering them with the driver is `pinning`'s; on the
CPU they stay as they are. The memory is unmapped by `close`, which must come after the last copy out of it.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from dataclasses import dataclass

from wan_loader.errors import HostMemoryError
from wan_loader.system.posix import PAGE

__all__ = ["PinnedRing", "Slot"]

#: Every ring that is not closed. Memory that is registered with the driver must not be unmapped because a reference
#: was forgotten: the driver would copy its old pages into whatever gets the address next.
_OPEN: set[PinnedRing] = set()


@dataclass(slots=True)
class Slot:
    """The memory `view`, which begins at `address`."""

    address: int
    view: memoryview
    pinned: bool = False


class PinnedRing:
    """A ring of `n_slots` slots, each of `block_bytes` and one page: any block fits with both ends rounded to pages.

    Args:
        block_bytes: The most that one slot has to hold.
        n_slots: The number of slots.
        pinned: The slots are going to be registered with the driver.

    Raises:
        HostMemoryError: There is not as much memory.
    """

    def __init__(self, block_bytes: int, n_slots: int, *, pinned: bool = True) -> None:
        self.slot_bytes = block_bytes + PAGE
        self.nbytes = self.slot_bytes * n_slots
        try:
            self._map = mmap.mmap(-1, self.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise HostMemoryError.because(
                f"{self.nbytes} bytes of pinned ring cannot be allocated", "free some memory"
            ) from error
        _OPEN.add(self)
        self._map.madvise(mmap.MADV_DONTFORK)  # a fork would make pinned pages copy-on-write under running copies
        if pinned:
            with contextlib.suppress(OSError):  # a kernel without transparent huge pages: small pages do as well
                self._map.madvise(mmap.MADV_HUGEPAGE)
        self._view = memoryview(self._map)
        base = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self.slots = [
            Slot(base + offset, self._view[offset : offset + self.slot_bytes])
            for offset in range(0, self.nbytes, self.slot_bytes)
        ]

    def close(self) -> bool:
        """Give the memory back, once nothing of it is registered any more; return True. Views elsewhere keep it."""
        _OPEN.discard(self)
        for slot in self.slots:
            slot.view.release()
        self._view.release()
        # somebody still holds a view: the mapping goes with the last one
        with contextlib.suppress(BufferError):
            self._map.close()
        return True
