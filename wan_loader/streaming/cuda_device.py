"""The buffers of a CUDA device: copies on a stream of their own, which waits for computation and is waited for by it.

Nothing here makes the host wait. For each buffer there are two events: `used` is recorded on the stream that computes
once a block's computation has been queued, and copies into the buffer wait for it; `full` is recorded on the stream of
copies, and the next computation with the buffer waits for that.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from wan_loader.devices import driver
from wan_loader.devices.cuda import join_copies
from wan_loader.errors import DeviceMemoryError
from wan_loader.streaming.device import convert, segments_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from wan_loader.devices.writer import HostBlock
    from wan_loader.plan.blocks import Segment
    from wan_loader.streaming.blocks import BlockLayout, Place
    from wan_loader.streaming.device import Scales

__all__ = ["CudaStreamDevice"]


def _torch() -> Any:
    """Return torch; tests put a fake of its streams in the place of this."""
    import torch

    return torch


class _EventFence:
    """An event of the stream of copies, destroyed once it was waited for."""

    def __init__(self, stream: int) -> None:
        self._event = driver.make_event(sleeps=True)  # for as long as a computation takes
        driver.record(self._event, stream)

    def is_over(self) -> bool:
        return driver.is_over(self._event)

    def wait(self) -> None:
        driver.wait_for(self._event)
        driver.destroy_event(self._event)


class CudaStreamDevice:
    """The buffers of a streamed module on one CUDA device. The device must be the current one of the calling thread.

    Args:
        index: The number of the device.
        n_buffers: The number of buffers.
        buffer_nbytes: The bytes of each.

    Raises:
        DeviceMemoryError: The device has no room for them.
    """

    copies_late = True

    def __init__(self, index: int, n_buffers: int, buffer_nbytes: int) -> None:
        self._torch = torch = _torch()
        self._device = f"cuda:{index}"
        self._context = driver.current_context()
        try:
            self.buffers = [self._empty(buffer_nbytes) for _ in range(n_buffers)]
        except torch.OutOfMemoryError as error:
            reason = f"{self._device} has no room for {n_buffers} buffers of {buffer_nbytes} bytes"
            raise DeviceMemoryError.because(reason, "use fewer buffers, or end what else runs there") from error
        self._stream = driver.take_stream(self._context)
        self._cast_stream = torch.cuda.ExternalStream(self._stream, self._device)
        self._full = [driver.make_event() for _ in self.buffers]
        self._used = [driver.make_event() for _ in self.buffers]
        self._allocated = driver.make_event()
        self._scratch: Any = None
        self._wait_for_memory()

    def reserve(self, scratch_nbytes: int) -> None:
        """Have room for the conversion of segments of so many bytes.

        Raises:
            DeviceMemoryError: The device has none.
        """
        if scratch_nbytes <= (0 if self._scratch is None else self._scratch.numel()):
            return
        self.synchronize()  # what is there may be in use
        try:
            self._scratch = self._empty(scratch_nbytes)
        except self._torch.OutOfMemoryError as error:
            reason = f"{self._device} has no room for {scratch_nbytes} bytes that are converted"
            raise DeviceMemoryError.because(reason, "use fewer buffers, or end what else runs there") from error
        self._wait_for_memory()

    def _wait_for_memory(self) -> None:
        """Have copies wait: new memory may have been somebody's, whose work is still queued."""
        driver.record(self._allocated, self._computing)
        driver.wait_in_stream(self._stream, self._allocated)

    def _empty(self, nbytes: int) -> Any:
        return self._torch.empty(nbytes, dtype=self._torch.uint8, device=self._device)

    @property
    def _computing(self) -> int:
        """The stream that the caller queues computation on."""
        return int(self._torch.cuda.current_stream(self._device).cuda_stream)

    @contextmanager
    def current(self) -> Iterator[None]:
        """Make the device the current one of this thread, for a `with` block."""
        with self._torch.cuda.device(self._device):
            # `device` does nothing where a new thread begins with this one, and then it has no context
            self._torch.cuda.set_device(self._device)
            yield

    def begin(self, buffer: int) -> None:
        """Have copies wait for the computation that used the buffer last."""
        driver.wait_in_stream(self._stream, self._used[buffer])

    def copy(self, buffer: int, layout: BlockLayout, sources: Sequence[HostBlock], scales: Scales) -> None:
        """Queue copies into the buffer; what is to be converted goes through the scratch, one segment at a time."""
        memory = self.buffers[buffer]
        base, plain = int(memory.data_ptr()), []
        quick = all(source.quick for source in sources)
        for place, segment, address in segments_of(layout, sources):
            if place.source is None:
                plain.append((base + place.start_of(segment), address, segment.nbytes))
            else:
                self._convert(memory, place, segment, address, scales, quick=quick)
        joined = join_copies(plain, lambda _: (base, base + memory.numel()))
        driver.copy_to_device(joined, self._stream, quick=quick)

    def fence(self) -> _EventFence:
        """Return the end of the copies until here."""
        return _EventFence(self._stream)

    def _convert(
        self, memory: Any, place: Place, segment: Segment, address: int, scales: Scales, *, quick: bool
    ) -> None:
        """Copy a segment to the scratch and convert it from there: the stream keeps the order."""
        assert self._scratch is not None
        driver.copy_to_device([(int(self._scratch.data_ptr()), address, segment.nbytes)], self._stream, quick=quick)
        start = place.start_of(segment)
        target, raw = memory[start : start + place.nbytes_of(segment)], self._scratch[: segment.nbytes]
        # a buffer that was made in inference mode may be written in no other
        with self._torch.inference_mode(), self._torch.cuda.stream(self._cast_stream):
            convert(target, raw, place, segment, scales)

    def end(self, buffer: int) -> None:
        """Record that the buffer is full."""
        driver.record(self._full[buffer], self._stream)

    def use(self, buffer: int) -> None:
        """Have the caller's stream wait until the buffer is full."""
        with self._torch.cuda.device(self._device):
            driver.wait_in_stream(self._computing, self._full[buffer])

    def used(self, buffer: int) -> None:
        """Record on the caller's stream that the buffer was used."""
        with self._torch.cuda.device(self._device):
            driver.record(self._used[buffer], self._computing)

    def synchronize(self) -> None:
        """Wait for all streams of the device."""
        self._torch.cuda.synchronize(self._device)

    def pin(self, address: int, nbytes: int, *, read_only: bool) -> None:
        """Register host memory with the driver; raises `PinError`."""
        driver.register(address, nbytes, self._context, read_only=read_only)

    def unpin(self, address: int) -> bool:
        """Undo `pin`; return False if the memory is still registered."""
        return driver.unregister(address, self._context)

    def close(self) -> None:
        """Wait for copies and computation, and give back the stream, the events and the memory."""
        with self._torch.cuda.device(self._device):
            self.synchronize()
            for event in (*self._full, *self._used, self._allocated):
                driver.destroy_event(event)
            driver.give_stream_back(self._stream, self._context)
        self.buffers, self._scratch, self._full, self._used = [], None, [], []
