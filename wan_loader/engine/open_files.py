"""Reads of a checkpoint's files, with O_DIRECT or through the page cache: the bytes to ask for, and what came of it.

Carrying the reads out is another's business (`read_queue`). What is opened must be the file whose header was read; one
that is shorter than its header promised is an error that names it; a short read is continued.
"""

from __future__ import annotations

import errno
import os
from contextlib import ExitStack
from typing import TYPE_CHECKING, Protocol

from wan_loader.errors import CheckpointError, MissingFileError
from wan_loader.plan.blocks import Transport
from wan_loader.system.posix import OWN_MEMORY, PAGE

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

    from wan_loader.formats.checkpoint_facts import FileFacts
    from wan_loader.plan.blocks import Block


__all__ = ["BlockRead", "Check", "OpenFiles"]


class Check(Protocol):
    """A look at everything that was read."""

    block_bytes: int
    """The length of what is read together: reads are cut at its multiples, and nowhere else."""

    def __call__(self, file: int, start: int, end: int, view: memoryview) -> None:
        """Raise unless bytes `start` to `end` of a file are what they were."""


class OpenFiles:
    """The open files of one checkpoint; a context manager that closes them.

    Args:
        files: The files, as they were when their headers were read.
        check: Is given every block once it is in memory, and raises if it is not what it was.

    Raises:
        MissingFileError: A file is gone.
        CheckpointError: A file cannot be opened, or is another than the one whose header was read.
    """

    def __init__(self, files: Sequence[FileFacts], check: Check | None = None) -> None:
        self._files = files
        self._check = check
        self._stack = ExitStack()
        # None: refused, which is not asked again
        self._direct_fds: dict[int, int | None] = {}
        self.fallbacks: list[str] = []
        """Reasons why files are not read as the plan wanted."""
        try:
            self.fds = [self._open_first(f) for f in files]
        except BaseException:
            self._stack.close()
            raise

    def __enter__(self) -> OpenFiles:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stack.close()

    @property
    def is_own_memory(self) -> bool:
        """True if there is but one file, which shows this process its own memory."""
        return [file.path for file in self._files] == [OWN_MEMORY]

    def _open_first(self, file: FileFacts) -> int:
        try:
            fd = self._open(file.path, os.O_RDONLY)
        except FileNotFoundError as error:
            raise MissingFileError.because("vanished before it could be read", path=file.path) from error
        except OSError as error:
            raise CheckpointError(
                f"{file.path} cannot be opened: {error.strerror}", path=file.path, reason=error.strerror
            ) from error
        # by its descriptor: the name may mean another file by now
        file.check_opened(fd)
        return fd

    def _open(self, path: str, flags: int) -> int:
        fd = os.open(path, flags | os.O_CLOEXEC)
        self._stack.callback(os.close, fd)
        return fd

    def open_direct(self, file: int) -> bool:
        """Open a file for O_DIRECT, once; return False where the file system refuses."""
        if file not in self._direct_fds:
            try:
                fd = self._open(self._files[file].path, os.O_RDONLY | os.O_DIRECT)
            except OSError as error:
                self.refuse(file, error)
            else:
                self._files[file].check_opened(fd)
                self._direct_fds[file] = fd
        return self._direct_fds[file] is not None

    def direct_fd(self, file: int) -> int | None:
        """Return the descriptor for O_DIRECT, opened when it is first asked for; None if that is refused."""
        return self._direct_fds[file] if self.open_direct(file) else None

    def refuse(self, file: int, error: OSError) -> None:
        """Read a file without O_DIRECT from here on."""
        self._direct_fds[file] = None
        self.fallbacks.append(f"O_DIRECT refused for {self._files[file].path}: {error.strerror}")

    def check(self, block: Block, data: memoryview) -> None:
        """Give a block that is in memory to whoever wants to check it."""
        if self._check is not None:
            self._check(block.file, block.start, block.end, data)

    def truncated(self, block: Block, reached: int) -> CheckpointError:
        """Return the error for a file that ends inside a block."""
        path = self._files[block.file].path
        return CheckpointError.because(
            f"ends at byte {reached}, {block.end} were expected: it was truncated", path=path
        )

    def failed(self, file: int, start: int, nbytes: int, error: OSError) -> CheckpointError:
        """Return the error for bytes of a file that could not be read."""
        path = self._files[file].path
        now = os.fstat(self.fds[file]).st_size
        if now < start + nbytes and now < self._files[file].nbytes:
            return CheckpointError.because(
                f"was truncated to {now} bytes while it was being loaded", "load it again", path=path
            )
        return CheckpointError(
            f"{path}: reading {nbytes} bytes at {start} failed: {error.strerror}: check the disk",
            path=path,
            reason=error.strerror,
            remedy="check the disk",
        )


class BlockRead:
    """The reads that bring one block into memory: one, unless it comes back short or O_DIRECT is refused.

    They go into page-aligned memory that holds the block with both ends rounded to pages; the block begins at
    `data_start`.
    """

    __slots__ = ("_end", "_position", "_reader", "_start", "_step", "block", "fd", "transport")

    def __init__(self, reader: OpenFiles, block: Block) -> None:
        self._reader = reader
        self.block = block
        direct = reader.direct_fd(block.file) if block.transport is Transport.DIRECT else None
        self._begin(Transport.BUFFERED if direct is None else Transport.DIRECT)

    def _begin(self, transport: Transport) -> None:
        reader, block = self._reader, self.block
        self.transport = transport
        if transport is Transport.DIRECT:
            # O_DIRECT wants address, offset and length at multiples of the device's logical block: a page suits all
            self._start, self._end, self._step = block.page_start, block.page_end, PAGE
            fd = reader.direct_fd(block.file)
            assert fd is not None
        else:
            self._start, self._end, self._step = block.start, block.end, 1
            fd = reader.fds[block.file]
        self.fd = fd
        self._position = self._start

    @property
    def data_start(self) -> int:
        """The place in the memory where the block begins."""
        return self.block.start - self._start

    @property
    def wanted(self) -> tuple[int, int, int]:
        """The next read: its place in the memory, the number of bytes, its place in the file."""
        return self._position - self._start, self._end - self._position, self._position

    def arrived(self, nbytes: int) -> bool:
        """Take note of a read; return whether the block is complete: its own end must be reached, not the rounding's.

        After a short read, the next begins at a multiple of the step; one that brings nothing new is the file's end.

        Raises:
            CheckpointError: The file ends inside the block.
        """
        reached = self._position + nbytes
        # O_DIRECT reads beyond the block to the end of its last page, or to the end of the file
        if reached >= self.block.end:
            return True
        resume = reached - reached % self._step
        if resume <= self._position:
            raise self._reader.truncated(self.block, reached)
        self._position = resume
        return False

    def failed(self, error: OSError) -> None:
        """Begin again without O_DIRECT if that is what was refused, else raise `CheckpointError`."""
        # some file systems allow O_DIRECT to be opened, and refuse the first read
        if self.transport is not Transport.DIRECT or error.errno != errno.EINVAL:
            raise self._reader.failed(self.block.file, self.block.start, self.block.nbytes, error) from error
        if self._reader.direct_fd(self.block.file) is not None:
            self._reader.refuse(self.block.file, error)
        self._begin(Transport.BUFFERED)
