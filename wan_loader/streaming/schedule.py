"""The schedule of streamed blocks: which block goes into which buffer, and when. Knows neither torch nor a GPU.

Block i always goes into buffer i modulo the number of buffers, so that its addresses stay the same. As soon as the
computation of a block has been queued, the copy of the next block for its buffer is asked for; the device has it wait
for that computation. After the last blocks, those are the first ones: the next forward finds them there.

Any order of blocks gives the right weights: one that is not in its buffer (after a failure, or where blocks are left
out) is brought when it is entered. That only takes longer.

Several modules may share buffers, if one runs at a time: each has a schedule, and they have one `Occupancy`. The first
block that finds another module's in its buffer ends all that was under way for that one, and has its successors come.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Protocol

from wan_loader.errors import OptionError
from wan_loader.streaming.reads import Course

if TYPE_CHECKING:
    from wan_loader.streaming.device import StreamDevice

__all__ = ["Occupancy", "Schedule", "Source", "course", "following"]


class Source(Protocol):
    """The bytes of the blocks, wherever they come from."""

    def fetch(self, block: int, buffer: int) -> None:
        """Begin to bring a block into a buffer, once what uses the buffer now is over. Returns soon."""

    def ready(self, buffer: int) -> None:
        """Return once everything that was asked for a buffer is queued on the device; raises what went wrong."""

    def drop(self) -> None:
        """Return once nothing is queued any more of what was asked for, nor will be: others have the buffers."""


def following(block: int, n_blocks: int, n_buffers: int) -> int:
    """Return the block that is the next to go into the buffer of this one."""
    return block + n_buffers if block + n_buffers < n_blocks else block % n_buffers


def course(n_blocks: int, n_buffers: int) -> Course:
    """Return the order in which blocks are asked for while they run in theirs."""
    successors = [following(block, n_blocks, n_buffers) for block in range(n_blocks)]
    # what follows itself stays where it is
    return Course(range(n_buffers), [after for before, after in enumerate(successors) if after != before])


class Occupancy:
    """Which block of which module is in each buffer, and which one runs."""

    def __init__(self, n_buffers: int) -> None:
        # a module that nobody refers to any more is closed at any time, also while this thread has the lock
        self.lock = threading.RLock()
        self.holds: list[tuple[Schedule, int] | None] = [None] * n_buffers
        """The block whose copy into each buffer was asked for last."""
        self.running: tuple[Schedule, int, int] | None = None
        """The block that was entered and not left, and the thread that did so."""


class Schedule:
    """The course of the blocks of one module through the buffers. One block at a time, in any thread.

    Args:
        n_blocks: The number of blocks that are streamed.
        n_buffers: The number of buffers, no more than there are blocks.
        device: The buffers, and the order of copies and computation.
        source: The bytes.
        occupancy: What is known of the buffers by all modules that share them; None: nobody else does.
    """

    def __init__(
        self, n_blocks: int, n_buffers: int, device: StreamDevice, source: Source, occupancy: Occupancy | None = None
    ) -> None:
        self._n_blocks = n_blocks
        self._n_buffers = n_buffers
        self._device = device
        self._source = source
        self._shared = occupancy or Occupancy(n_buffers)
        self.n_fetched = 0
        self.n_late = 0
        """Blocks that were asked for only when they were entered."""

    def start(self) -> None:
        """Begin to bring the first blocks, unless another module's are in the buffers: that may be running."""
        with self._shared.lock:
            if not any(self._shared.holds):
                for block in range(self._n_buffers):
                    self._fetch(block)

    def enter(self, block: int) -> None:
        """Have the computation that is queued from now on find the block in its buffer.

        Raises:
            OptionError: Another thread is in a block.
            CheckpointError: The block could not be read. The next time it is tried again.
        """
        with self._shared.lock:
            self._check_alone()
            buffer = block % self._n_buffers
            if self._shared.holds[buffer] != (self, block):
                self._bring(block)
            try:
                self._source.ready(buffer)
            except BaseException:
                self._shared.holds[buffer] = None
                raise
            self._device.use(buffer)
            self._shared.running = self, block, threading.get_ident()

    def is_in(self, block: int) -> bool:
        """Return whether this thread has entered a block and not left it."""
        return self._shared.running == (self, block, threading.get_ident())

    def leave(self, block: int) -> None:
        """Let the buffer of a block go on to the next one, once the computation that was queued until now is over."""
        with self._shared.lock:
            self._shared.running = None
            self._device.used(block % self._n_buffers)
            successor = following(block, self._n_blocks, self._n_buffers)
            if successor != block:
                self._fetch(successor)

    def close(self) -> None:
        """Take note that nothing of this module is in a buffer any more, nor runs."""
        with self._shared.lock:
            self._forget()
            if self._shared.running is not None and self._shared.running[0] is self:
                self._shared.running = None

    def _check_alone(self) -> None:
        if self._shared.running is None:
            return
        _, block, thread = self._shared.running
        if thread != threading.get_ident():
            raise OptionError.because(
                f"streamed block {block} is running in another thread",
                "run one forward at a time, of the module and of those that share its buffers",
            )
        # a block that was interrupted may have queued work on a stream that is not the current one
        self._shared.running = None
        self._device.synchronize()

    def _bring(self, block: int) -> None:
        """Bring a block whose turn has come; if another module had the buffers, also those that follow it."""
        wanted = [block]
        if self._take_over():
            wanted += ((block + ahead) % self._n_blocks for ahead in range(1, self._n_buffers))
        self._hold(block % self._n_buffers, None)
        for number in wanted:
            buffer = number % self._n_buffers
            if self._shared.holds[buffer] is None:
                self._device.used(buffer)
                self._fetch(number)
        self.n_late += 1

    def _take_over(self) -> bool:
        """End what is under way for other modules; return whether there were any in the buffers."""
        others = {held[0] for held in self._shared.holds if held is not None and held[0] is not self}
        for other in others:
            other._forget()
            other._source.drop()
        return bool(others)

    def _forget(self) -> None:
        for buffer, held in enumerate(self._shared.holds):
            if held is not None and held[0] is self:
                self._shared.holds[buffer] = None

    def _hold(self, buffer: int, block: int | None) -> None:
        self._shared.holds[buffer] = None if block is None else (self, block)

    def _fetch(self, block: int) -> None:
        buffer = block % self._n_buffers
        self._hold(buffer, None)  # until it is asked for: that may fail
        self._source.fetch(block, buffer)
        self._hold(buffer, block)
        self.n_fetched += 1
