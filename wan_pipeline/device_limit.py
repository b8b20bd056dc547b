"""A bound on what torch's allocator holds on a device, for as long as a pipeline needs it.

The plan keeps weights and work below a limit, but between tensors the allocator keeps memory that it could give back.
Told of the bound, it gives that back before it takes more.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["DeviceLimit"]


class DeviceLimit:
    """The bound, from here until `close`. It is of the whole process; nothing happens where there is none.

    Args:
        device: The device; only CUDA devices have an allocator that can be told.
        nbytes: The bytes that may be held; None: as many as there are.
    """

    def __init__(self, device: torch.device, nbytes: int | None) -> None:
        self._device = device if nbytes is not None and device.type == "cuda" else None
        if self._device is not None and nbytes is not None:
            import torch

            total = torch.cuda.mem_get_info(self._device)[1]
            torch.cuda.set_per_process_memory_fraction(min(1.0, nbytes / total), self._device)

    def close(self) -> None:
        """Let the process take all of the device again; again does nothing."""
        if self._device is not None:
            import torch

            torch.cuda.set_per_process_memory_fraction(1.0, self._device)
            self._device = None
