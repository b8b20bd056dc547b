"""Reads into slots of the pinned ring, several side by side: a `ReadBackend` reads, one thread starts and collects.

A row is reads that run one after the other, so that a thread of the system that has ended one finds the next without
waiting for anybody. Rows run side by side; slots are dealt out to them in turn.
"""

from __future__ import annotations

import errno
import os
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from wan_loader.engine.open_files import BlockRead
from wan_loader.events import Span, clock_ns

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from wan_loader.engine.open_files import OpenFiles
    from wan_loader.engine.pinned_ring import PinnedRing, Slot
    from wan_loader.engine.read_backend import ReadBackend, ReadRequest
    from wan_loader.events import Observer
    from wan_loader.plan.blocks import Block

__all__ = ["InFlightRead", "ReadQueue"]


@dataclass(slots=True)
class _Descriptor:
    """A row's own descriptor of a file, and how many of its reads are under way."""

    fd: int
    n_running: int = 0


class _ReadRow:
    """Reads that run one after the other, with descriptors of their own: reads are queued by descriptor."""

    def __init__(self, name: str, fallbacks: list[str]) -> None:
        self.name = name
        self.ended_ns = 0
        self.reading: deque[InFlightRead] = deque()
        """The reads under way. Those of one file end in this order, so it is enough to look at the first."""
        self._fallbacks = fallbacks
        self._open: dict[int, _Descriptor] = {}
        self._own: list[int] = []
        """Descriptors to be closed."""

    def begin(self, fd: int) -> int:
        """Return this row's own descriptor for the file open at `fd`, and count a read of it."""
        if fd not in self._open:
            # files are read one after the other: what has nothing under way is done with, and descriptors are few
            for other in [key for key, descriptor in self._open.items() if not descriptor.n_running]:
                self._close(other)
            self._open[fd] = _Descriptor(self._another(fd))
        self._open[fd].n_running += 1
        return self._open[fd].fd

    def _another(self, fd: int) -> int:
        """Return another descriptor of the same file; the same one where no further may be opened."""
        try:
            self._own.extend(map(os.dup, (fd,)))  # one call: Ctrl-C comes before it or when the result is noted
            return self._own[-1]
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE):
                raise
            self._fallbacks.append(f"{error.strerror}: reads that could run side by side wait for each other")
            return fd

    def end(self, fd: int) -> None:
        """Count a read as ended."""
        self._open[fd].n_running -= 1

    def close(self) -> None:
        """Close the row's own descriptors, when none of its reads is under way."""
        self._open.clear()
        while self._own:
            os.close(self._own.pop())

    def _close(self, fd: int) -> None:
        if (own := self._open.pop(fd).fd) in self._own:
            self._own.remove(own)
            os.close(own)


@dataclass(slots=True, eq=False)
class InFlightRead:
    """A slot and the read that fills it, unless the bytes go straight to their place."""

    slot: Slot
    row: _ReadRow
    request: ReadRequest
    place: int | None = None
    """The address that the bytes go to; None: into the slot."""
    read: BlockRead | None = None
    started_ns: int = 0
    fd: int = -1


class ReadQueue:
    """The reads under way, and the slots that are free. For one thread."""

    def __init__(
        self, n_rows: int, reader: OpenFiles, ring: PinnedRing, backend: ReadBackend, observer: Observer | None
    ) -> None:
        self._reader = reader
        self._backend = backend
        self._observer = observer
        self._rows = [_ReadRow(f"reader {i}", reader.fallbacks) for i in range(n_rows)]
        self._reads = [
            # dealt out in turn: the first reads, into the first slots, run side by side
            InFlightRead(slot, self._rows[i % n_rows], backend.request())
            for i, slot in enumerate(ring.slots)
        ]
        self._free = deque(self._reads)
        self._n_reading = 0
        self._done: deque[InFlightRead] = deque()

    @property
    def n_reading(self) -> int:
        """The number of reads that are under way, or whose end nobody has asked for."""
        return self._n_reading + len(self._done)

    @property
    def has_free(self) -> bool:
        """True if another read can be started."""
        return bool(self._free)

    def start(self, block: Block, place: int | None = None) -> None:
        """Begin to read a block into a free slot, or, while a slot is kept for it, to its place in memory."""
        in_flight = self._free.popleft()
        in_flight.place = place
        in_flight.read = BlockRead(self._reader, block)
        in_flight.started_ns = clock_ns()
        in_flight.row.reading.append(in_flight)
        self._n_reading += 1
        self._ask(in_flight, in_flight.read)

    @property
    def used(self) -> list[Slot]:
        """The slots that reads were started into, in the order of their memory."""
        return [in_flight.slot for in_flight in self._reads if in_flight.read is not None]

    def give_back(self, freed: Iterable[InFlightRead]) -> None:
        """Make slots free: the bytes in them are no longer needed."""
        self._free.extend(freed)

    def finished(self, timeout_s: float) -> Iterator[InFlightRead]:
        """Wait for reads to end, up to `timeout_s`, if none has.

        Yields:
            The reads whose blocks are in memory now.

        Raises:
            CheckpointError: A read failed, or its file is shorter than its header promised.
        """
        self.look()
        if not self._done and self._n_reading:
            self._backend.wait_any([row.reading[0].request for row in self._rows if row.reading], timeout_s)
            self.look()
        while self._done:
            yield self._done.popleft()

    def look(self) -> None:
        """Take note of reads that have ended: as soon as possible, since their spans end now."""
        for row in self._rows:
            while row.reading and self._is_done(row.reading[0]):
                self._done.append(row.reading.popleft())
                self._n_reading -= 1

    def _is_done(self, in_flight: InFlightRead) -> bool:
        assert in_flight.read is not None
        try:
            nbytes = in_flight.request.result()
            if nbytes is None:
                return False
        except OSError as error:
            in_flight.read.failed(error)
            complete = False
        else:
            complete = in_flight.read.arrived(nbytes)
        in_flight.row.end(in_flight.fd)
        if not complete:
            self._ask(in_flight, in_flight.read)
            return False
        self._record(in_flight, in_flight.read.block)
        return True

    def _ask(self, in_flight: InFlightRead, read: BlockRead) -> None:
        start, nbytes, position = read.wanted
        address = (in_flight.slot.address if in_flight.place is None else in_flight.place) + start
        in_flight.fd = read.fd
        try:
            own = in_flight.row.begin(read.fd)
            try:
                in_flight.request.start(own, address, nbytes, position)
            except OSError:
                in_flight.row.end(read.fd)
                raise
        except OSError as error:
            read.failed(error)
            # `failed` has raised, or has turned to the page cache: once more, with the other descriptor
            self._ask(in_flight, read)

    def _record(self, in_flight: InFlightRead, block: Block) -> None:
        if self._observer is not None:
            start_ns = max(in_flight.started_ns, in_flight.row.ended_ns)  # until then its row was busy with another
            in_flight.row.ended_ns = clock_ns()
            self._observer.record(Span("read", start_ns, in_flight.row.ended_ns, block.nbytes, in_flight.row.name))

    def end(self) -> None:
        """Take back what has not begun, wait for what has: a read that hangs keeps its memory until it returns."""
        for in_flight in self._reads:
            if in_flight.request.running:
                in_flight.request.cancel()
        self._backend.wait_all([in_flight.request for in_flight in self._reads])
        for row in self._rows:
            row.close()
