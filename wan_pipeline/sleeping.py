"""Networks that give their memory back and take it again, for `WanT2V.sleep` and `WanT2V.wake`."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from typing import TYPE_CHECKING

from wan_loader import clock_ns

if TYPE_CHECKING:
    import torch

    from wan_pipeline.residency import ModuleResidency

__all__ = ["Slept", "Woken", "fall_asleep", "wake_up"]


@dataclass(frozen=True, slots=True)
class Slept:
    """What going to sleep gave back."""

    networks: tuple[str, ...]
    """The networks that were there, or on their way."""
    nbytes: int
    """Bytes of their weights, wherever they were; those of blocks that are streamed are in files mostly."""
    device_nbytes_before: int
    """Bytes of the device that this process had taken for tensors, and for more of them; 0 on a CPU."""
    device_nbytes_after: int
    """What of it is left: work space of libraries. The device's context, some hundred MB, is not counted."""
    seconds: float

    @property
    def device_nbytes(self) -> int:
        """The bytes of the device that others may use now."""
        return self.device_nbytes_before - self.device_nbytes_after


@dataclass(frozen=True, slots=True)
class Woken:
    """What waking up took again."""

    networks: tuple[str, ...]
    """The networks that are there now; none if it was awake."""
    nbytes: int
    """Bytes of files that were read for them."""
    seconds: float

    @property
    def gbps(self) -> float:
        """The rate in 10**9 bytes per second."""
        return self.nbytes / self.seconds / 1e9 if self.seconds else 0.0


def fall_asleep(residency: ModuleResidency, device: torch.device) -> Slept:
    """Free all networks, and give what the allocator of `device` keeps for more back to the driver."""
    import torch

    start_ns, on_cuda = clock_ns(), device.type == "cuda"
    before = torch.cuda.memory_reserved(device) if on_cuda else 0
    nbytes, names = residency.weights_nbytes, residency.drop_all()
    # errors that were raised and caught may still hold tensors, in circles
    gc.collect()
    after = 0
    if on_cuda:
        torch.cuda.empty_cache()
        after = torch.cuda.memory_reserved(device)
    return Slept(names, nbytes, before, after, (clock_ns() - start_ns) / 1e9)


def wake_up(residency: ModuleResidency) -> Woken:
    """Fetch what a start fetches, and wait for it."""
    if not residency.is_empty:
        return Woken((), 0, 0.0)
    start_ns, known = clock_ns(), len(residency.log.loads)
    residency.start()
    residency.wait_all()
    nbytes = sum(report.nbytes_file for *_, report in residency.log.loads[known:])
    return Woken(residency.resident(), nbytes, (clock_ns() - start_ns) / 1e9)
