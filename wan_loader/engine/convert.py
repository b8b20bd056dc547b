"""The transfer of bytes that are in the page cache and are converted on their way into host memory.

A few threads, each alone: it reads a piece of the file into a buffer of its own, which stays in its processor's cache,
and converts it from there. Nobody waits for anybody else but at the end. The calling thread only draws the plan,
allocates, and passes on what has arrived. (For a disk, or a device that copies by itself, `transfer` is better: it
keeps many reads under way.)

The first failure ends all and is raised.
"""

from __future__ import annotations

import threading
from collections import deque
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING

from wan_loader.cancel import CancelToken
from wan_loader.devices.torch_threads import divide_nothing
from wan_loader.devices.writer import HostBlock
from wan_loader.engine.first_failure import FirstFailure
from wan_loader.engine.open_files import BlockRead
from wan_loader.engine.pending import PendingBlocks
from wan_loader.engine.pinned_ring import PinnedRing
from wan_loader.engine.transfer import Need
from wan_loader.events import span
from wan_loader.plan.engine_settings import TransferMode
from wan_loader.system.posix import read_at
from wan_loader.system.threads import in_background

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from wan_loader.devices.writer import CopyStream, Destination, DeviceWriter
    from wan_loader.engine.open_files import OpenFiles
    from wan_loader.engine.pinned_ring import Slot
    from wan_loader.engine.transfer import Steps
    from wan_loader.engine.transfer_state import TransferState
    from wan_loader.events import Observer
    from wan_loader.plan.blocks import Block, Segment
    from wan_loader.plan.engine_settings import EngineSettings

__all__ = ["convert_blocks"]

#: So long does a failed load wait for its threads, which end by themselves after that.
_END_SECONDS = 0.9
#: So soon is passed on what has arrived, and a cancelled token noticed.
_PATIENCE_S = 0.05
#: With fewer pieces left for each thread, the next blocks are asked for.
_FEW_PIECES = 3


def convert_blocks(
    reader: OpenFiles,
    writer: DeviceWriter,
    settings: EngineSettings,
    state: TransferState,
    *,
    cancel: CancelToken | None = None,
    observer: Observer | None = None,
) -> Steps:
    """Move every block into host memory; all of `transfer_blocks`' promises hold, and its arguments are the same.

    Args:
        reader: The open files.
        writer: The device's side, whose copies are over when they are submitted.
        settings: The threads, of which each has a slot, and its size.
        state: Tells how far the transfer is. The caller must call its `release` once all has arrived.
        cancel: Stops the transfer.
        observer: Is told of spans; None: nobody.

    Yields:
        Lists of segments whose bytes have arrived; in between, what is needed next.
    """
    yield from _Conversion(reader, writer, settings, state, cancel, observer).run()


class _Conversion:
    """One transfer under way: its threads, and what they share. No lock is held that Ctrl-C could leave held."""

    def __init__(
        self,
        reader: OpenFiles,
        writer: DeviceWriter,
        settings: EngineSettings,
        state: TransferState,
        cancel: CancelToken | None,
        observer: Observer | None,
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._settings = settings
        self._state = state
        self._cancel = cancel or CancelToken()
        self._observer = observer
        self._ring: PinnedRing | None = None
        self._pieces: SimpleQueue[Block | None] = SimpleQueue()
        """The pieces that are left; None for each thread that is to end."""
        self._done: deque[tuple[Block, bool]] = deque()
        """The pieces that are in place since they were last counted, and whether they were read there."""
        self._bell: SimpleQueue[None] = SimpleQueue()
        """Gets an entry when the calling thread should look."""
        self._threads: list[threading.Thread] = []
        self._ended: list[str] = []
        self._failure = FirstFailure()
        self._stops = False

    def run(self) -> Steps:
        try:
            self._cancel.check()
            while blocks := (yield Need.BLOCKS):
                self._add(blocks, (yield Need.MEMORY))
                # also where threads are so quick that there is no wait: what nobody has taken would pile up
                if arrived := self._take_arrived():
                    yield arrived
                while self._pieces.qsize() >= self._few and not self._failure:
                    yield from self._wait()
                self._cancel.check()
                self._failure.raise_it()
            self._tell_to_end()
            while self._n_running:
                yield from self._wait()
            self._join()
            self._failure.raise_it()
            self._cancel.check()
            self._writer.finish()
            self._state.fallbacks += self._reader.fallbacks
            yield self._take_arrived()
        except BaseException:
            self._abandon()
            raise

    @property
    def _few(self) -> int:
        return _FEW_PIECES * max(1, len(self._threads))

    @property
    def _n_running(self) -> int:
        return sum(thread.ident is not None for thread in self._threads) - len(self._ended)

    def _wait(self) -> Steps:
        """Wait until there is something to do; pass on what has arrived meanwhile."""
        self._cancel.check()
        with suppress(Empty):
            self._bell.get(timeout=_PATIENCE_S)
        if arrived := self._take_arrived():
            yield arrived

    def _take_arrived(self) -> list[Segment]:
        """Return what has arrived since the last time, and count it."""
        in_place: list[Segment] = []
        while self._done:
            block, is_in_place = self._done.popleft()
            self._state.nbytes[block.transport] += block.nbytes
            if is_in_place:
                self._state.in_place_nbytes += block.nbytes
                in_place += block.segments
        return in_place + self._writer.arrived()

    def _add(self, blocks: Iterable[Block], destinations: Sequence[Destination]) -> None:
        """Give blocks to the threads, in pieces that fit a slot, and start as many threads as have something to do."""
        self._writer.bind(destinations)
        cut = PendingBlocks(self._settings.slot_bytes, mode=TransferMode.IN_PLACE, may_map=False)
        cut.add(blocks)
        while (piece := cut.next_read()) is not None:
            self._pieces.put(piece)
        if self._ring is None:
            self._ring = PinnedRing(self._settings.slot_bytes, self._settings.threads, pinned=False)
            self._state.cleanups.append(self._ring.close)
            self._state.ring_nbytes = self._ring.nbytes
        for slot in self._ring.slots[len(self._threads) :][: self._pieces.qsize()]:
            if not self._start(slot):
                break
        if not self._n_running:  # no thread is allowed
            self._pieces.put(None)
            self._carry_out(self._ring.slots[0])

    def _start(self, slot: Slot) -> bool:
        """Start a thread that uses a slot; return False if none is allowed."""
        name = f"converter {len(self._threads)}"
        thread = threading.Thread(target=self._run_thread, args=(name, slot), name=name, daemon=True)
        self._threads.append(thread)
        with suppress(RuntimeError):
            thread.start()
        return thread.ident is not None

    def _tell_to_end(self) -> None:
        for _ in self._threads:
            self._pieces.put(None)

    def _abandon(self) -> None:
        """End everything after a failure, within a second: in a thread that gets no signals, and may take longer.

        What a thread still writes to is kept until it has ended.
        """
        self._stops = True
        if ending := in_background(self._end, "release"):
            ending.join(_END_SECONDS)

    def _end(self) -> None:
        self._tell_to_end()
        while self._n_running:
            with suppress(Empty):
                self._bell.get(timeout=_PATIENCE_S)
        self._join()
        self._failure.forget()
        with suppress(BaseException):  # the failure that brought us here is the one to raise
            self._writer.finish()
        self._state.release()

    def _join(self) -> None:
        """Wait for what the threads hold to be let go, once they have said that they end: some microseconds."""
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(_END_SECONDS)

    # the threads

    def _run_thread(self, name: str, slot: Slot) -> None:
        try:
            divide_nothing()
            self._carry_out(slot)
        except BaseException as failure:  # pieces may be left that nobody else takes
            self._failure.note(failure)
        finally:
            self._ended.append(name)
            self._bell.put(None)

    def _carry_out(self, slot: Slot) -> None:
        """Bring pieces to their places until there are no more."""
        stream = self._writer.stream()
        while (piece := self._pieces.get()) is not None:
            if self._stops or self._failure:
                continue
            try:
                self._bring(piece, slot, stream)
            except BaseException as failure:
                self._failure.note(failure)
            if self._failure or self._pieces.qsize() < self._few:
                self._bell.put(None)

    def _bring(self, piece: Block, slot: Slot, stream: CopyStream) -> None:
        place = self._writer.place(piece.segments[0]) if len(piece.segments) == 1 else None
        with span(self._observer, "read", piece.nbytes):
            self._read(piece, slot.address if place is None else place)
        if place is None and (event := stream.submit([HostBlock(slot.address, piece)])) is not None:
            event.wait()
        self._done.append((piece, place is not None))

    def _read(self, piece: Block, address: int) -> None:
        read = BlockRead(self._reader, piece)
        complete = False
        while not complete:
            start, nbytes, position = read.wanted
            try:
                complete = read.arrived(read_at(read.fd, address + start, nbytes, position))
            except OSError as error:
                read.failed(error)
