"""The seam of memory that several processes share: chunks behind descriptors, which any process of the user may map.

Whoever makes memory gets a descriptor for each of its chunks. The memory lives as long as one of these is open, in
whatever process, or as long as it is mapped anywhere: it outlives its maker, and a descriptor alone costs nothing.
Two implementations: files in memory for the CPU, the driver's memory objects for CUDA (`shared_cuda`).
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import weakref
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Protocol

from wan_loader.errors import HostMemoryError
from wan_loader.sizes import format_bytes
from wan_loader.system.machine import free_memory
from wan_loader.system.posix import PAGE, map_over, reserve_addresses, unmap

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

__all__ = ["CHUNK_BYTES", "HostSharedMemory", "SharedMemory", "SharedRange", "chunk_sizes"]

#: The most that one chunk holds: few descriptors, and no single one of them for all of a model.
CHUNK_BYTES = 4 << 30
#: Linux 5.1; Python knows it from 3.13 on.
_SEAL_FUTURE_WRITE = 0x10


class SharedRange:
    """Addresses of this process at which shared chunks lie, one behind the other.

    They stay mapped as long as anything refers to this object, as every tensor on it does.

    Args:
        address: The first of them.
        nbytes: Their number.
        tensor_at: Makes a flat tensor of bytes of an address, a length, and what it has to keep.
        close: Unmaps them.
    """

    def __init__(
        self,
        address: int,
        nbytes: int,
        tensor_at: Callable[[int, int, object], torch.Tensor],
        close: Callable[[], object],
    ) -> None:
        self.address = address
        self.nbytes = nbytes
        self._tensor_at = tensor_at
        self._stack = ExitStack()
        # not at the interpreter's exit: whoever has tensors may use them until the end
        weakref.finalize(self, self._stack.close).atexit = False
        self.on_close(close)

    def on_close(self, action: Callable[[], object]) -> None:
        """Have something done before the addresses are given back, the latest first."""
        self._stack.callback(action)

    def tensor(self, start: int, nbytes: int) -> torch.Tensor:
        """Return bytes of the range as a flat tensor, with a storage of its own that is just these."""
        assert 0 <= start <= start + nbytes <= self.nbytes
        return self._tensor_at(self.address + start, nbytes, self)


class SharedMemory(Protocol):
    """The shared memory of one device."""

    name: str
    """The name of the device, the same in every process of the machine."""
    alignment: int
    """Chunks are multiples of so many bytes."""

    def make(self, sizes: Sequence[int]) -> tuple[SharedRange, list[int]]:
        """Make chunks of these sizes, and map them to be written; return them, and a new descriptor of each."""

    def attach(self, fds: Sequence[int], sizes: Sequence[int]) -> SharedRange:
        """Map the chunks of descriptors, which are not kept. What is in them must not be changed, and may be shielded.

        Raises:
            OSError: A descriptor is none of such a chunk. Errors of the driver are those of `DeviceError`.
        """

    def free_nbytes(self) -> int | None:
        """Return how much memory is free; None where that is unknown."""

    def flush(self) -> None:
        """Return once what was written can be read by other processes."""


def chunk_sizes(nbytes: int, alignment: int, chunk_bytes: int = CHUNK_BYTES) -> list[int]:
    """Divide a number of bytes into chunks, the last of which is rounded up."""
    whole, rest = divmod(nbytes, chunk_bytes)
    return [chunk_bytes] * whole + ([-(-rest // alignment) * alignment] if rest else [])


class HostSharedMemory:
    """Memory of the host: files that have no name. Who attaches to them gets copies of the pages that he writes."""

    name = "cpu"
    alignment = PAGE

    def make(self, sizes: Sequence[int]) -> tuple[SharedRange, list[int]]:
        """As `SharedMemory.make`."""
        total, free = sum(sizes), free_memory()
        if free is not None and total > free:
            reason = f"{format_bytes(total)} are to be kept, and {format_bytes(free)} of memory are free"
            raise HostMemoryError.because(reason, "keep less, or end what else runs here")
        fds = list[int]()
        try:
            for size in sizes:
                fds.append(os.memfd_create("wan-loader-kept", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
                os.ftruncate(fds[-1], size)
            made = _mapped(fds, sizes, shared=True)
            for fd in fds:
                _seal(fd)
        except BaseException:
            for fd in fds:
                os.close(fd)
            raise
        return made, fds

    def attach(self, fds: Sequence[int], sizes: Sequence[int]) -> SharedRange:
        """As `SharedMemory.attach`."""
        for fd, size in zip(fds, sizes, strict=True):
            if os.fstat(fd).st_size != size:  # using what lies behind its end would end the process
                raise OSError("a chunk of kept memory is shorter than it should be")
        return _mapped(fds, sizes, shared=False)

    def free_nbytes(self) -> int | None:
        """As `SharedMemory.free_nbytes`."""
        return free_memory()

    def flush(self) -> None:
        """Do nothing: memory is memory."""


def _mapped(fds: Sequence[int], sizes: Sequence[int], *, shared: bool) -> SharedRange:
    total = sum(sizes)
    if not total:
        return SharedRange(0, 0, _bytes_at, lambda: None)
    start = reserve_addresses(total)
    made = SharedRange(start, total, _bytes_at, partial(unmap, start, total))
    for fd, size in zip(fds, sizes, strict=True):
        map_over(fd, size, start, shared=shared)
        start += size
    return made


def _bytes_at(address: int, nbytes: int, keeps: object) -> torch.Tensor:
    import torch

    if nbytes == 0:
        return torch.empty(0, dtype=torch.uint8, device="cpu")
    memory = (ctypes.c_char * nbytes).from_address(address)
    memory.keeps = keeps  # type: ignore[attr-defined]  # the tensor keeps the array, and so this
    return torch.frombuffer(memory, dtype=torch.uint8)


def _seal(fd: int) -> None:
    """Let nobody change a file any more, but who has mapped it already; an older kernel leaves that to good manners."""
    seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
    try:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals | _SEAL_FUTURE_WRITE)
    except OSError:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
