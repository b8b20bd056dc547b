"""The bytes of streamed blocks, out of their files.

Of some blocks the pages lie in the page cache and are registered with the driver for as long as the stream lasts:
nothing is left for the host to do but to queue their copies. The others are read each time, through a few pinned slots,
ahead of the computation (`reads`). On a device that copies late, a thread of its own does that.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from typing import TYPE_CHECKING

from wan_loader.devices.writer import HostBlock, PinError
from wan_loader.engine.open_files import OpenFiles
from wan_loader.errors import CheckpointError
from wan_loader.plan.blocks import Block, Transport, plan_blocks
from wan_loader.streaming.reads import ReadAhead
from wan_loader.system.posix import map_file, populate, unmap

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from wan_loader.formats.checkpoint_facts import FileFacts
    from wan_loader.streaming.blocks import BlockLayout
    from wan_loader.streaming.device import Scales, StreamDevice
    from wan_loader.streaming.reads import Course
    from wan_loader.streaming.slots import Slots

__all__ = ["CHUNK_BYTES", "THREAD_NAME", "FileSource"]

#: What is read, or converted, at a time; copies of this size reach what the link gives.
CHUNK_BYTES = 16 << 20
THREAD_NAME = "stream blocks"
#: How long a report waits for the first reads, whose rate it is to name.
_FIRST_READS_S = 2.0


class FileSource:
    """The blocks of one streamed module, in its files.

    Args:
        files: The files of the checkpoint.
        layouts: The streamed blocks.
        device: Where they go.
        slots: What bytes pass through that are read. Others may use them, when this has nothing under way.
        pinned: The numbers of the blocks whose pages are registered with the driver, if it will.
        transport: Says how the bytes of a block travel that is read, by its number.
        course: The order in which the blocks will be asked for.
        scales: What scaled tensors are multiplied by, on the device, by their names.

    Raises:
        MissingFileError: A file is gone.
        CheckpointError: A file was changed since its header was read, or is shorter than that promised.
        HostMemoryError: There is no memory for the slots.
    """

    def __init__(
        self,
        files: Sequence[FileFacts],
        layouts: Sequence[BlockLayout],
        device: StreamDevice,
        slots: Slots,
        *,
        pinned: Collection[int],
        transport: Callable[[int], Transport],
        course: Course,
        scales: Scales | None = None,
    ) -> None:
        self._layouts = layouts
        self._device = device
        self._scales = scales or {}
        self._files = [files[n] for n in sorted({r.file for layout in layouts for r in layout.byte_ranges})]
        self._under_way: dict[int, Future[None]] = {}
        """What the thread was asked for last, by buffer."""
        self._n_asked = self._n_begun = 0
        """Blocks that were asked for, and those that the thread has begun to bring."""
        self._is_stopping = False
        self._thread: ThreadPoolExecutor | None = None
        self._reads: ReadAhead | None = None
        self._slots = slots
        self.pinned_nbytes = 0
        """The bytes of the page cache that are registered."""
        self._stack = ExitStack()
        try:
            self._open = self._stack.enter_context(OpenFiles(files))
            self._mapped: dict[int, list[HostBlock]] = {}
            for number in sorted(pinned):
                if not (mapped := self._map(layouts[number])):
                    break  # a driver that refuses once would do so again
                self._mapped[number] = mapped
            self._blocks = [self._parts(number, transport) for number in range(len(layouts))]
            if len(self._mapped) < len(layouts):
                read = {number: parts for number, parts in enumerate(self._blocks) if number not in self._mapped}
                self._reads = ReadAhead(self._open, read, course, self._slots)
                self._slots.ring()  # now, where an error is the caller's
                if device.copies_late:
                    self._thread = ThreadPoolExecutor(1, THREAD_NAME)
        except BaseException:
            self._stack.close()
            raise

    def _parts(self, number: int, transport: Callable[[int], Transport]) -> list[Block]:
        way = Transport.MAPPED if number in self._mapped else transport(number)
        return list(plan_blocks(self._layouts[number].byte_ranges, block_bytes=CHUNK_BYTES, transport=lambda *_: way))

    @property
    def fallbacks(self) -> Sequence[str]:
        """Reasons why bytes travel in another way than was decided."""
        return [*self._open.fallbacks, *self._slots.fallbacks]

    def travel(self) -> dict[Transport, tuple[int, int]]:
        """Return how many blocks travel each way, and how many bytes of them when all come once."""
        found = dict.fromkeys(Transport, (0, 0))
        for parts in self._blocks:
            n_blocks, nbytes = found[way := parts[0].transport]
            found[way] = n_blocks + 1, nbytes + sum(segment.nbytes for part in parts for segment in part.segments)
        return found

    def read_rate(self) -> float | None:
        """Return the bytes a second that the first reads past the page cache came with; None where there are none.

        Waits for these reads, for two seconds at most.
        """
        return None if self._reads is None else self._reads.rate(_FIRST_READS_S)

    def check_unchanged(self) -> None:
        """Raise `CheckpointError` if a file is not what it was when its header was read. Costs a stat for each."""
        for file in self._files:
            file.check_unchanged()

    def fetch(self, block: int, buffer: int) -> None:
        """Bring a block into a buffer: where bytes are read behind the caller's back, in the thread that does so."""
        self._n_asked += 1
        if self._thread is None:
            self._fetch(block, buffer)
        else:
            self._under_way[buffer] = self._thread.submit(self._fetch, block, buffer)
            self._thread.submit(self._read_ahead)

    def ready(self, buffer: int) -> None:
        """Return once everything that was asked for a buffer is queued; raises what went wrong there."""
        if (future := self._under_way.pop(buffer, None)) is not None:
            future.result()

    def drop(self) -> None:
        """Return once nothing is queued any more, nor will be, and nothing is read: somebody else has the buffers."""
        self._stop()
        for future in [future for future in self._under_way.values() if not future.cancel()]:
            future.exception()
        self._under_way.clear()
        if self._thread is None:
            self._drop_reads()
        else:
            self._thread.submit(self._drop_reads).result()
        self._n_begun = self._n_asked
        self._is_stopping = False

    def _stop(self) -> None:
        """Have the thread end what it is at after the next part, and read nothing ahead."""
        self._is_stopping = True
        self._n_asked += 1

    def _drop_reads(self) -> None:
        if self._reads is not None:
            with self._device.current():
                self._reads.drop()

    def _fetch(self, number: int, buffer: int) -> None:
        self._n_begun += 1
        device, layout = self._device, self._layouts[number]
        with device.current():
            device.begin(buffer)
            if number in self._mapped:
                mapped = [self._mapped_block(number, block) for block in self._blocks[number]]
                device.copy(buffer, layout, mapped, self._scales)
            else:
                assert self._reads is not None
                with closing(self._reads.parts(number)) as parts:  # after a failure, nothing may be under way
                    for part in parts:
                        device.copy(buffer, layout, [part], self._scales)
                        self._reads.copied(device.fence())
                        if self._is_stopping:  # the block will not be used
                            return
            device.end(buffer)

    def _read_ahead(self) -> None:
        """Read what will be asked for, until something is."""
        assert self._reads is not None
        with self._device.current(), suppress(CheckpointError):  # whoever asks for it will be told
            while self._n_asked == self._n_begun and self._reads.go_on():
                pass

    # pages of the cache

    def _map(self, layout: BlockLayout) -> list[HostBlock]:
        """Map and register the pages of a block; return its ranges; none where the driver or the kernel refuses."""
        whole: list[HostBlock] = []
        with ExitStack() as stack:
            for block in plan_blocks(layout.byte_ranges, block_bytes=1 << 62, transport=lambda *_: Transport.MAPPED):
                nbytes = block.page_end - block.page_start
                try:
                    address = map_file(self._open.fds[block.file], block.page_start, nbytes)
                    stack.callback(unmap, address, nbytes)
                    self._fault_in(block, address)
                    # first: Ctrl-C may come right after the call
                    stack.callback(self._device.unpin, address)
                    self._device.pin(address, nbytes, read_only=True)
                except (OSError, PinError) as refusal:
                    if isinstance(refusal, CheckpointError):
                        raise
                    reason = f"{layout.name} and what follows are not registered, but read each time: {refusal}"
                    self._open.fallbacks.append(reason)
                    return []
                whole.append(HostBlock(address + block.start - block.page_start, block, quick=True))
            self.pinned_nbytes += sum(host.block.page_end - host.block.page_start for host in whole)
            self._stack.push(stack.pop_all())
        return whole

    def _fault_in(self, block: Block, address: int) -> None:
        """Have the disk bring what is not in the page cache: the driver would do so under a lock."""
        try:
            populate(address, block.page_end - block.page_start)
        except OSError as error:
            raise self._open.failed(block.file, block.start, block.nbytes, error) from error

    def _mapped_block(self, number: int, block: Block) -> HostBlock:
        """Return where a part of a mapped block lies."""
        for host in self._mapped[number]:
            if host.block.file == block.file and host.block.start <= block.start < host.block.end:
                return HostBlock(host.address + block.start - host.block.start, block, quick=True)
        raise AssertionError("a part of a mapped block is not mapped")

    def close(self) -> None:
        """End the threads, and give everything back: once no copy is under way any more, and no computation."""
        self._stop()
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.shutdown(cancel_futures=True)
        self._under_way.clear()
        with self._stack:
            self._drop_reads()
            self._device.synchronize()  # copies out of mapped pages have no fences
