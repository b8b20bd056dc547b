"""The seam between streaming and a device: buffers, copies into them, and who waits for whom.

Two implementations: `HostStreamDevice` copies at once, in host memory; `CudaStreamDevice` (`cuda_device`) queues copies
on a stream beside the one that computes.
"""

from __future__ import annotations

import ctypes
from contextlib import AbstractContextManager, nullcontext
from math import prod
from typing import TYPE_CHECKING, Any, Protocol

from wan_loader.devices.dequantise import apply_scale_into, dequantise_into
from wan_loader.devices.writer import PinError
from wan_loader.dtypes import torch_dtype
from wan_loader.errors import DeviceMemoryError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import torch

    from wan_loader.devices.writer import HostBlock
    from wan_loader.plan.blocks import Segment
    from wan_loader.streaming.blocks import BlockLayout, Place

    Scales = Mapping[str, torch.Tensor]
    """What scaled tensors are multiplied by, by their names: in float32, 1-D, on the device."""

__all__ = ["Fence", "HostStreamDevice", "StreamDevice", "convert", "segments_of"]

_LONGEST_ELEMENT = 8


class Fence(Protocol):
    """A moment in the copies of a device, to be waited for once."""

    def is_over(self) -> bool:
        """Return whether everything that was copied until then has left host memory. `wait` is called all the same."""

    def wait(self) -> None:
        """Return once everything that was copied until then has left host memory."""


class StreamDevice(Protocol):
    """The buffers of one streamed module. Copies are queued by one thread at a time, and computation by another."""

    copies_late: bool
    """True if copies still run when the calls for them have returned."""
    buffers: list[Any]
    """The memory of each buffer: a tensor of bytes."""

    def reserve(self, scratch_nbytes: int) -> None:
        """Have room for the conversion of segments of so many bytes."""

    def current(self) -> AbstractContextManager[None]:
        """Make the device the current one of this thread, for copies."""

    def begin(self, buffer: int) -> None:
        """Have the copies from here on wait until what was computed with a buffer is over, as `used` last said."""

    def copy(self, buffer: int, layout: BlockLayout, sources: Sequence[HostBlock], scales: Scales) -> None:
        """Queue copies, and conversions, of parts of a block."""

    def fence(self) -> Fence | None:
        """Return the moment at which the copies until here are over. None: they are over already."""

    def end(self, buffer: int) -> None:
        """Take note that with the copies until here the buffer is full."""

    def use(self, buffer: int) -> None:
        """Have the computation from here on wait until a buffer is full, as `end` last said."""

    def used(self, buffer: int) -> None:
        """Take note that the computation until here may use a buffer, and none after it."""

    def synchronize(self) -> None:
        """Return once everything that was queued on the device, by anybody, is over."""

    def pin(self, address: int, nbytes: int, *, read_only: bool) -> None:
        """Register host memory for fast copies; raises `PinError`."""

    def unpin(self, address: int) -> bool:
        """Undo `pin`; return False if the memory is still registered."""

    def close(self) -> None:
        """Wait for everything, and let the buffers go."""


def segments_of(layout: BlockLayout, sources: Sequence[HostBlock]) -> Iterator[tuple[Place, Segment, int]]:
    """Yield each segment of what is in host memory, with its tensor's place in the buffer, and its address."""
    for source in sources:
        shift = source.address - source.block.start
        for segment in source.block.segments:
            yield layout.places[segment.storage], segment, shift + segment.file_start


class HostStreamDevice:
    """The buffers of a module that computes on the CPU: everything happens at once, in the order of the calls."""

    copies_late = False

    def __init__(self, n_buffers: int, buffer_nbytes: int) -> None:
        import torch

        try:
            self.buffers: list[Any] = [torch.empty(buffer_nbytes, dtype=torch.uint8) for _ in range(n_buffers)]
        except RuntimeError as error:  # torch's allocator of host memory has no error of its own
            reason = f"there is no memory for {n_buffers} buffers of {buffer_nbytes} bytes"
            raise DeviceMemoryError.because(reason, "use fewer buffers") from error

    def reserve(self, scratch_nbytes: int) -> None:
        """Do nothing: bytes are converted where they lie."""

    def current(self) -> AbstractContextManager[None]:
        """Return a context that does nothing."""
        return nullcontext()

    def begin(self, buffer: int) -> None:
        """Do nothing: what was computed is over."""

    def copy(self, buffer: int, layout: BlockLayout, sources: Sequence[HostBlock], scales: Scales) -> None:
        """Copy and convert now."""
        import torch

        memory = self.buffers[buffer]
        for place, segment, address in segments_of(layout, sources):
            start, nbytes = place.start_of(segment), place.nbytes_of(segment)
            if place.source is None:
                ctypes.memmove(memory.data_ptr() + start, address, nbytes)
            else:
                raw = _at(address, segment.nbytes)
                # a buffer that was made in inference mode may be written in no other
                with torch.inference_mode():
                    convert(memory[start : start + nbytes], raw, place, segment, scales)

    def fence(self) -> None:
        """Return None: nothing is under way."""

    def end(self, buffer: int) -> None:
        """Do nothing: the buffer is full."""

    def use(self, buffer: int) -> None:
        """Do nothing: the buffer is full."""

    def used(self, buffer: int) -> None:
        """Do nothing: what was computed is over."""

    def synchronize(self) -> None:
        """Do nothing."""

    def pin(self, address: int, nbytes: int, *, read_only: bool) -> None:
        """Refuse: there is nothing to register memory with."""
        raise PinError("host memory needs no pinning for the CPU")

    def unpin(self, address: int) -> bool:
        """Return True: there is nothing to undo."""
        return True

    def close(self) -> None:
        """Let the buffers go."""
        self.buffers = []


def _at(address: int, nbytes: int) -> torch.Tensor:
    """Return host memory as a tensor of bytes."""
    import torch

    raw = torch.frombuffer((ctypes.c_char * nbytes).from_address(address), dtype=torch.uint8)
    # torch's kernels may assume aligned elements
    return raw.clone() if address % _LONGEST_ELEMENT else raw


def convert(target: torch.Tensor, raw: torch.Tensor, place: Place, segment: Segment, scales: Scales) -> None:
    """Make a part of a tensor out of its bytes in the file, on the current stream.

    Args:
        target: The bytes of the buffer that it fills.
        raw: The bytes of the file.
        place: The tensor's place in the buffer.
        segment: Says which part it is.
        scales: What quantised tensors are multiplied by.
    """
    target = target.view(torch_dtype(place.dtype))
    quantised = place.quantised
    if quantised is not None and quantised.scale is None:
        dequantise_into(target, raw, quantised.kind)
        return
    assert place.source is not None
    raw = raw.view(torch_dtype(place.source))
    if quantised is None:
        target.copy_(raw)
    else:
        first = segment.storage_start // place.unit_read
        apply_scale_into(target, raw, scales[place.name], n_columns=prod(place.shape[1:]), first=first)
