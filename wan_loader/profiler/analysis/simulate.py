"""The prediction of a load on other hardware: reader, ring, copy and cast, played through block by block. Pure.

The plan is the one that a load would carry out, and it is cut as the engine cuts it. A resource works on one block at a
time at its rate; a block is read once a slot of the ring is free, copied once it was read, converted once it was
copied, and its slot is free again after the copy (on a GPU) or after the conversion (on the CPU).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain, groupby
from typing import TYPE_CHECKING

from wan_loader.dtypes import ITEMSIZE
from wan_loader.plan.blocks import split
from wan_loader.plan.dtype_policy import DtypePolicy
from wan_loader.plan.facts import Facts
from wan_loader.plan.plan import make_plan
from wan_loader.plan.request import LoadRequest
from wan_loader.system.machine import memory_limit, processors

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from wan_loader.formats.checkpoint_facts import Checkpoint
    from wan_loader.plan.layout import StoragePlan
    from wan_loader.plan.plan import LoadPlan

__all__ = [
    "STORAGES",
    "Hardware",
    "Prediction",
    "SimulatedBlock",
    "blocks_of",
    "plan_elsewhere",
    "simulate",
    "start_range",
]

#: Sequential reads of large blocks, in bytes per second, as such storage is sold and measured.
STORAGES: Mapping[str, float] = {
    "hdd": 0.18e9,
    "sata-ssd": 0.53e9,
    "nfs-10g": 1.1e9,
    "nvme-gen3": 3.2e9,
    "nvme-gen4": 6.8e9,
    "nvme-gen5": 12.5e9,
    "raid0x4": 26e9,
    "tmpfs": 30e9,
}
#: So much faster a start may be than samples that were taken in a crowd.
_ALONE = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """Rates in bytes per second."""

    disk: float
    copy: float
    """Host to device, or memory to memory for a load to the CPU."""
    cast: float
    """Of what goes in; on the CPU of that and of what comes out."""
    cuda: bool
    slots: int = 24
    fixed_s: float = 0.0
    """Seconds before the first byte: imports, the CUDA context."""


@dataclass(frozen=True, slots=True)
class SimulatedBlock:
    """Bytes that pass through the pipeline together."""

    nbytes: int
    cast: bool
    made: int = 0
    """Bytes that come out of a conversion."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """Seconds of the whole and of each resource at work."""

    seconds: float
    read_s: float
    copy_s: float
    cast_s: float
    fixed_s: float

    @property
    def bottleneck(self) -> str:
        """The resource that works longest."""
        times = {"disk": self.read_s, "copy": self.copy_s, "cast": self.cast_s, "fixed": self.fixed_s}
        return max(times, key=lambda name: times[name])


def plan_elsewhere(checkpoint: Checkpoint, dtype: str | None, *, cuda: bool) -> LoadPlan:
    """Plan a load of a whole checkpoint from a cold disk, on a machine that need not be there.

    Args:
        checkpoint: The checkpoint.
        dtype: As for `DtypePolicy`, whose errors are raised.
        cuda: Load to a GPU.
    """
    facts = Facts(device="cuda:0" if cuda else "cpu", processors=processors(), memory_limit=memory_limit())
    request = LoadRequest(
        source=checkpoint, device=facts.device, policy=DtypePolicy(dtype), owned=True, makes_values=True
    )
    return make_plan(request, request.open(), facts)


def blocks_of(plan: LoadPlan) -> list[SimulatedBlock]:
    """Return what is read, in the order of the plan, in blocks of a slot."""
    copied = plan.layout.copied
    blocks: list[SimulatedBlock] = []
    for block in chain.from_iterable(split(block, plan.settings.slot_bytes) for block in plan.blocks):
        for cast, segments in groupby(block.segments, key=lambda segment: copied[segment.storage].converts):
            pairs = [(segment.nbytes, _growth(copied[segment.storage])) for segment in segments]
            made = int(sum(nbytes * growth for nbytes, growth in pairs)) if cast else 0
            blocks.append(SimulatedBlock(sum(nbytes for nbytes, _ in pairs), cast, made))
    return blocks


def _growth(storage: StoragePlan) -> float:
    """Return the bytes that come out of a conversion for each that goes in."""
    return ITEMSIZE[storage.target] / ITEMSIZE[storage.source] if storage.target and storage.source else 1.0


def simulate(blocks: Sequence[SimulatedBlock], hardware: Hardware) -> Prediction:
    """Play the pipeline through."""
    read = copied = cast = hardware.fixed_s
    freed: list[float] = []
    read_s = copy_s = cast_s = 0.0
    for i, block in enumerate(blocks):
        # the slot that this block gets was that of the block one ring earlier
        slot_free = freed[i - hardware.slots] if i >= hardware.slots else 0.0
        reading, copying = block.nbytes / hardware.disk, block.nbytes / hardware.copy
        converting = (block.nbytes + (0 if hardware.cuda else block.made)) / hardware.cast if block.cast else 0.0
        if not hardware.cuda and block.cast:
            copying = 0.0  # on the CPU the conversion is the copy
        read = max(read, slot_free) + reading
        begin = max(read, copied) if hardware.cuda else max(read, copied, cast)
        copied = begin + copying
        cast = max(copied, cast) + converting
        freed.append(copied if hardware.cuda else cast)
        read_s, copy_s, cast_s = read_s + reading, copy_s + copying, cast_s + converting
    return Prediction(max(read, copied, cast), read_s, copy_s, cast_s, hardware.fixed_s)


def start_range(best_s: float, typical_s: float, worst_s: float, crowd: float) -> tuple[float, float]:
    """Return between what a start may take.

    Where several processes want each processor, the samples may have been taken with it for themselves, and the start
    shares it with all; or the other way round, so that it takes half as long.

    Args:
        best_s: What it takes with the best of all samples.
        typical_s: With their medians.
        worst_s: With the worst of them.
        crowd: How many processes want each processor now: 1 where all find one.
    """
    return best_s / min(crowd, _ALONE), max(worst_s, typical_s * crowd)
