"""Warming the page cache in the background, before and while the program that needs the bytes is still importing.

A few threads read blocks in the order of first use and throw the bytes away; what the kernel keeps is what counts.
Blocks that are resident already cost a system call and no read. It never takes more memory than is available, and can
be stopped within one block, for whoever starts to load to have the disk alone. It needs no torch.
"""

from __future__ import annotations

import mmap
import os
import threading
from typing import TYPE_CHECKING

from wan_loader.arguments import MAX_THREADS, checked_count, checked_path
from wan_loader.formats import open_checkpoint
from wan_loader.formats.inventory import checkpoints_in
from wan_loader.sizes import format_bytes
from wan_loader.system.machine import affordable_buffers, available_memory
from wan_loader.system.posix import cached_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from types import TracebackType

    from wan_loader.types import StrPath

__all__ = ["BLOCK_BYTES", "MEMORY_SHARE", "Prewarm", "fill", "prewarm", "prewarm_files"]

BLOCK_BYTES = 8 << 20
#: Share of the available memory that may be filled; the rest is for the program that is starting.
MEMORY_SHARE = 0.8
_NO_LIMIT_BYTES = 1 << 62


class Prewarm:
    """A running warm-up. It ends by itself; `stop` ends it early. A context manager that stops.

    Args:
        files: The files, in the order of reading.
        threads: The number of threads, of which each needs a block of memory; fewer where that is short.
        budget_nbytes: Read at most so many bytes from storage.
        first_nbytes: Look only at so many bytes, counted through the files in their order.
        goes_on: Is asked before each block, and is quick; once it says no, nothing more is read.
    """

    def __init__(
        self,
        files: Sequence[str],
        *,
        threads: int,
        budget_nbytes: int,
        first_nbytes: int | None = None,
        goes_on: Callable[[], bool] = lambda: True,
    ) -> None:
        self._lock = threading.Lock()
        self._stopped = False
        self._budget_nbytes = budget_nbytes
        self._goes_on = goes_on
        self.nbytes_read = 0
        """Bytes brought into the page cache."""
        self.nbytes_resident = 0
        """Bytes that were there already."""
        self.failures: list[str] = []
        """The causes why blocks could not be read, with the file's name."""
        self._blocks = _blocks(files, first_nbytes)
        self._threads = [
            threading.Thread(target=self._run, name=f"prewarm {i}", daemon=True)
            for i in range(affordable_buffers(max(1, threads), BLOCK_BYTES))
        ]
        for thread in self._threads:
            thread.start()

    def __repr__(self) -> str:
        state = "done" if self.done else "reading"
        there = f"{format_bytes(self.nbytes_read)} read, {format_bytes(self.nbytes_resident)} were there"
        return f"Prewarm({state}: {there}{f', {len(self.failures)} failed' if self.failures else ''})"

    def __enter__(self) -> Prewarm:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.stop()

    @property
    def done(self) -> bool:
        """True when nothing is read any more."""
        return not any(thread.is_alive() for thread in self._threads)

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until everything is read; return False if that took longer."""
        for thread in self._threads:
            thread.join(timeout_s)
            if thread.is_alive():
                return False
        return True

    def stop(self, timeout_s: float | None = None) -> None:
        """End within the block that each thread is reading, and wait for that."""
        with self._lock:
            self._stopped = True
        self.wait(timeout_s)

    def _run(self) -> None:
        # not from the heap, which would keep the memory after the warm-up has ended
        with mmap.mmap(-1, BLOCK_BYTES) as memory, memoryview(memory) as buffer:
            while (block := self._take()) is not None:
                self._read(*block, buffer)

    def _take(self) -> tuple[str, int, int] | None:
        with self._lock:
            self._stopped = self._stopped or not self._goes_on()
            # under the lock: a generator must not be entered by two threads at once
            if self._stopped or self.nbytes_read >= self._budget_nbytes:
                return None
            return next(self._blocks, None)

    def _read(self, path: str, start: int, nbytes: int, buffer: memoryview) -> None:
        """Read a block, with best effort: a file that vanished or cannot be read is for the load to report."""
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                # one system call instead of a copy of 8 MiB, which would slow the program down that is starting
                resident = _resident(fd, start, nbytes)
                count = nbytes if resident == nbytes else fill(fd, start, buffer[:nbytes])
            finally:
                os.close(fd)
        except OSError as error:
            with self._lock:
                self.failures.append(f"{path} cannot be read at byte {start}: {error.strerror}")
            return
        with self._lock:
            self.nbytes_resident += min(resident, count)
            self.nbytes_read += max(0, count - resident)


def prewarm(
    path: StrPath | Sequence[StrPath], *, part: str | None = None, threads: int = 4, limit_nbytes: int | None = None
) -> Prewarm:
    """Start reading a checkpoint's files into the page cache and return at once.

    Call it first thing in a program, before torch is imported. A later load finds its pages there.

    Args:
        path: As for `open_checkpoint`, whose errors are raised; or a whole model's directory, with all its parts.
        part: As for `open_checkpoint`; of a file that nests dicts, all is read, whatever part is named.
        threads: As for `prewarm_files`.
        limit_nbytes: As for `prewarm_files`.
    """
    checkpoints = (
        checkpoints_in(path, part) if isinstance(path, (str, os.PathLike)) else [open_checkpoint(path, part=part)]
    )
    files = [file.path for checkpoint in checkpoints for file in checkpoint.files]
    return prewarm_files(files, threads=threads, limit_nbytes=limit_nbytes)


def prewarm_files(files: Iterable[StrPath], *, threads: int = 4, limit_nbytes: int | None = None) -> Prewarm:
    """Start reading files into the page cache, in the order given, and return at once.

    Args:
        files: Paths; those that cannot be read are left out.
        threads: The number of reads side by side. The threads are daemons: they do not keep a program from ending.
        limit_nbytes: Read at most so much; never more than 80 % of the available memory, where that is known.
    """
    threads = checked_count(threads, "threads", most=MAX_THREADS)
    free = available_memory()
    limits = [] if free is None else [int(free * MEMORY_SHARE)]
    if limit_nbytes is not None:
        limits.append(checked_count(limit_nbytes, "limit_nbytes", least=0))
    paths = [checked_path(file, "an item of files") for file in files]
    return Prewarm(paths, threads=threads, budget_nbytes=min(limits, default=_NO_LIMIT_BYTES))


def fill(fd: int, start: int, buffer: memoryview) -> int:
    """Read a block whole, or to the end of its file; return how many bytes that were."""
    count = 0
    while count < len(buffer) and (got := os.preadv(fd, [buffer[count:]], start + count)):
        count += got
    return count


def _blocks(files: Sequence[str], first_nbytes: int | None) -> Iterator[tuple[str, int, int]]:
    left = first_nbytes
    for path in files:
        try:
            size = os.stat(path).st_size
        except OSError:
            continue
        if left is not None:
            size = min(size, left)
            left -= size
        for start in range(0, size, BLOCK_BYTES):
            yield path, start, min(BLOCK_BYTES, size - start)


def _resident(fd: int, start: int, nbytes: int) -> int:
    try:
        return cached_bytes(fd, start, nbytes)
    except OSError:
        return 0
