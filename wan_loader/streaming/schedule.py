"""The schedule of streamed blocks: which block goes into which buffer, and when. Knows neither torch nor a GPU.

Block i always goes into buffer i modulo the number of buffers, so that its addresses stay the same. As soon as the
computation of a block has been queued, the copy of the next block for its buffer is asked for; the device has it wait
for that computation. After the last blocks, those are the first ones: the next forward finds them there.

Any order of blocks gives the right weights: one that is not in its buffer (after a failure, or where blocks are left
out) is brought when it is entered. That only takes longer.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Protocol

from wan_loader.errors import OptionError
from wan_loader.streaming.reads import Course

if TYPE_CHECKING:
    from wan_loader.streaming.device import StreamDevice

__all__ = ["Schedule", "Source", "course", "following"]


class Source(Protocol):
    """The bytes of the blocks, wherever they come from."""

    def fetch(self, block: int, buffer: int) -> None:
        """Begin to bring a block into a buffer, once what uses the buffer now is over. Returns soon."""

    def ready(self, buffer: int) -> None:
        """Return once everything that was asked for a buffer is queued on the device; raises what went wrong."""


def following(block: int, n_blocks: int, n_buffers: int) -> int:
    """Return the block that is the next to go into the buffer of this one."""
    return block + n_buffers if block + n_buffers < n_blocks else block % n_buffers


def course(n_blocks: int, n_buffers: int) -> Course:
    """Return the order in which blocks are asked for while they run in theirs."""
    successors = [following(block, n_blocks, n_buffers) for block in range(n_blocks)]
    # what follows itself stays where it is
    return Course(range(n_buffers), [after for before, after in enumerate(successors) if after != before])


class Schedule:
    """The course of the blocks through the buffers. One block at a time, in any thread.

    Args:
        n_blocks: The number of blocks that are streamed.
        n_buffers: The number of buffers, no more than there are blocks.
        device: The buffers, and the order of copies and computation.
        source: The bytes.
    """

    def __init__(self, n_blocks: int, n_buffers: int, device: StreamDevice, source: Source) -> None:
        self._n_blocks = n_blocks
        self._n_buffers = n_buffers
        self._device = device
        self._source = source
        self._lock = threading.Lock()
        self._holds: list[int | None] = [None] * n_buffers
        """The block whose copy into each buffer was asked for last."""
        self._running: tuple[int, int] | None = None
        """The block that was entered and not left, and the thread that did so."""
        self.n_fetched = 0
        self.n_late = 0
        """Blocks that were asked for only when they were entered."""

    def start(self) -> None:
        """Begin to bring the first blocks."""
        for block in range(self._n_buffers):
            self._fetch(block)

    def enter(self, block: int) -> None:
        """Have the computation that is queued from now on find the block in its buffer.

        Raises:
            OptionError: Another thread is in a block.
            CheckpointError: The block could not be read. The next time it is tried again.
        """
        with self._lock:
            self._check_alone()
            buffer = block % self._n_buffers
            if self._holds[buffer] != block:
                self._device.used(buffer)
                self._fetch(block)
                self.n_late += 1
            try:
                self._source.ready(buffer)
            except BaseException:
                self._holds[buffer] = None
                raise
            self._device.use(buffer)
            self._running = block, threading.get_ident()

    def is_in(self, block: int) -> bool:
        """Return whether this thread has entered a block and not left it."""
        return self._running == (block, threading.get_ident())

    def leave(self, block: int) -> None:
        """Let the buffer of a block go on to the next one, once the computation that was queued until now is over."""
        with self._lock:
            self._running = None
            self._device.used(block % self._n_buffers)
            successor = following(block, self._n_blocks, self._n_buffers)
            if successor != block:
                self._fetch(successor)

    def _check_alone(self) -> None:
        if self._running is None:
            return
        block, thread = self._running
        if thread != threading.get_ident():
            raise OptionError.because(
                f"streamed block {block} is running in another thread", "run one forward of the module at a time"
            )
        # a block that was interrupted may have queued work on a stream that is not the current one
        self._running = None
        self._device.synchronize()

    def _fetch(self, block: int) -> None:
        buffer = block % self._n_buffers
        self._holds[buffer] = None  # until it is asked for: that may fail
        self._source.fetch(block, buffer)
        self._holds[buffer] = block
        self.n_fetched += 1
