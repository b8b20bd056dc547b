"""Reads of streamed blocks, ahead of the computation: in the order in which blocks are asked for, again and again.

There are always as many reads under way as there are free slots, whatever block they are of: also of the first blocks
of the next forward while the last ones of this compute. So the disk rests only while everything in memory waits for the
computation, and what is read ahead is bounded by the slots.
"""

from __future__ import annotations

from collections import deque
from itertools import chain, cycle
from threading import Event
from typing import TYPE_CHECKING, NamedTuple

from wan_loader.devices.writer import HostBlock
from wan_loader.engine.read_backend import choose_backend
from wan_loader.engine.read_queue import ReadQueue
from wan_loader.events import clock_ns
from wan_loader.plan.blocks import Transport
from wan_loader.streaming.slots import N_READS

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence

    from wan_loader.engine.open_files import OpenFiles
    from wan_loader.engine.read_queue import InFlightRead
    from wan_loader.plan.blocks import Block
    from wan_loader.streaming.device import Fence
    from wan_loader.streaming.slots import Slots

__all__ = ["Course", "ReadAhead"]

_WAIT_S = 1.0
#: A rate is believed after so many parts, or a whole block.
_PARTS_FOR_A_RATE = 8


class Course(NamedTuple):
    """The order in which blocks are asked for, unless they run out of turn."""

    first: Sequence[int]
    """To begin with."""
    again: Sequence[int]
    """Then, again and again."""

    def of(self, numbers: Mapping[int, object]) -> Course:
        """Return the course of some of the blocks."""
        return Course([n for n in self.first if n in numbers], [n for n in self.again if n in numbers])

    def begun_at(self, number: int) -> Course:
        """Return what is to be expected when a block is asked for out of turn."""
        if number not in self.again:
            return Course([number], ())
        at = self.again.index(number)
        return Course(self.again[at:], self.again)


class _Started(NamedTuple):
    """A part of a block whose read was started, and not taken."""

    number: int
    block: Block


class ReadAhead:
    """The parts of blocks that are read each time. For one thread at a time, `rate` excepted.

    Args:
        files: The open files.
        blocks: The parts of each block that is read, in their order, by the number of the block.
        course: The order in which blocks will be asked for.
        slots: What is read into. Nobody else may use them until `drop`.
    """

    def __init__(self, files: OpenFiles, blocks: Mapping[int, Sequence[Block]], course: Course, slots: Slots) -> None:
        self._files = files
        self._blocks = blocks
        self._course = course.of(blocks)
        self._slots = slots
        self._queue: ReadQueue | None = None
        self._upcoming = self._parts_of(self._course)
        self._started: deque[_Started] = deque()
        self._arrived: list[InFlightRead] = []
        """Those that were read, and not taken."""
        self._copying: deque[tuple[InFlightRead, Fence | None]] = deque()
        """Those that copies may still be under way from, the oldest first."""
        self._meter = _Meter()

    def rate(self, timeout_s: float) -> float | None:
        """Return the bytes a second that the first direct reads came with; None where there were none.

        Args:
            timeout_s: How long to wait for them, if any was begun.
        """
        return self._meter.rate(timeout_s)

    def parts(self, number: int) -> Generator[HostBlock, None, None]:
        """Yield the parts of a block, each once it is in memory. After each, `copied` must be called.

        Raises:
            CheckpointError: Something cannot be read. Nothing is under way then, and the next call begins anew.
        """
        try:
            if self._started and self._started[0].number != number:
                self.drop()
            if not self._started:
                self._expect(number)
            for block in self._blocks[number]:
                self._start_reads()
                if not self._started:
                    self._free_oldest()
                    self._start_reads()
                assert self._started[0].block is block
                read = self._wait_for(block)
                self._started.popleft()
                self._copying.append((read, None))
                assert read.read is not None
                yield HostBlock(read.slot.address + read.read.data_start, block, quick=read.slot.pinned)
            self._meter.believe()
        except BaseException:
            self.drop()
            raise

    def copied(self, fence: Fence | None) -> None:
        """Take note of when the copies out of the last part will be over."""
        read, _ = self._copying.pop()
        self._copying.append((read, fence))

    def go_on(self) -> bool:
        """Start another read, once a slot is free for it; return False if there is none, or nothing to read."""
        self._meter.end()
        try:
            if not self._open().has_free and self._copying:
                self._free_oldest()
            return self._start_one()
        except BaseException:
            self.drop()
            raise

    def drop(self) -> None:
        """Forget what was read ahead. No slot is in use any more when this returns."""
        self._meter.end()
        if self._queue is not None:
            self._queue.end()
        while self._copying:
            _, fence = self._copying.popleft()
            if fence is not None:
                fence.wait()
        self._queue = None
        self._started.clear()
        self._arrived.clear()

    def _open(self) -> ReadQueue:
        if self._queue is None:
            backend = choose_backend(self._files.fallbacks)
            self._queue = ReadQueue(N_READS, self._files, self._slots.ring(), backend, None)
        return self._queue

    def _expect(self, number: int) -> None:
        """Have the parts of a block, and of those that follow it, be the next to read."""
        first = next(self._upcoming, None)
        if first is not None and first == _Started(number, self._blocks[number][0]):
            self._upcoming = chain([first], self._upcoming)
        else:
            self._upcoming = self._parts_of(self._course.begun_at(number))

    def _parts_of(self, course: Course) -> Iterator[_Started]:
        for number in chain(course.first, cycle(course.again)):
            for block in self._blocks[number]:
                yield _Started(number, block)

    def _start_reads(self) -> None:
        """Start reads into all slots that are free, without waiting for one."""
        while self._copying and ((fence := self._copying[0][1]) is None or fence.is_over()):
            self._free_oldest()
        while self._start_one():
            pass

    def _start_one(self) -> bool:
        queue = self._open()
        if not queue.has_free or (part := next(self._upcoming, None)) is None:
            return False
        if part.block.transport is Transport.DIRECT:
            self._meter.begin()
        self._started.append(part)
        queue.start(part.block)
        return True

    def _free_oldest(self) -> None:
        read, fence = self._copying.popleft()
        if fence is not None:
            fence.wait()
        self._open().give_back([read])

    def _wait_for(self, block: Block) -> InFlightRead:
        while True:
            for read in self._arrived:
                if read.read is not None and read.read.block is block:
                    self._arrived.remove(read)
                    return read
            self._note(self._open().finished(_WAIT_S))

    def _note(self, reads: Iterable[InFlightRead]) -> None:
        for read in reads:
            self._arrived.append(read)
            if read.read is not None and read.read.transport is Transport.DIRECT:
                self._meter.arrived(read.read.block.nbytes)


class _Meter:
    """The rate of the first reads, until nobody looks at their ends any more at once."""

    def __init__(self) -> None:
        self._since_ns = 0
        self._is_over = False
        self._rate: float | None = None
        self._nbytes = self._n_parts = 0
        self._is_known = Event()

    def begin(self) -> None:
        self._since_ns = self._since_ns or clock_ns()

    def arrived(self, nbytes: int) -> None:
        if self._is_over or not self._since_ns:
            return
        self._nbytes += nbytes
        self._n_parts += 1
        self._rate = self._nbytes * 1e9 / max(1, clock_ns() - self._since_ns)
        if self._n_parts >= _PARTS_FOR_A_RATE:
            self._is_known.set()

    def believe(self) -> None:
        if self._rate is not None:
            self._is_known.set()

    def end(self) -> None:
        """Measure no more, if anything was measured: from here on the disk may have to wait."""
        if self._rate is not None:
            self._is_over = True
            self._is_known.set()

    def rate(self, timeout_s: float) -> float | None:
        if self._since_ns and not self._is_known.is_set():
            self._is_known.wait(timeout_s)
        return self._rate
