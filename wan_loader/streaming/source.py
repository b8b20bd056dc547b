"""The bytes of streamed blocks, out of their files.

Of some blocks the pages lie in the page cache and are registered with the driver for as long as the stream lasts:
nothing is left for the host to do but to queue their copies. The others are read each time, through a few pinned slots:
out of the page cache, or with O_DIRECT past it. On a device that copies late, a thread of its own does that.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING

from wan_loader.devices.writer import HostBlock, PinError
from wan_loader.engine.open_files import BlockRead, OpenFiles
from wan_loader.engine.pinned_ring import PinnedRing
from wan_loader.errors import CheckpointError
from wan_loader.plan.blocks import Block, Transport, plan_blocks
from wan_loader.system.posix import map_file, populate, read_at, unmap

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from wan_loader.engine.pinned_ring import Slot
    from wan_loader.formats.checkpoint_facts import FileFacts
    from wan_loader.streaming.blocks import BlockLayout
    from wan_loader.streaming.device import Fence, StreamDevice

__all__ = ["CHUNK_BYTES", "FileSource"]

#: What is read, or converted, at a time; copies of this size reach what the link gives.
CHUNK_BYTES = 16 << 20
_READS = 6
#: One slot of each read is filled while the other is emptied.
_SLOTS = 2 * _READS


class FileSource:
    """The blocks of one streamed module, in its files.

    Args:
        files: The files of the checkpoint.
        layouts: The streamed blocks.
        device: Where they go.
        pinned: The numbers of the blocks whose pages are registered with the driver, if it will.
        transport: Says how the bytes of a file travel that are read.

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
        *,
        pinned: Collection[int],
        transport: Callable[[int, int, int], Transport],
    ) -> None:
        self._layouts = layouts
        self._device = device
        self._files = [files[n] for n in sorted({r.file for layout in layouts for r in layout.byte_ranges})]
        self._under_way: dict[int, Future[None]] = {}
        """What the thread was asked for last, by buffer."""
        self._slots: deque[tuple[Slot, Fence | None]] = deque()
        """Those that are free, with the end of the last copy out of each; the oldest first."""
        self._thread: ThreadPoolExecutor | None = None
        self._readers: ThreadPoolExecutor | None = None
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
            self._blocks = [
                list(plan_blocks(layout.byte_ranges, block_bytes=CHUNK_BYTES, transport=transport))
                for layout in layouts
            ]
            if len(self._mapped) < len(layouts):
                self._make_slots()
        except BaseException:
            self._stack.close()
            raise

    @property
    def fallbacks(self) -> Sequence[str]:
        """Reasons why bytes travel in another way than was decided."""
        return self._open.fallbacks

    def nbytes(self) -> dict[Transport, int]:
        """Return the bytes that travel each way when all blocks come once."""
        found = dict.fromkeys(Transport, 0)
        for number, blocks in enumerate(self._blocks):
            for block in blocks:
                way = Transport.MAPPED if number in self._mapped else block.transport
                found[way] += sum(segment.nbytes for segment in block.segments)
        return found

    def check_unchanged(self) -> None:
        """Raise `CheckpointError` if a file is not what it was when its header was read. Costs a stat for each."""
        for file in self._files:
            file.check_unchanged()

    def fetch(self, block: int, buffer: int) -> None:
        """Bring a block into a buffer: where bytes are read behind the caller's back, in the thread that does so."""
        if self._thread is not None:
            self._under_way[buffer] = self._thread.submit(self._fetch, block, buffer)
        else:
            self._fetch(block, buffer)

    def ready(self, buffer: int) -> None:
        """Return once everything that was asked for a buffer is queued; raises what went wrong there."""
        if (future := self._under_way.pop(buffer, None)) is not None:
            future.result()

    def _fetch(self, number: int, buffer: int) -> None:
        device, layout = self._device, self._layouts[number]
        with device.current():
            device.begin(buffer)
            if number in self._mapped:
                device.copy(buffer, layout, [self._mapped_block(number, block) for block in self._blocks[number]])
            else:
                self._read_all(number, buffer)
            device.end(buffer)

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

    # reads

    def _make_slots(self) -> None:
        ring = PinnedRing(CHUNK_BYTES, _SLOTS if self._device.copies_late else 1, pinned=self._device.copies_late)
        self._stack.callback(ring.close)
        address, pinned = ring.slots[0].address, False
        if self._device.copies_late:
            self._stack.callback(self._device.unpin, address)
            with suppress(OSError):  # then registering has more to do
                populate(address, ring.nbytes, write=True)
            try:
                self._device.pin(address, ring.nbytes, read_only=False)
                pinned = True
            except PinError as refusal:
                self._open.fallbacks.append(f"the slots are not pinned, copies are slower: {refusal}")
            self._thread = ThreadPoolExecutor(1, "stream blocks")
            self._readers = ThreadPoolExecutor(_READS, "read blocks")
        for slot in ring.slots:
            slot.pinned = pinned
            self._slots.append((slot, None))

    def _read_all(self, number: int, buffer: int) -> None:
        """Read the parts of a block, several at a time, and queue their copies in their order."""
        reads: deque[tuple[Slot, Future[HostBlock] | HostBlock]] = deque()
        try:
            for block in self._blocks[number]:
                if not self._slots:
                    self._copy_read(number, buffer, *reads.popleft())
                slot, fence = self._slots.popleft()
                reads.append((slot, self._begin_read(block, slot, fence)))
            while reads:
                self._copy_read(number, buffer, *reads.popleft())
        finally:
            # after a failure: a slot is free once nobody writes to it any more
            for slot, read in reads:
                if isinstance(read, Future):
                    read.exception()
                self._slots.append((slot, None))

    def _begin_read(self, block: Block, slot: Slot, fence: Fence | None) -> Future[HostBlock] | HostBlock:
        if fence is not None:
            fence.wait()
        if self._readers is not None:
            return self._readers.submit(_read, self._open, block, slot)
        return _read(self._open, block, slot)

    def _copy_read(self, number: int, buffer: int, slot: Slot, read: Future[HostBlock] | HostBlock) -> None:
        fence = None
        try:
            host = read.result() if isinstance(read, Future) else read
            self._device.copy(buffer, self._layouts[number], [host])
            fence = self._device.fence()
        finally:
            self._slots.append((slot, fence))

    def close(self) -> None:
        """End the threads, and give everything back: once no copy is under way any more, and no computation."""
        for pool in (self._thread, self._readers):
            if pool is not None:
                pool.shutdown(cancel_futures=True)
        self._under_way.clear()
        with self._stack:
            while self._slots:
                _, fence = self._slots.popleft()
                if fence is not None:
                    fence.wait()
            self._device.synchronize()  # copies out of mapped pages have no fences


def _read(files: OpenFiles, block: Block, slot: Slot) -> HostBlock:
    """Read a block into a slot; raises `CheckpointError` for one that cannot be read whole."""
    read = BlockRead(files, block)
    while True:
        start, nbytes, position = read.wanted
        try:
            n_read = read_at(read.fd, slot.address + start, nbytes, position)
        except OSError as error:
            read.failed(error)
            continue
        if read.arrived(n_read):
            return HostBlock(slot.address + read.data_start, block, quick=slot.pinned)
