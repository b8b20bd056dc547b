"""Memory of a CUDA device that several processes share: memory objects of the driver, passed as descriptors.

The classic handles of CUDA IPC would do for reading, too, but their memory goes with the process that made it.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

from wan_loader.devices import driver
from wan_loader.devices import virtual_memory as memory
from wan_loader.devices.resolve import current
from wan_loader.devices.shared_memory import SharedRange
from wan_loader.errors import DeviceError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

__all__ = ["CudaSharedMemory"]


class CudaSharedMemory:
    """Memory of one CUDA device.

    Args:
        index: The number of the device in this process.

    Raises:
        DeviceError: Its memory cannot be shared by descriptors.
    """

    def __init__(self, index: int) -> None:
        if (reason := memory.why_not_shared(index)) is not None:
            raise DeviceError.because(f"memory of cuda:{index} cannot be kept: {reason}", "load without keeping")
        self.name = f"cuda:{memory.device_uuid(index)}"
        self.alignment = memory.granularity(index)
        self._index = index

    def make(self, sizes: Sequence[int]) -> tuple[SharedRange, list[int]]:
        """As `SharedMemory.make`."""
        fds = list[int]()
        try:
            with ExitStack() as handles, current(f"cuda:{self._index}"):
                made = list[int]()
                for size in sizes:
                    made.append(memory.create_memory(self._index, size))
                    handles.callback(memory.release_memory, made[-1])
                    fds.append(memory.export_memory(made[-1]))
                return self._mapped(made, sizes, writable=True), fds
        except BaseException:
            for fd in fds:
                os.close(fd)
            raise

    def attach(self, fds: Sequence[int], sizes: Sequence[int]) -> SharedRange:
        """As `SharedMemory.attach`."""
        with ExitStack() as handles, current(f"cuda:{self._index}"):
            taken = list[int]()
            for fd in fds:
                taken.append(memory.import_memory(fd))
                handles.callback(memory.release_memory, taken[-1])
            return self._mapped(taken, sizes, writable=False)

    def free_nbytes(self) -> int | None:
        """As `SharedMemory.free_nbytes`."""
        import torch

        return torch.cuda.mem_get_info(self._index)[0]

    def flush(self) -> None:
        """As `SharedMemory.flush`."""
        import torch

        torch.cuda.synchronize(self._index)

    def _mapped(self, handles: Sequence[int], sizes: Sequence[int], *, writable: bool) -> SharedRange:
        tensor_at: Callable[[int, int, object], torch.Tensor] = partial(_bytes_at, self._index)
        total = sum(sizes)
        if not total:
            return SharedRange(0, 0, tensor_at, lambda: None)
        start, mapped = memory.reserve_addresses(total), list[tuple[int, int]]()
        close = partial(_close, start, total, mapped, driver.current_context(), os.getpid())
        made = SharedRange(start, total, tensor_at, close)
        place = start
        for handle, size in zip(handles, sizes, strict=True):
            memory.map_memory(place, size, handle)
            mapped.append((place, size))
            memory.allow_access(place, size, self._index, writable=writable)
            place += size
        return made


def _close(start: int, total: int, mapped: Sequence[tuple[int, int]], context: int, pid: int) -> None:
    """Unmap chunks once the device has no work left; where that cannot be waited for, they stay until the end."""
    if os.getpid() != pid:  # in a fork there is no CUDA
        return
    with driver.within(context):
        if memory.synchronize():
            left = [place for place in mapped if not memory.unmap_memory(*place)]
            if not left:
                memory.free_addresses(start, total)


class _DeviceBytes:
    """Bytes of a device for torch, which keeps this object as long as a tensor is on them."""

    def __init__(self, address: int, nbytes: int, keeps: object) -> None:
        self._keeps = keeps
        self.__cuda_array_interface__: dict[str, Any] = {
            "data": (address, False),
            "shape": (nbytes,),
            "typestr": "|u1",
            "version": 3,
        }


def _bytes_at(index: int, address: int, nbytes: int, keeps: object) -> torch.Tensor:
    import torch

    if nbytes == 0:
        return torch.empty(0, dtype=torch.uint8, device=f"cuda:{index}")
    return torch.as_tensor(_DeviceBytes(address, nbytes, keeps), device=torch.device("cuda", index))
