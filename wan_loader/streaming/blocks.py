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
from wan_loader.plan.blocks import ByteRange

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from wan_loader.formats.checkpoint_facts import Checkpoint, TensorFacts
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

    def start_of(self, segment: Segment) -> int:
        """Return where the bytes of a segment of this tensor begin in the buffer."""
        return self.start + segment.storage_start // self._itemsize_read * self._itemsize

    def nbytes_of(self, segment: Segment) -> int:
        """Return how many bytes of the buffer a segment of this tensor fills."""
        return segment.nbytes // self._itemsize_read * self._itemsize

    @property
    def _itemsize_read(self) -> int:
        return 1 if self.source is None else ITEMSIZE[self.source]

    @property
    def _itemsize(self) -> int:
        return 1 if self.source is None else ITEMSIZE[self.dtype]


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
    places: list[Place] = []
    ranges: list[ByteRange] = []
    start = 0
    for tensor in tensors:
        dtype = policy.target(tensor.name, tensor.dtype)
        source = None if dtype == tensor.dtype else tensor.dtype
        storage, itemsize = checkpoint.storages[tensor.storage], ITEMSIZE[tensor.dtype]
        first = storage.start + tensor.offset * itemsize
        end = first + tensor.nbytes
        ranges.append(ByteRange(len(places), storage.file, first, end, 1 if source is None else itemsize))
        nbytes = prod(tensor.shape) * ITEMSIZE[dtype]
        places.append(Place(tensor.name, tensor.shape, dtype, source, start, nbytes))
        start += -(-nbytes // _ALIGNMENT) * _ALIGNMENT
    return BlockLayout(block, tuple(places), tuple(ranges), start)
