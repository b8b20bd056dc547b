"""The streamable tensors of each block, and their places in a buffer. Pure: names, shapes and byte ranges.

A tensor can be streamed if it is a parameter of one block alone, and lies in its file as it does in memory. What a
module may write to (its buffers), and what it shares with others, stays on the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, NamedTuple

from wan_loader.dtypes import ITEMSIZE
from wan_loader.formats.checkpoint_facts import contiguous_strides
from wan_loader.formats.gguf_types import GGUF_TYPES
from wan_loader.plan.blocks import ByteRange
from wan_loader.plan.quantised_values import values_among

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from wan_loader.formats.checkpoint_facts import Checkpoint, Quantised, TensorFacts
    from wan_loader.plan.blocks import Segment
    from wan_loader.plan.dtype_policy import DtypePolicy

__all__ = ["BlockLayout", "Place", "lay_out_block", "streamable"]

#: Tensors begin at multiples of this in a buffer, as they do where torch allocates them: kernels are chosen by it.
_ALIGNMENT = 512


class Place(NamedTuple):
    """The place of a tensor in a buffer."""

    name: str
    """Its name in the checkpoint."""
    shape: tuple[int, ...]
    dtype: str
    source: str | None
    """Its dtype in the file where its bytes are converted on the way; None: they are copied."""
    start: int
    nbytes: int
    quantised: Quantised | None = None
    """What its numbers are made of, if they are."""
    unit_read: int = 1
    """The bytes of the file that are converted together ..."""
    unit: int = 1
    """... to so many of the buffer."""

    def start_of(self, segment: Segment) -> int:
        """Return where the bytes of a segment of this tensor begin in the buffer."""
        return self.start + segment.storage_start // self.unit_read * self.unit

    def nbytes_of(self, segment: Segment) -> int:
        """Return how many bytes of the buffer a segment of this tensor fills."""
        return segment.nbytes // self.unit_read * self.unit


@dataclass(frozen=True, slots=True)
class BlockLayout:
    """One block: its tensors, in the order of the file, and the bytes that fill a buffer with them."""

    name: str
    """The block's name in the module."""
    places: tuple[Place, ...] = ()
    byte_ranges: tuple[ByteRange, ...] = ()
    """For each of `places`, whose numbers are their `storage`."""
    nbytes: int = 0
    """The bytes of the buffer that it fills."""

    @property
    def nbytes_file(self) -> int:
        """The bytes that are read for it."""
        return sum(r.end - r.start for r in self.byte_ranges)

    @property
    def converts(self) -> bool:
        """True if some bytes are converted on the way."""
        return any(place.source is not None for place in self.places)

    @property
    def quantised(self) -> tuple[Quantised, ...]:
        """What numbers are made of on the way."""
        return tuple(place.quantised for place in self.places if place.quantised is not None)


def streamable(
    block: str, slots: Mapping[str, Sequence[str]], parameters: Collection[str], facts: Iterable[TensorFacts]
) -> list[TensorFacts]:
    """Return the tensors of a checkpoint that can be streamed into a block.

    Args:
        block: The dotted name of the block.
        slots: All module names that each name of the checkpoint fills.
        parameters: The names of the module's parameters.
        facts: The tensors of the checkpoint that fill the module.
    """
    return [
        tensor
        for tensor in facts
        if tensor.nbytes
        and tensor.stride == contiguous_strides(tensor.shape)
        and all(name.startswith(f"{block}.") and name in parameters for name in slots[tensor.name])
    ]


def lay_out_block(
    block: str, tensors: Iterable[TensorFacts], checkpoint: Checkpoint, policy: DtypePolicy
) -> BlockLayout:
    """Give each tensor of a block its place in a buffer: in the order of the file, so that neighbours stay neighbours.

    Args:
        block: The dotted name of the block.
        tensors: Those that are streamed, of `streamable`.
        checkpoint: The checkpoint that holds them.
        policy: The dtype that each of them gets.
    """
    tensors = list(tensors)
    values = values_among(tensors, checkpoint)
    places: list[Place] = []
    ranges: list[ByteRange] = []
    start = 0
    for tensor in tensors:
        dtype = policy.target(tensor.name, tensor.dtype)
        quantised = values.get(tensor.name)
        raw = tensor if quantised is None else quantised.raw
        source, unit_read, unit = _units(raw, dtype, quantised)
        storage = checkpoint.storages[raw.storage]
        first = storage.start + raw.offset * ITEMSIZE[raw.dtype]
        ranges.append(ByteRange(len(places), storage.file, first, first + raw.nbytes, unit_read))
        nbytes = prod(tensor.shape) * ITEMSIZE[dtype]
        places.append(Place(tensor.name, tensor.shape, dtype, source, start, nbytes, quantised, unit_read, unit))
        start += -(-nbytes // _ALIGNMENT) * _ALIGNMENT
    return BlockLayout(block, tuple(places), tuple(ranges), start)


def _units(raw: TensorFacts, dtype: str, quantised: Quantised | None) -> tuple[str | None, int, int]:
    """Return what is converted from, if anything, and how many bytes of it become how many."""
    if quantised is None:
        if raw.dtype == dtype:
            return None, 1, 1
        return raw.dtype, ITEMSIZE[raw.dtype], ITEMSIZE[dtype]
    if quantised.scale is not None:
        return raw.dtype, ITEMSIZE[raw.dtype], ITEMSIZE[dtype]
    kind = next(one for one in GGUF_TYPES.values() if one.name == quantised.kind)
    return raw.dtype, kind.block_nbytes, kind.block_elements * ITEMSIZE[dtype]
