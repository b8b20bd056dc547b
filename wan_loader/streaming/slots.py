"""The memory that bytes pass through between the files and the device: a bounded number of slots, made when needed."""

from __future__ import annotations

from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING

from wan_loader.devices.writer import PinError
from wan_loader.engine.pinned_ring import PinnedRing
from wan_loader.system.machine import affordable_buffers
from wan_loader.system.posix import populate

if TYPE_CHECKING:
    from wan_loader.streaming.device import StreamDevice

__all__ = ["N_READS", "Slots"]

#: Reads side by side: some disks give more, the more is asked for at once.
N_READS = 12
#: One slot of each read is filled while the other is emptied.
_PER_READ = 2


class Slots:
    """The slots of one device, pinned where it copies late.

    Args:
        device: What bytes are copied to.
        nbytes: What one slot has to hold.
    """

    def __init__(self, device: StreamDevice, nbytes: int) -> None:
        self._device = device
        self._nbytes = nbytes
        self._stack = ExitStack()
        self._ring: PinnedRing | None = None
        self.fallbacks: list[str] = []
        """Reasons why the slots are not what they should be."""

    def ring(self) -> PinnedRing:
        """Return the ring of slots.

        Raises:
            HostMemoryError: There is no memory for it.
        """
        if self._ring is None:
            self._ring = self._make()
        return self._ring

    def _make(self) -> PinnedRing:
        late = self._device.copies_late
        n_slots = affordable_buffers(_PER_READ * N_READS, self._nbytes) if late else 1
        ring = PinnedRing(self._nbytes, n_slots, pinned=late)
        self._stack.callback(ring.close)
        if late:
            address = ring.slots[0].address
            self._stack.callback(self._device.unpin, address)
            with suppress(OSError):  # then registering has more to do
                populate(address, ring.nbytes, write=True)
            try:
                self._device.pin(address, ring.nbytes, read_only=False)
                for slot in ring.slots:
                    slot.pinned = True
            except PinError as refusal:
                self.fallbacks.append(f"the slots are not pinned, copies are slower: {refusal}")
        return ring

    def close(self) -> None:
        """Give the memory back, after the last copy out of it."""
        self._ring = None
        self._stack.close()
