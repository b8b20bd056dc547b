"""The device writer of a CUDA device: asynchronous copies over PCIe, and conversions on the GPU beside them.

Each thread that submits has a stream. Bytes that stay as they are are copied straight into their tensor. Bytes to be
converted are copied into a conversion buffer, which holds a whole block; once all of it is there, a second stream casts
it into its tensors while the first copies on. So the link is as busy as without a conversion, and the thread that
submits makes few calls of torch: one or two for a block of 32 MiB. (A converting `.to(device, dtype)` from pinned
memory leaves the DMA path and is nine times slower; a cast kernel that reads host memory itself reaches nine tenths.)
"""

from __future__ import annotations

from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, Any

from wan_loader.devices import driver
from wan_loader.devices.resolve import current
from wan_loader.errors import DeviceError, DeviceMemoryError
from wan_loader.events import Span, clock_ns
from wan_loader.system.threads import in_background

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    import torch

    from wan_loader.devices.writer import Destination, HostBlock
    from wan_loader.events import Observer
    from wan_loader.plan.blocks import Block, Segment

__all__ = ["CudaWriter", "get_ready", "join_copies"]

#: Conversion buffers that each thread makes before it uses one again whose cast may still run. More come to be where
#: parts of more blocks are in the pinned ring.
_BUFFERS = 4
#: Buffers are multiples of this, so that blocks which are a little shorter fit the same ones.
_BUFFER_UNIT = 8 << 20


def _neighbours(segments: Iterable[Segment]) -> Iterator[list[Segment]]:
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


def get_ready(device: str | int | torch.device, *, converts: bool) -> None:
    """Do beforehand, in a thread of its own, what would hold up the first copies. Returns at once.

    That is 2 ms for a stream, and 40 where tensors are converted: the first cast of a process has the driver load
    torch's kernels. Nothing happens where the process has not used the device yet.
    """
    import torch

    # no such device: whoever loads will be told; a torch that lacks the question: then nothing is ready
    with suppress(RuntimeError, ValueError, AttributeError):
        found = torch.device("cuda" if device == "auto" else device)
        if found.type != "cuda" or not torch.cuda.is_initialized():
            return
        index = torch.cuda.current_device() if found.index is None else found.index
        if torch._C._cuda_hasPrimaryContext(index):  # type: ignore[attr-defined]
            in_background(partial(_get_ready, index, converts=converts), "get device ready")


def _get_ready(index: int, *, converts: bool) -> None:
    import torch

    with suppress(DeviceError, RuntimeError), current(f"cuda:{index}"):
        context = driver.current_context()
        streams = [driver.take_stream(context) for _ in range(1 + converts)]
        if converts:
            with torch.cuda.stream(torch.cuda.ExternalStream(streams[-1])):
                source = torch.empty(2, device="cuda")
                _copy_all(torch, [source.new_empty(2, dtype=torch.bfloat16)], [source])
            driver.wait_for_stream(streams[-1])
        for stream in streams:
            driver.give_stream_back(stream, context)


def _copy_all(torch: Any, targets: list[Any], sources: list[Any]) -> None:
    """Convert tensors with one launch; one by one where torch cannot (float8_e8m0fnu)."""
    try:
        torch._foreach_copy_(targets, sources)
    except NotImplementedError:
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source)


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
        self._timelines: list[_Timeline] = []
        self._streams: list[_CopyStream] = []
        self._arrived: list[Segment] = []
        self._context = driver.current_context()

    def bind(self, destinations: Sequence[Destination]) -> None:
        """Say where the next storages go.

        Called once they are allocated, for the caller's stream: the allocator may have handed out memory that work
        queued there still uses, so copies wait for that work.
        """
        self.destinations += destinations
        stream = self.torch.cuda.current_stream(self.device)
        # the caller may have turned to another stream: what is queued on the one before still counts
        stream.wait_event(self.allocated)
        self.allocated.record(stream)

    def place(self, segment: Segment) -> None:
        """Return None: nothing of the device is host memory."""

    def stream(self) -> _CopyStream:
        """Make a copy stream for the calling thread."""
        self.torch.cuda.set_device(self.device)
        stream = _CopyStream(self, len(self._streams))
        self._streams.append(stream)
        return stream

    def timeline(self, phase: str, track: str) -> _Timeline:
        """Make a stream for work of a phase."""
        timeline = _Timeline(phase, track, self._context, self.observer)
        self._timelines.append(timeline)
        return timeline

    def pin(self, address: int, nbytes: int, *, read_only: bool) -> None:
        """Register host memory with the driver, in any thread; raises `PinError`."""
        driver.register(address, nbytes, self._context, read_only=read_only)

    def unpin(self, address: int) -> bool:
        """Undo `pin`, in any thread; return False if the memory is still registered."""
        return driver.unregister(address, self._context)

    def arrived(self) -> list[Segment]:
        """Return the segments that are in place since this was last asked."""
        for timeline in self._timelines:
            self._arrived += timeline.take_arrived()
        arrived, self._arrived = self._arrived, []
        return arrived

    def finish(self) -> None:
        """Wait for everything that was submitted, and forget the destinations. In any thread."""
        with driver.within(self._context):
            for timeline in self._timelines:
                timeline.finish()
            while self._timelines:
                timeline = self._timelines.pop()
                self._arrived += timeline.take_arrived()
                timeline.close()
            while self._streams:
                self._streams.pop().close()
        self.destinations = []  # the weights are their owner's alone from here on


@dataclass(slots=True, eq=False)
class _CopyEvent:
    """Work up to an event of its stream, and the segments that are in place then."""

    timeline: _Timeline
    event: int
    segments: Sequence[Segment]
    nbytes: int
    submitted_ns: int
    begun: int = 0
    """An event for the moment at which the work began, where it had to wait for another stream; 0: there is none."""
    is_done: bool = False

    def done(self) -> bool:
        if not self.is_done:
            self.timeline.look()
        return self.is_done

    def wait(self) -> None:
        if not self.is_done:
            driver.wait_for(self.event)


class _Timeline:
    """A stream, and what happened on it. Events are used again: making one takes longer than recording it."""

    def __init__(self, phase: str, track: str, context: int, observer: Observer | None) -> None:
        self._phase = phase
        self._track = track
        self._context = context
        self._observer = observer
        self.handle = driver.take_stream(context)
        self._under_way: deque[_CopyEvent] = deque()
        self._arrived: list[Segment] = []
        self._idle: list[int] = []
        """Events that can be recorded again."""
        self._made: list[int] = []
        self._origin = self._origin_ns = self._ended_ns = 0
        if observer is not None:
            # lays the device's clock on the host's; before the stream waits for anything
            self._origin = self._event()
            driver.wait_for(self._origin)
            self._origin_ns = self._ended_ns = clock_ns()

    def begin(self) -> int:
        """Return an event for the moment at which what is queued from now on begins; 0 where nobody wants to know."""
        return 0 if self._observer is None else self._event()

    def mark(self, segments: Sequence[Segment], nbytes: int, submitted_ns: int, begun: int = 0) -> _CopyEvent:
        """Return an event for the end of everything that was queued until now; `segments` are in place with it.

        `begun` is of `begin`, where the work had to wait for another stream.
        """
        copy_event = _CopyEvent(self, self._event(), segments, nbytes, submitted_ns, begun)
        self._under_way.append(copy_event)
        return copy_event

    def _event(self) -> int:
        if self._idle:
            event = self._idle.pop()
        else:
            event = driver.make_event(timed=self._observer is not None)
            self._made.append(event)
        driver.record(event, self.handle)
        return event

    def look(self) -> None:
        """Take note of what is done, in the order of submission, with the device's own times."""
        while self._under_way and driver.is_over(self._under_way[0].event):
            copy_event = self._under_way.popleft()
            if self._observer is not None:
                # until then the stream was busy with what came before, or waited for another one
                start_ns = max(copy_event.submitted_ns, self._ended_ns)
                if copy_event.begun:
                    start_ns = max(start_ns, self._time_of(copy_event.begun))
                    self._idle.append(copy_event.begun)
                self._ended_ns = max(start_ns, self._time_of(copy_event.event))
                self._observer.record(Span(self._phase, start_ns, self._ended_ns, copy_event.nbytes, self._track))
            self._arrived += copy_event.segments
            copy_event.is_done = True
            self._idle.append(copy_event.event)

    def _time_of(self, event: int) -> int:
        """Return when an event happened, on the host's clock."""
        return self._origin_ns + driver.elapsed_ns(self._origin, event)

    def take_arrived(self) -> list[Segment]:
        """Return what is in place since this was last asked."""
        self.look()
        arrived, self._arrived = self._arrived, []
        return arrived

    def finish(self) -> None:
        """Wait for everything on the stream."""
        driver.wait_for_stream(self.handle)

    def close(self) -> None:
        """Give the stream and its events back, once it has finished."""
        driver.give_stream_back(self.handle, self._context)
        while self._made:
            driver.destroy_event(self._made.pop())


@dataclass(slots=True, eq=False)
class _Buffer:
    """Device memory for the bytes of a block before they are converted."""

    memory: Any
    emptied: int
    """An event: whatever used the memory last is over."""


@dataclass(slots=True, eq=False)
class _Conversion:
    """A block whose bytes, as far as they are converted, go into a buffer; `missing` are yet to be submitted."""

    buffer: _Buffer
    segments: list[Segment]
    shift: int
    """The place of a byte in the buffer is this much less than its place in the file."""
    missing: int = field(init=False)

    def __post_init__(self) -> None:
        self.missing = sum(segment.nbytes for segment in self.segments)

    def address(self, file_start: int) -> int:
        """Return where a byte of the file goes."""
        return int(self.buffer.memory.data_ptr()) + file_start - self.shift


class _CopyStream:
    """The copies of one thread, and the conversions of what they bring."""

    def __init__(self, writer: CudaWriter, number: int) -> None:
        self._writer = writer
        self._number = number
        self._copies = writer.timeline("h2d", f"{writer.device} h2d {number}")
        self._casts: _Timeline | None = None
        self._cast_stream: Any = None
        self._conversions: dict[int, _Conversion] = {}
        """Conversions whose bytes have not all been submitted, by the identity of their block."""
        self._buffers: list[_Buffer] = []
        self._idle: deque[_Buffer] = deque()
        """Buffers whose cast is queued, the oldest first."""
        self._n_bound = 0
        self._within = (0, 0)

    def submit(self, sources: Sequence[HostBlock]) -> _CopyEvent:
        """Queue copies and casts; the sources must stay until the copy event is done."""
        submitted_ns, copies = clock_ns(), self._copies
        self._wait_for_memory()
        plain: list[Segment] = []
        full: list[_Conversion] = []
        wanted = join_copies(
            (copy for source in sources for copy in self._copies_of(source, plain, full)), self._allocation
        )
        driver.copy_to_device(wanted, copies.handle, quick=all(source.quick for source in sources))
        nbytes = sum(segment.nbytes for source in sources for segment in source.block.segments)
        copy_event = copies.mark(plain, nbytes, submitted_ns)
        if full:
            self._cast_all(full, copy_event, submitted_ns)
        return copy_event

    def _wait_for_memory(self) -> None:
        """Have copies wait for what was queued on new destinations before they were that."""
        if self._n_bound != (n_bound := len(self._writer.destinations)):
            self._n_bound = n_bound
            driver.wait_in_stream(self._copies.handle, self._writer.allocated.cuda_event)
            self._within = (0, 0)  # what the allocator gave back meanwhile may be allocated in other pieces

    def _copies_of(
        self, source: HostBlock, plain: list[Segment], full: list[_Conversion]
    ) -> Iterator[tuple[int, int, int]]:
        """Make the copies of a block; note what is in place with them, and what can be converted behind them."""
        block, destinations = source.block, self._writer.destinations
        offset = source.address - block.start
        conversion: _Conversion | None = None
        for segment in block.segments:
            destination = destinations[segment.storage]
            if destination.source_dtype is None:
                plain.append(segment)
                to = destination.address + segment.storage_start
            else:
                conversion = conversion or self._conversion(block.whole or block)
                conversion.missing -= segment.nbytes
                to = conversion.address(segment.file_start)
            yield to, offset + segment.file_start, segment.nbytes
        if conversion is not None and conversion.missing == 0:
            full.append(self._conversions.pop(id(block.whole or block)))

    def _allocation(self, address: int) -> tuple[int, int]:
        start, end = self._within
        if not start <= address < end:
            self._within = driver.allocation(address)
        return self._within

    def _conversion(self, block: Block) -> _Conversion:
        """Return the conversion of a block, which begins with the first of its parts."""
        if (conversion := self._conversions.get(id(block))) is None:
            destinations = self._writer.destinations
            segments = [s for s in block.segments if destinations[s.storage].source_dtype is not None]
            start, end = segments[0].file_start, segments[-1].file_end
            # the buffer begins at a multiple of the alignment: so does the first segment
            conversion = self._conversions[id(block)] = _Conversion(self._take_buffer(end - start), segments, start)
        return conversion

    def _take_buffer(self, nbytes: int) -> _Buffer:
        """Return a buffer that is empty by the time that the next copies begin."""
        idle = next((buffer for buffer in self._idle if buffer.memory.numel() >= nbytes), None)
        buffer = idle
        if idle is None or (len(self._buffers) < _BUFFERS and not driver.is_over(idle.emptied)):
            try:
                buffer = self._make_buffer(-(-nbytes // _BUFFER_UNIT) * _BUFFER_UNIT)
            except DeviceMemoryError:
                if idle is None:  # else the copies wait for its cast
                    raise
        assert buffer is not None
        if buffer is idle:
            self._idle.remove(buffer)
        driver.wait_in_stream(self._copies.handle, buffer.emptied)
        return buffer

    def _make_buffer(self, nbytes: int) -> _Buffer:
        torch, device = self._writer.torch, self._writer.device
        try:
            memory = torch.empty(nbytes, dtype=torch.uint8, device=device)
        except torch.OutOfMemoryError as error:  # somebody else was quicker than the check of the plan
            reason = f"{device} has no room for the {nbytes} bytes that a conversion takes"
            raise DeviceMemoryError.because(reason, "end what else runs there") from error
        buffer = _Buffer(memory, driver.make_event())
        self._buffers.append(buffer)
        # the memory may have been somebody's, whose work is still queued
        driver.record(buffer.emptied, torch.cuda.current_stream(device).cuda_stream)
        return buffer

    def _cast_all(self, full: Sequence[_Conversion], copied: _CopyEvent, submitted_ns: int) -> None:
        """Queue the casts of blocks whose copies are queued."""
        torch = self._writer.torch
        if self._casts is None:
            self._casts = self._writer.timeline("cast", f"{self._writer.device} cast {self._number}")
            self._cast_stream = torch.cuda.ExternalStream(self._casts.handle, self._writer.device)
        driver.wait_in_stream(self._casts.handle, copied.event)
        begun = self._casts.begin()
        segments: list[Segment] = []
        # tensors that the caller made in inference mode may be written by no thread that is not in it
        with torch.inference_mode(), torch.cuda.stream(self._cast_stream):
            for conversion in full:
                self._cast(conversion)
                driver.record(conversion.buffer.emptied, self._casts.handle)
                self._idle.append(conversion.buffer)
                segments += conversion.segments
        self._casts.mark(segments, sum(segment.nbytes for segment in segments), submitted_ns, begun)

    def _cast(self, conversion: _Conversion) -> None:
        """Cast the segments of a block: one launch for those of the same dtypes: each has its cost."""
        pairs: dict[tuple[Any, Any], tuple[list[Any], list[Any]]] = {}
        for row in _neighbours(conversion.segments):
            for dtypes, group in groupby(row, key=self._dtypes):
                same = list(group)
                first, last = same[0].file_start - conversion.shift, same[-1].file_end - conversion.shift
                raw = conversion.buffer.memory[first:last]
                if first % dtypes[0].itemsize:  # kernels need aligned elements
                    raw = raw.clone()
                counts = [segment.nbytes // segment.itemsize for segment in same]
                targets, sources = pairs.setdefault(dtypes, ([], []))
                sources += raw.view(dtypes[0]).split(counts)
                targets += [self._target(segment, count) for segment, count in zip(same, counts, strict=True)]
        for targets, sources in pairs.values():
            _copy_all(self._writer.torch, targets, sources)

    def _target(self, segment: Segment, count: int) -> Any:
        flat, start = self._writer.destinations[segment.storage].flat, segment.storage_start // segment.itemsize
        return flat if count == flat.numel() else flat[start : start + count]

    def _dtypes(self, segment: Segment) -> tuple[Any, Any]:
        destination = self._writer.destinations[segment.storage]
        return destination.source_dtype, destination.whole.dtype

    def close(self) -> None:
        """Give the conversion buffers back, once everything has finished."""
        self._conversions.clear()
        self._idle.clear()
        while self._buffers:
            driver.destroy_event(self._buffers.pop().emptied)
