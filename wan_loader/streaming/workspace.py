"""What streamed modules share that never run at the same time: the buffers on the device, the slots, and budgets."""

from __future__ import annotations

from typing import TYPE_CHECKING

from wan_loader.streaming.schedule import Occupancy
from wan_loader.streaming.slots import Slots
from wan_loader.streaming.split import SharedBuffers

if TYPE_CHECKING:
    from wan_loader.streaming.device import StreamDevice
    from wan_loader.streaming.ledger import Ledger

__all__ = ["Workspace"]


class Workspace:
    """The buffers and slots of one device, for one streamed module or for several. The last that leaves closes it.

    Args:
        device: The buffers.
        device_name: The device that they lie on.
        slot_nbytes: What one slot has to hold.
        ledger: What all modules hold that share a budget.
    """

    def __init__(self, device: StreamDevice, device_name: str, slot_nbytes: int, ledger: Ledger) -> None:
        self.device = device
        self.device_name = device_name
        self.slots = Slots(device, slot_nbytes)
        self.occupancy = Occupancy(len(device.buffers))
        self.ledger = ledger
        self._n_users = 0
        self._scratch_nbytes = 0

    def shared(self) -> SharedBuffers | None:
        """Return what another module would share; None where every block of the first stays on the device."""
        buffers = self.device.buffers
        return SharedBuffers(len(buffers), buffers[0].numel(), self._scratch_nbytes) if buffers else None

    def reserve(self, scratch_nbytes: int, counted_nbytes: int) -> None:
        """Have room for conversions.

        Args:
            scratch_nbytes: The bytes of the longest segment that is converted.
            counted_nbytes: What conversions take in all.
        """
        self.device.reserve(scratch_nbytes)
        self._scratch_nbytes = max(self._scratch_nbytes, counted_nbytes)

    def join(self) -> None:
        """Have it stay open until `leave`."""
        with self.occupancy.lock:
            self._n_users += 1

    def leave(self) -> None:
        """Give buffers and slots back, if nobody else uses them. No copy into or out of them may be under way then."""
        with self.occupancy.lock:
            self._n_users -= 1
            if self._n_users:
                return
        try:
            self.slots.close()
        finally:
            self.device.close()
