"""Reads blocks of a checkpoint's files into memory, with O_DIRECT or through the page cache.

Thread-safe: positional reads on shared descriptors. A file that is shorter than its header promised is an error that
names it; a short read is continued.
"""

from __future__ import annotations

import errno
import os
from contextlib import ExitStack
from typing import TYPE_CHECKING

from wan_loader.errors import CheckpointError, MissingFileError
from wan_loader.plan import PAGE, Way

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType

    from wan_loader.formats.facts import FileFacts
    from wan_loader.plan import Block

    #: File number, start and end of a block, and its bytes.
    Check = Callable[[int, int, int, memoryview], None]

__all__ = ["Reader"]


class Reader:
    """Open files of one checkpoint; a context manager that closes them."""

    def __init__(self, files: Sequence[FileFacts], check: Check | None = None) -> None:
        """check: is given every block once it is in memory, from any thread, and raises if it is not what it was."""
        self._files = files
        self._check = check
        self._stack = ExitStack()
        self._direct_fds: dict[int, int | None] = {}
        self.refusals: list[str] = []
        """Why files are not read with O_DIRECT though a plan wanted it."""
        try:
            self.fds = [self._open_first(f) for f in files]
        except BaseException:
            self._stack.close()
            raise

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stack.close()

    def _open_first(self, file: FileFacts) -> int:
        try:
            fd = self._open(file.path, os.O_RDONLY)
        except FileNotFoundError as error:
            raise MissingFileError(f"{file.path} vanished before it could be read") from error
        except OSError as error:
            raise CheckpointError(f"{file.path} cannot be opened: {error.strerror}") from error
        if os.fstat(fd).st_size != file.nbytes:
            file.check_unchanged()
        return fd

    def _open(self, path: str, flags: int) -> int:
        fd = os.open(path, flags | os.O_CLOEXEC)
        self._stack.callback(os.close, fd)
        return fd

    def open_direct(self, file: int) -> bool:
        """Open a file for O_DIRECT, once; False where the file system refuses. Call before threads start."""
        if file not in self._direct_fds:
            try:
                self._direct_fds[file] = self._open(self._files[file].path, os.O_RDONLY | os.O_DIRECT)
            except OSError as error:
                self._refuse(file, error)
        return self._direct_fds[file] is not None

    def _refuse(self, file: int, error: OSError) -> None:
        self._direct_fds[file] = None
        self.refusals.append(f"O_DIRECT refused for {self._files[file].path}: {error.strerror}")

    def read(self, block: Block, view: memoryview) -> tuple[int, Way]:
        """Read a block into `view`; returns where in it the block begins, and the way it really took.

        `view` must be page-aligned memory and hold the block with both ends rounded to pages.
        """
        begin, way = self._read(block, view)
        if self._check is not None:
            self._check(block.file, block.start, block.end, view[begin : begin + block.nbytes])
        return begin, way

    def _read(self, block: Block, view: memoryview) -> tuple[int, Way]:
        if block.way is Way.DIRECT and (fd := self._direct_fds.get(block.file)) is not None:
            try:
                self._fill(fd, view, block.page_start, block.page_end, block, PAGE)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise self.failed(block.file, block.start, block.nbytes, error) from error
                self._refuse(block.file, error)
            else:
                return block.start - block.page_start, Way.DIRECT
        try:
            self._fill(self.fds[block.file], view, block.start, block.end, block, 1)
        except OSError as error:
            raise self.failed(block.file, block.start, block.nbytes, error) from error
        return 0, Way.BUFFERED

    def _fill(self, fd: int, view: memoryview, start: int, end: int, block: Block, step: int) -> None:
        """Read [start, end) of the file; the block's own end must be reached, the rounding beyond it need not.

        A short read goes on at a multiple of `step`; one that brings nothing new is the end of the file.
        """
        position = start
        while position < block.end:
            with view[position - start : end - start] as rest:
                reached = position + os.preadv(fd, [rest], position)
            if block.end <= reached:
                return
            resume = reached - reached % step
            if resume <= position:
                path = self._files[block.file].path
                raise CheckpointError(f"{path} ends at byte {reached}, {block.end} were expected: it was truncated")
            position = resume

    def failed(self, file: int, start: int, nbytes: int, error: OSError) -> CheckpointError:
        """The error for a range of a file that could not be read."""
        path = self._files[file].path
        now = os.fstat(self.fds[file]).st_size
        if now < start + nbytes and now < self._files[file].nbytes:
            return CheckpointError(f"{path} was truncated to {now} bytes while it was being loaded: load it again")
        return CheckpointError(f"{path}: reading {nbytes} bytes at {start} failed: {error.strerror}: check the disk")
