"""The device writer of a CUDA device: asynchronous copies over PCIe, and conversions on the GPU that read host memory.

Each thread that submits has a stream. Bytes that stay as they are are copied straight into their tensor. Bytes to be
converted are read over PCIe by the cast kernel, at nine tenths of what a copy reaches, and without a scratch buffer
that a copy fills, a kernel empties and both wait for. (A converting `.to(device, dtype)` from pinned memory leaves the
DMA path and is nine times slower.)
"""

from __future__ import annotations

import ctypes
from bisect import bisect_right, insort
from collections import deque
from dataclasses import dataclass
from itertools import groupby
from math import inf
from threading import Lock
from typing import TYPE_CHECKING, Any

from wan_loader.devices import driver
from wan_loader.events import Span, clock_ns

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from wan_loader.devices.writer import Destination
    from wan_loader.events import Observer
    from wan_loader.plan.blocks import Segment

__all__ = ["CudaWriter", "join_copies"]


def _neighbours(segments: Sequence[Segment]) -> Iterator[list[Segment]]:
    """Divide segments into rows that follow each other in the file without a gap."""
    row: list[Segment] = []
    for segment in segments:
        if row and segment.file_start != row[-1].file_end:
            yield row
            row = []
        row.append(segment)
    if row:
        yield row


def join_copies(
    copies: Iterable[tuple[int, int, int]], allocation: Callable[[int], tuple[int, int]]
) -> Iterator[tuple[int, int, int]]:
    """Join copies (destination, source, nbytes) that follow each other on both sides.

    Every copy of its own keeps the link waiting for microseconds; tensors of a file often lie in its order on the
    device as well.

    Args:
        copies: The copies, in order.
        allocation: Gives start and end of the memory around a destination, which no copy may leave.
    """
    to = source = nbytes = end = 0
    for next_to, next_source, more in copies:
        if next_to == to + nbytes and next_source == source + nbytes and next_to + more <= end:
            nbytes += more
            continue
        if nbytes:
            yield to, source, nbytes
        to, source, nbytes = next_to, next_source, more
        _, end = allocation(to)
    if nbytes:
        yield to, source, nbytes


class _DeviceView:
    """Registered host memory as the device sees it, for `torch.as_tensor` (CUDA Array Interface, version 3)."""

    def __init__(self, address: int, nbytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
            "stream": None,
        }


class CudaWriter:
    """The writer of one CUDA device. Where a copy stream is made, the device becomes the thread's current one."""

    can_pin = True

    def __init__(self, index: int, observer: Observer | None = None) -> None:
        import torch

        self.torch = torch
        self.device = torch.device("cuda", index)
        self.observer = observer
        self.destinations: list[Destination] = []
        self.allocated = torch.cuda.Event()
        """An event that is recorded anew with every `bind`; copies to the latest destinations wait for it."""
        self._pinned: list[tuple[int, int]] = []
        """Starts and ends of registered memory, in order. Threads that add to it move what others have just found."""
        self._pinned_lock = Lock()
        self._views: dict[int, Any] = {}
        self._streams: list[_CopyStream] = []
        self._context = driver.current_context()

    def bind(self, destinations: Sequence[Destination]) -> None:
        """Say where the next storages go.

        Called once they are allocated, for the caller's stream: the allocator may have handed out memory that work
        queued there still uses, so copies wait for that work.
        """
        self.destinations += destinations
        self.allocated.record(self.torch.cuda.current_stream(self.device))

    def place(self, segment: Segment) -> None:
        """Return None: nothing of the device is host memory."""

    def stream(self) -> _CopyStream:
        """Make a copy stream for the calling thread."""
        self.torch.cuda.set_device(self.device)
        stream = _CopyStream(self, f"{self.device} h2d {len(self._streams)}")
        self._streams.append(stream)
        return stream

    def pin(self, address: int, nbytes: int, *, read_only: bool) -> None:
        """Register host memory with the driver, in any thread; raises `PinError`."""
        driver.register(address, nbytes, self._context, read_only=read_only)
        with self._pinned_lock:
            insort(self._pinned, (address, address + nbytes))

    def unpin(self, address: int) -> bool:
        """Undo `pin`, in any thread; return False if the memory is still registered."""
        return driver.unregister(address, self._context)

    def bytes_on_device(self, address: int, nbytes: int) -> Any:
        """Return the bytes from `address` on as a uint8 tensor for kernels: the pinned memory itself, else a copy."""
        with self._pinned_lock:
            at = bisect_right(self._pinned, (address, inf))
            start, end = self._pinned[at - 1] if at else (0, 0)
        if address + nbytes <= end:
            if start not in self._views:
                self._views[start] = self._view(start, end - start)
            if (view := self._views[start]) is not None:
                return view[address - start : address - start + nbytes]
        # `.to` is synchronous from memory that is not pinned: the slot is free when it returns
        raw = (ctypes.c_char * nbytes).from_address(address)
        return self.torch.frombuffer(raw, dtype=self.torch.uint8).to(self.device)

    def _view(self, address: int, nbytes: int) -> Any:
        """Return registered memory as the device sees it; None where torch made a copy, of it as it is now."""
        on_device = driver.device_address(address)
        view = self.torch.as_tensor(_DeviceView(on_device, nbytes), device=self.device)
        return view if view.data_ptr() == on_device else None

    def finish(self) -> None:
        """Wait for everything that was submitted, and forget the destinations."""
        for stream in self._streams:
            stream.finish()
        while self._streams:
            driver.destroy_stream(self._streams.pop().handle)
        self.destinations = []  # the weights are their owner's alone from here on
        self._pinned.clear()
        self._views.clear()


@dataclass(slots=True, eq=False)
class _CopyEvent:
    """Copies up to an event of the stream that they were submitted to."""

    stream: _CopyStream
    event: Any
    nbytes: int
    submitted_ns: int
    is_done: bool = False

    def done(self) -> bool:
        if not self.is_done and self.event.query():
            self.is_done = True
            self.stream.ended(self)
        return self.is_done

    def wait(self) -> None:
        if not self.is_done:
            self.event.synchronize()


class _CopyStream:
    """A stream, and what happened on it. Events are used again: making one takes longer than recording it."""

    def __init__(self, writer: CudaWriter, track: str) -> None:
        self._writer = writer
        self._track = track
        self._torch = writer.torch
        self.handle = driver.make_stream()
        self._stream = writer.torch.cuda.ExternalStream(self.handle, writer.device)
        self._copy_events: deque[_CopyEvent] = deque()
        self._events: list[Any] = []
        # lays the device's clock on the host's; before the stream waits for anything
        self._origin = self._event()
        self._origin.synchronize()
        self._origin_ns = self._ended_ns = clock_ns()
        self._n_bound = 0
        self._within = (0, 0)

    def submit(self, address: int, file_start: int, segments: Sequence[Segment]) -> _CopyEvent:
        """Queue copies and casts; the source must stay until the copy event is done."""
        to, submitted_ns = self._writer.destinations, clock_ns()
        # `bind` was called since: what was queued on the memory before must end first; once is enough for a stream
        if self._n_bound != len(to):
            self._n_bound = len(to)
            self._stream.wait_event(self._writer.allocated)
        plain: list[Segment] = []
        # two kinds: the copy engine takes what stays as it is, kernels the rest
        converted: list[Segment] = []
        for segment in segments:
            (plain if to[segment.storage].source_dtype is None else converted).append(segment)
        offset = address - file_start
        copies = ((to[p.storage].address + p.storage_start, offset + p.file_start, p.nbytes) for p in plain)
        driver.copy_to_device(join_copies(copies, self._allocation), self.handle)
        if converted:
            with self._torch.cuda.stream(self._stream):
                for row in _neighbours(converted):
                    for (source_dtype, _), same in groupby(row, key=self._dtypes):
                        self._cast(address, file_start, source_dtype, list(same))
        copy_event = _CopyEvent(self, self._event(), sum(p.nbytes for p in segments), submitted_ns)
        self._copy_events.append(copy_event)
        return copy_event

    def _allocation(self, address: int) -> tuple[int, int]:
        start, end = self._within
        if not start <= address < end:
            self._within = driver.allocation(address)
        return self._within

    def _dtypes(self, segment: Segment) -> tuple[Any, Any]:
        destination = self._writer.destinations[segment.storage]
        return destination.source_dtype, destination.whole.dtype

    def _cast(self, address: int, file_start: int, source_dtype: Any, segments: Sequence[Segment]) -> None:
        """Cast neighbouring segments of the same dtypes: one launch for many, as each costs more than a small cast."""
        first, last = segments[0].file_start - file_start, segments[-1].file_end - file_start
        raw = self._writer.bytes_on_device(address + first, last - first)
        if raw.data_ptr() % source_dtype.itemsize:  # kernels need aligned elements
            raw = raw.clone()
        counts = [segment.nbytes // segment.itemsize for segment in segments]
        sources = raw.view(source_dtype).split(counts)
        targets = []
        for segment, count in zip(segments, counts, strict=True):
            flat, start = self._writer.destinations[segment.storage].flat, segment.storage_start // segment.itemsize
            targets.append(flat if count == flat.numel() else flat[start : start + count])
        if len(segments) == 1:
            targets[0].copy_(sources[0])
        else:
            self._torch._foreach_copy_(targets, sources)

    def _event(self) -> Any:
        observed = self._writer.observer is not None
        event = self._events.pop() if self._events else self._torch.cuda.Event(enable_timing=observed)
        event.record(self._stream)
        return event

    def ended(self, copy_event: _CopyEvent) -> None:
        """Take note that a copy event is done, with the device's own times; in the order of submission."""
        self._copy_events.remove(copy_event)
        observer = self._writer.observer
        if observer is not None:
            start_ns = max(copy_event.submitted_ns, self._ended_ns)  # until then the stream was busy with others
            self._ended_ns = max(start_ns, self._origin_ns + int(self._origin.elapsed_time(copy_event.event) * 1e6))
            observer.record(Span("h2d", start_ns, self._ended_ns, copy_event.nbytes, self._track))
        self._events.append(copy_event.event)

    def finish(self) -> None:
        """Wait for everything on the stream."""
        self._stream.synchronize()
        for copy_event in list(self._copy_events):
            copy_event.done()
