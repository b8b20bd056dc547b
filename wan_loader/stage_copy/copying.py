"""The journey of blocks to a staged copy: read, written, settled on the storage, read back and compared.

Each step runs over the blocks of all files, so that the threads stay busy whatever the files' sizes are.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
from functools import partial
from typing import TYPE_CHECKING

from wan_loader.errors import OutputError
from wan_loader.stage_copy import copy_blocks
from wan_loader.system.posix import start_writeback
from wan_loader.system.threads import StoppedError, run_all
from wan_loader.warming.evict import drop_pages
from wan_loader.warming.prewarm import fill

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from wan_loader.stage_copy.journal import PlannedFile, StageEntry
    from wan_loader.warming.tree import SourceFile

    Progress = Callable[[str, int, int], None]

__all__ = ["Copying"]


class Copying:
    """A run that copies files of `sources` to the parts of a locked entry."""

    def __init__(
        self,
        entry: StageEntry,
        sources: Mapping[PlannedFile, SourceFile],
        *,
        in_memory: bool,
        threads: int,
        progress: Progress | None,
    ) -> None:
        self._entry = entry
        self._sources = sources
        self._in_memory = in_memory
        self._threads = threads
        self._progress = progress
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._buffers = threading.local()
        self._cold: dict[PlannedFile, set[int]] = {}
        self._done = 0
        self._bad: list[tuple[PlannedFile, int]] = []
        self.nbytes_copied = 0
        """Bytes read from the sources."""
        self.nbytes_verified = 0
        """Bytes read back and compared."""

    def blocks_left(self, file: PlannedFile) -> list[int]:
        """List the blocks that no earlier run has written."""
        with contextlib.suppress(OSError):
            if os.stat(self._entry.part(file)).st_size == file.nbytes:
                return [b for b in range(copy_blocks.n_blocks(file)) if self._noted(file, b) is None]
        self._entry.forget_blocks(file)
        return list(range(copy_blocks.n_blocks(file)))

    def copy(self, work: Sequence[tuple[PlannedFile, int]]) -> None:
        """Read blocks, and write them to their parts; make the parts of all empty files, too."""
        for file in {file for file, _ in work} | {f for f in self._sources if not f.nbytes}:
            with copy_blocks.opened(self._entry.part(file), os.O_RDWR | os.O_CREAT) as fd:
                # at full length from the start: threads write blocks in any order
                os.ftruncate(fd, file.nbytes)
        for file in {file for file, _ in work} - set(self._cold):
            # asked before anything is read: afterwards all of it is there
            self._cold[file] = copy_blocks.cold_blocks(self._sources[file])
        total = sum(copy_blocks.block_nbytes(file, block) for file, block in work)
        self._each("copying", (partial(self._copy_block, file, block) for file, block in work), total)

    def _copy_block(self, file: PlannedFile, block: int) -> None:
        start, nbytes = block * copy_blocks.BLOCK_BYTES, copy_blocks.block_nbytes(file, block)
        view = self._buffer()[:nbytes]
        copy_blocks.read_source(self._sources[file], start, view, keep_pages=block not in self._cold[file])
        self._check_stop()
        with copy_blocks.opened(self._entry.part(file), os.O_WRONLY) as fd:
            copy_blocks.write(fd, start, view)
            if not self._in_memory:
                start_writeback(fd, start, nbytes)
        # noted after it was written; a machine that goes down may lose the bytes and keep the note,
        # so that blocks of an earlier run are always read back
        self._entry.note_block(file, start, nbytes, copy_blocks.checksum(view))
        with self._lock:
            self._done += nbytes
            self.nbytes_copied += nbytes

    def settle(self, files: Sequence[PlannedFile]) -> None:
        """Bring everything onto the storage, and out of the page cache, so that it is the storage that is read back."""
        self._each("writing", (partial(self._settle_file, file) for file in files), 0)

    def _settle_file(self, file: PlannedFile) -> None:
        # once more at the end, or a change during the last block would go unseen
        copy_blocks.check_unchanged(self._sources[file])
        if cold := self._cold.get(file):  # what reading ahead has brought back
            with copy_blocks.opened(self._sources[file].path, os.O_RDONLY) as fd:
                for block in cold:
                    os.posix_fadvise(
                        fd, block * copy_blocks.BLOCK_BYTES, copy_blocks.BLOCK_BYTES, os.POSIX_FADV_DONTNEED
                    )
        with copy_blocks.opened(self._entry.part(file), os.O_RDWR) as fd:
            os.fsync(fd)
            if not self._in_memory:
                drop_pages(fd)

    def verify(self, work: Sequence[tuple[PlannedFile, int]]) -> list[str]:
        """Compare blocks, and copy once more what differs.

        Returns:
            A warning, if something was copied again.

        Raises:
            OutputError: Something differs a second time.
        """
        if not (bad := self.compare(work)):
            return []
        self.copy(bad)
        self.settle(list({file for file, _ in bad}))
        if still := self.compare(bad):
            raise OutputError.because(
                f"gives back other bytes than were written ({still[0][0].path})",
                "its memory or disk is damaged; do not use it",
                path=self._entry.directory,
            )
        names = ", ".join(sorted({file.path for file, _ in bad}))
        return [f"{len(bad)} blocks were not what had been copied, and were copied again: {names}"]

    def compare(
        self, work: Sequence[tuple[PlannedFile, int]], *, in_place: bool = False
    ) -> list[tuple[PlannedFile, int]]:
        """Read blocks back, of the parts or of what is in place; return those that are not what was written."""
        self._bad = []
        total = sum(copy_blocks.block_nbytes(file, block) for file, block in work)
        self._each("verifying", (partial(self._compare_block, f, b, in_place) for f, b in work), total)
        return list(self._bad)

    def _compare_block(self, file: PlannedFile, block: int, in_place: bool) -> None:
        self._check_stop()
        nbytes = copy_blocks.block_nbytes(file, block)
        view = self._buffer()[:nbytes]
        path = self._entry.target(file) if in_place else self._entry.part(file)
        with copy_blocks.opened(path, os.O_RDONLY) as fd:
            whole = fill(fd, block * copy_blocks.BLOCK_BYTES, view) == nbytes
        same = whole and copy_blocks.checksum(view) == self._noted(file, block)
        with self._lock:
            self._done += nbytes
            self.nbytes_verified += nbytes
            if not same:
                self._bad.append((file, block))

    def _each(self, step: str, tasks: Iterable[Callable[[], None]], total: int) -> None:
        self._done = 0
        tick = None if self._progress is None else lambda: self._progress(step, self._done, total)  # type: ignore[misc]
        run_all(tasks, threads=self._threads, stop=self._stop, tick=tick)

    def _noted(self, file: PlannedFile, block: int) -> str | None:
        """Return the checksum of a block as it was written, by this run or an earlier one."""
        place = (block * copy_blocks.BLOCK_BYTES, copy_blocks.block_nbytes(file, block))
        return self._entry.blocks.get(file.key, {}).get(place)

    def _buffer(self) -> memoryview:
        if not hasattr(self._buffers, "view"):
            self._buffers.view = memoryview(mmap.mmap(-1, copy_blocks.BLOCK_BYTES))
        view: memoryview = self._buffers.view
        return view

    def _check_stop(self) -> None:
        if self._stop.is_set():
            raise StoppedError
