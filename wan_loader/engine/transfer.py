"""The transfer: carries a plan out, in two threads at most.

The calling thread looks after the pinned ring: it starts reads into slots (`read_queue`; a `ReadBackend` carries them
out), and submits the copy of each slot as it fills. The plan comes in batches, whose memory is asked for one
after the other while earlier bytes are on their way. A second thread looks after mapped blocks, once all batches are
there: it registers their pages with the driver and submits their copies. Registering is slower than the PCIe link and
no further thread makes it faster, so the first thread reads such blocks too, from the far end of the queue; both meet
when everything is done. Where there are only mapped blocks, to spare the processors, the calling thread maps them alone
if their pages are resident.

The first failure ends both and is raised.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Generator
from contextlib import suppress
from enum import Enum
from functools import partial
from typing import TYPE_CHECKING, Any

from wan_loader.cancel import CancelToken
from wan_loader.devices.writer import HostBlock, PinError
from wan_loader.engine.first_failure import FirstFailure
from wan_loader.engine.pending import PendingBlocks
from wan_loader.engine.pinned_ring import PinnedRing
from wan_loader.engine.pinning import Pinning
from wan_loader.engine.read_backend import choose_backend
from wan_loader.engine.read_queue import InFlightRead, ReadQueue
from wan_loader.events import span
from wan_loader.plan.blocks import Transport
from wan_loader.plan.engine_settings import TransferMode
from wan_loader.system.posix import map_file, populate, unmap
from wan_loader.system.threads import in_background

if TYPE_CHECKING:
    from collections.abc import Sequence

    from wan_loader.devices.writer import CopyEvent, CopyStream, DeviceWriter
    from wan_loader.engine.open_files import OpenFiles
    from wan_loader.engine.transfer_state import TransferState
    from wan_loader.events import Observer
    from wan_loader.plan.blocks import Block, Segment
    from wan_loader.plan.engine_settings import EngineSettings

__all__ = ["Need", "Steps", "transfer_blocks"]

#: So long does a failed load wait for its clean-up, which goes on by itself after that.
_END_SECONDS = 0.9
#: So soon does one thread notice that the other has failed.
_PATIENCE_S = 0.1
#: With fewer blocks than this left to read, the next batch is asked for.
_FEW_BLOCKS = 8


class Need(Enum):
    """The questions that the engine asks of whoever drives it, who sends the answer."""

    BLOCKS = "blocks"
    """The next blocks, in the order in which they are wanted; nothing, if there are no more."""
    MEMORY = "memory"
    """The destinations of the storages that those blocks need and no earlier ones did, in their order."""


Steps = Generator[Need | list["Segment"], Any, None]


def transfer_blocks(
    reader: OpenFiles,
    writer: DeviceWriter,
    settings: EngineSettings,
    state: TransferState,
    *,
    cancel: CancelToken | None = None,
    observer: Observer | None = None,
) -> Steps:
    """Move every block into the device writer's memory.

    A `Need` that is yielded is to be answered by `send`. Blocks are asked for when there is little left to read, and
    the memory of the first ones while their first bytes are being read. Nothing is read ahead of whoever takes what is
    yielded but what fits the ring. Closing the generator, the first failure of any thread, and a cancelled token end
    everything and release it.

    Args:
        reader: The open files.
        writer: The device's side.
        settings: The threads and the memory of the load.
        state: Tells how far the transfer is. The caller must call its `release` once all has arrived.
        cancel: Stops the transfer.
        observer: Is told of spans; None: nobody.

    Yields:
        Lists of segments whose bytes have arrived; in between, what is needed next.
    """
    yield from _Transfer(reader, writer, settings, state, cancel, observer).run()


class _Transfer:
    """One transfer under way: its two threads, and what they share."""

    def __init__(
        self,
        reader: OpenFiles,
        writer: DeviceWriter,
        settings: EngineSettings,
        state: TransferState,
        cancel: CancelToken | None,
        observer: Observer | None,
    ) -> None:
        self._cancel = cancel or CancelToken()
        self._read_in_place: list[Segment] = []
        """Segments that were read to their place since they were last yielded."""
        self._all_drawn = False
        self._reader = reader
        self._writer = writer
        self._settings = settings
        self._in_place = settings.mode is TransferMode.IN_PLACE
        self._maps_here = settings.mode is TransferMode.MAPPED_HERE
        self._observer = observer
        # the processor copies out of no mapping: if the file shrank, that would end the process
        self._work = PendingBlocks(
            settings.slot_bytes,
            mode=settings.mode,
            may_map=writer.can_pin,
        )
        self._mapper_ended = threading.Event()  # Thread.join takes a thread for ended once Ctrl-C came while it waited
        self._mapper_ended.set()
        self._mapping = threading.Lock()
        self._failure = FirstFailure()
        self._reads: ReadQueue | None = None
        self._stream: CopyStream | None = None
        self._filled: list[InFlightRead] = []
        """Slots that are full, and whose copies wait for others to be submitted with them."""
        self._copying: deque[tuple[CopyEvent, Sequence[InFlightRead]]] = deque()
        self._state = state
        self._pinning = Pinning(writer, self._state, observer)

    def run(self) -> Steps:
        try:
            self._cancel.check()
            yield from self._draw_first()
            yield from self._carry_all()
            with span(self._observer, "wait"):
                self._writer.finish()
            self._state.fallbacks += self._reader.fallbacks
            # still within: whoever closes the run here is not given the state, and could not release it
            yield self._take_arrived()
        except BaseException:
            self._work.cancel()
            self._abandon()
            raise

    def _draw_first(self) -> Steps:
        """Begin to read before anything is allocated, unless bytes go straight to their place."""
        if blocks := (yield Need.BLOCKS):
            if self._in_place:
                self._writer.bind((yield Need.MEMORY))
            self._work.add(blocks)
            # reads into the ring need no destination: the disk is busy while memory is allocated
            if self._work.is_left:
                reads = self._open_queue()
                self._start_reads(reads)
                self._pinning.begin(reads.used)
            if not self._in_place:
                self._writer.bind((yield Need.MEMORY))

    def _draw(self) -> Steps:
        """Take the next batch of blocks; after the last one, mapping begins in a thread of its own.

        Not earlier: beside another Python thread, allocation would wait for the interpreter at every tensor.
        """
        if blocks := (yield Need.BLOCKS):
            if destinations := (yield Need.MEMORY):
                self._writer.bind(destinations)
            self._work.add(blocks)
            return
        self._all_drawn = True
        if self._work.has_mapped and not self._maps_here:
            self._mapper_ended.clear()
            if in_background(self._map_guarded, "mapper") is None:
                self._state.fallbacks.append(
                    "no further thread may be started: pages are mapped first, others read later"
                )

    def _take_arrived(self) -> list[Segment]:
        """Return what has arrived since the last time."""
        arrived, self._read_in_place = self._read_in_place, []
        return arrived + self._writer.arrived()

    def _carry_all(self) -> Steps:
        while not (self._all_drawn and self._mapper_ended.is_set()) or self._is_reading() or self._work.has_mapped:
            self._cancel.check()
            if self._is_reading():
                yield from self._read_all(self._reads or self._open_queue())
            elif self._maps_here and self._work.has_mapped:
                self._stream = self._stream or self._writer.stream()
                self._map_all(self._stream)
            elif not self._all_drawn:
                yield from self._draw()
            else:
                self._mapper_ended.wait(_PATIENCE_S)
        self._failure.raise_it()
        if self._reads is not None:
            self._reads.end()

    def _abandon(self) -> None:
        """End everything after a failure, within a second.

        In a thread that gets no signals: a second Ctrl-C ends the waiting, not the clean-up, and copies that still run
        keep what they read and write. A read that hangs in a system call keeps its memory until it returns.
        """
        if ending := in_background(self._end, "release"):
            ending.join(_END_SECONDS)

    def _end(self) -> None:
        with self._mapping:  # rather than the event, which a thread that never began does not set
            pass
        self._pinning.end()
        if self._reads is not None:
            self._reads.end()
        with suppress(BaseException):  # the failure that brought us here is the one to raise
            self._writer.finish()
        self._state.release()

    # reading: the calling thread

    def _open_queue(self) -> ReadQueue:
        ring = PinnedRing(self._settings.slot_bytes, self._settings.n_slots)
        self._state.cleanups.append(ring.close)
        self._state.ring_nbytes = ring.nbytes
        backend = choose_backend(self._reader.fallbacks, own_memory=self._reader.is_own_memory)
        self._reads = ReadQueue(self._settings.threads, self._reader, ring, backend, self._observer)
        return self._reads

    def _is_reading(self) -> bool:
        return bool(self._work.is_left or self._filled or (self._reads is not None and self._reads.n_reading))

    def _start_reads(self, reads: ReadQueue) -> None:
        while reads.has_free and (block := self._work.next_read()) is not None:
            reads.start(block, self._place(block))

    def _place(self, block: Block) -> int | None:
        """Return the address that a block is read to without the ring; None if there is no such place."""
        fits = self._in_place and block.transport is Transport.BUFFERED and len(block.segments) == 1
        return self._writer.place(block.segments[0]) if fits else None

    def _read_all(self, reads: ReadQueue) -> Steps:
        """Bring everything that is left to be read on its way."""
        stream = self._stream = self._stream or self._writer.stream()
        while self._is_reading():
            self._cancel.check()
            while self._copying and self._copying[0][0].done():
                reads.give_back(self._copying.popleft()[1])
            if arrived := self._take_arrived():
                yield arrived
            self._start_reads(reads)
            patience_s = _PATIENCE_S
            if not self._all_drawn and self._work.n_unmapped < _FEW_BLOCKS:
                yield from self._draw()
                self._start_reads(reads)
                patience_s = 0.0  # there may be more to draw: mapping waits for the last of it
            elif not reads.n_reading and self._copying:
                with span(self._observer, "wait", track="reader"):
                    self._copying[0][0].wait()
            for in_flight in reads.finished(patience_s):
                self._take(in_flight, reads)
                self._submit_filled(reads, stream)
            self._submit_filled(reads, stream)
            self._failure.raise_it()

    def _take(self, in_flight: InFlightRead, reads: ReadQueue) -> None:
        """Take a read that has ended: its bytes are in place, or wait in their slot to be copied."""
        slot, read = in_flight.slot, in_flight.read
        assert read is not None
        block, start = read.block, read.data_start
        self._state.nbytes[read.transport] += block.nbytes
        if in_flight.place is None:
            self._reader.check(block, slot.view[start : start + block.nbytes])
            self._pinning.need(slot)
            self._filled.append(in_flight)
        else:
            self._state.in_place_nbytes += block.nbytes
            self._read_in_place += block.segments
            self._go_on([in_flight], reads)

    def _submit_filled(self, reads: ReadQueue, stream: CopyStream) -> None:
        """Submit the copies of full slots: some together, unless the link or the reads would stand still."""
        waits = self._copying and reads.n_reading and len(self._filled) < self._settings.n_together
        if not self._filled or waits:
            return
        filled, self._filled = self._filled, []
        copy_event = stream.submit([_host_block(in_flight) for in_flight in filled])
        if copy_event is None:  # there was nothing to copy, or the copy has taken its time
            self._go_on(filled, reads)
        else:
            self._copying.append((copy_event, filled))

    def _go_on(self, freed: Sequence[InFlightRead], reads: ReadQueue) -> None:
        """Read on at once into slots that are free."""
        reads.give_back(freed)
        reads.look()
        self._start_reads(reads)

    # mapped blocks: the mapper thread, or the calling one

    def _map_guarded(self) -> None:
        try:
            with self._mapping:
                if self._work.has_mapped:
                    self._map_all(self._writer.stream())
        except BaseException as failure:
            self._failure.note(failure)
            self._work.cancel()
        finally:
            self._mapper_ended.set()

    def _map_all(self, stream: CopyStream) -> None:
        while (block := self._work.next_mapped()) is not None:
            self._cancel.check()
            address = self._map_block(block)
            if address is None or not self._submit_mapped(stream, block, address):
                self._work.map_nothing(block)

    def _submit_mapped(self, stream: CopyStream, block: Block, address: int) -> bool:
        if not self._pin_mapped(block, address):
            return False
        stream.submit([HostBlock(address + block.start - block.page_start, block)])
        self._state.nbytes[Transport.MAPPED] += block.nbytes
        return True

    def _map_block(self, block: Block) -> int | None:
        """Map a block's pages; return the address of the first. None if the file system or the kernel refuses."""
        start, nbytes = block.page_start, block.page_end - block.page_start
        mapped: list[int] = []
        self._state.cleanups.append(partial(_unmap, mapped, nbytes))  # first: Ctrl-C may come right after the call
        try:
            address = map_file(self._reader.fds[block.file], start, nbytes, mapped)
        except OSError as refusal:
            self._state.fallbacks.append(f"pages are not mapped, read through the pinned ring: {refusal.strerror}")
            return None
        if self._settings.faults_in:
            with span(self._observer, "read", block.nbytes):
                try:
                    populate(address, nbytes)
                except OSError as error:
                    raise self._reader.failed(block.file, start, nbytes, error) from error
        return address

    def _pin_mapped(self, block: Block, address: int) -> bool:
        """Register a mapped block with the driver; return False if it refuses."""
        nbytes = block.page_end - block.page_start
        self._state.cleanups.append(partial(self._writer.unpin, address))
        try:
            with span(self._observer, "register", block.nbytes):
                self._writer.pin(address, nbytes, read_only=True)
        except PinError as refusal:
            self._state.fallbacks.append(
                f"page-cache pages are not registered, read through the pinned ring: {refusal}"
            )
            return False
        self._state.registered_nbytes += nbytes
        return True


def _host_block(in_flight: InFlightRead) -> HostBlock:
    slot, read = in_flight.slot, in_flight.read
    assert read is not None
    return HostBlock(slot.address + read.data_start, read.block, slot.pinned)


def _unmap(addresses: Sequence[int], nbytes: int) -> bool:
    return all(unmap(address, nbytes) for address in addresses)
