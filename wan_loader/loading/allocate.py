"""The memory that weights end up in: one ordinary storage per storage of the checkpoint, and its tensors.

The layout was decided before (`plan.layout`); an `Allocation` makes it, one batch after the other. On CUDA the whole
amount is reserved as two blocks of device memory that the caching allocator then splits: allocation costs microseconds
a tensor, yet each tensor owns its memory and can be freed alone. On the CPU a tensor that needs no conversion is a
private (copy-on-write) view of the mapped file, which costs nothing; each view is a storage of its own.
"""

from __future__ import annotations

import math
import mmap
from functools import lru_cache
from typing import TYPE_CHECKING

from wan_loader.devices.writer import Destination
from wan_loader.dtypes import ITEMSIZE, torch_dtype
from wan_loader.errors import CheckpointError, DeviceMemoryError, HostMemoryError
from wan_loader.formats.checkpoint_facts import contiguous_strides
from wan_loader.plan.engine_settings import conversion_bytes
from wan_loader.plan.memory import rounded
from wan_loader.system.posix import PAGE

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from wan_loader.formats.checkpoint_facts import Checkpoint, FileFacts
    from wan_loader.plan.layout import StoragePlan
    from wan_loader.plan.plan import LoadPlan

__all__ = ["Allocation", "convert_storage"]

_MAP_NORESERVE = 0x4000
_OWN_MAP_BYTES = 1 << 20
_SMALL_POOL_BYTES = 1 << 20  # the caching allocator keeps smaller tensors in segments of their own


class Allocation:
    """The tensors of a layout, made in its order. About 3 microseconds each on the CPU.

    On CUDA, room is reserved twice: for the first ones, so that their bytes need not wait for 5 ms, and for all others
    while those arrive.
    """

    def __init__(self, plan: LoadPlan, device: torch.device) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        """The tensors that were made, by name; what is copied holds nothing yet."""
        self.destinations: list[Destination] = []
        """The places of the bytes of each copied storage."""
        self._checkpoint = plan.checkpoint
        self._layout = plan.layout
        self._converting_nbytes = conversion_bytes(plan.layout.nbytes_converted, plan.blocks.nbytes)
        self.device = device
        self._empty: dict[str, torch.Tensor] = {}
        self._is_reserved = False

    def copied(self, count: int | None = None) -> list[Destination]:
        """Make what is to be copied, up to the first `count` storages or all; return where the new ones are.

        Raises:
            HostMemoryError: The host has no room any more.
            DeviceMemoryError: The device has no room any more.
        """
        import torch

        start, sizes = len(self.destinations), self._layout.copied_nbytes
        end = len(sizes) if count is None else count
        try:
            if self.device.type == "cuda" and not self._is_reserved:
                self._reserve(sizes[:end] if start == 0 else sizes[start:], first=start == 0 and end < len(sizes))
            for i in range(start, end):
                self._make(self._layout.copied[i], sizes[i])
        except RuntimeError as error:
            # host memory that is not there is a plain RuntimeError of torch's
            if self.device.type != "cpu" and not isinstance(error, torch.OutOfMemoryError):
                raise
            kind = HostMemoryError if self.device.type == "cpu" else DeviceMemoryError
            raise kind(  # somebody else was quicker than our check
                f"{self._checkpoint.path}: {self.device} has no room for its weights any more: {error}",
                path=self._checkpoint.path,
                reason=str(error),
            ) from error
        return self.destinations[start:]

    def _reserve(self, sizes: Sequence[int], *, first: bool) -> None:
        """Have the caching allocator hold one free block of memory that tensors are then split from."""
        import torch

        large = sum(rounded(n) for n in sizes if n > _SMALL_POOL_BYTES)
        if not first:
            self._is_reserved = True
            large += self._converting_nbytes
        # else what the allocator keeps and does not use must do as well: the tensors are allocated one by one
        if large <= torch.cuda.mem_get_info(self.device)[0]:
            torch.empty(large, dtype=torch.uint8, device=self.device)  # freed at once: it stays with the allocator

    def _make(self, plan: StoragePlan, nbytes: int) -> None:
        shape, sole = _shape(plan, nbytes)
        if (empty := self._empty.get(plan.dtype)) is None:
            import torch

            empty = self._empty[plan.dtype] = torch.empty(0, dtype=torch_dtype(plan.dtype), device=self.device)
        whole = empty.new_empty(shape)  # a quarter faster than `torch.empty`
        self._name(plan, whole, sole)
        source = torch_dtype(plan.source) if plan.converts and plan.source else None
        self.destinations.append(Destination(whole, whole.data_ptr(), source))

    def viewed(self, fds: Sequence[int]) -> None:
        """Make what is used where it lies. `fds` are the checkpoint's files, open for reading."""
        shared: dict[int, mmap.mmap] = {}
        for plan in self._layout.viewed:
            shape, sole = _shape(plan, self._checkpoint.storages[plan.storage].nbytes)
            flat = _view(self._checkpoint, plan.storage, torch_dtype(plan.dtype), fds, shared)
            self._name(plan, flat if len(shape) == 1 else flat.resize_(shape), sole)

    def _name(self, plan: StoragePlan, whole: torch.Tensor, sole: bool) -> None:
        """Name the tensors of a storage. `sole`: `whole`, which holds all of it, is the only one."""
        if sole:
            self.tensors[plan.tensors[0].name] = whole
            return
        import torch

        memory = whole.untyped_storage()
        for facts in plan.tensors:
            tensor = torch.empty(0, dtype=torch_dtype(plan.target or facts.dtype), device=whole.device)
            self.tensors[facts.name] = tensor.set_(memory, facts.offset, facts.shape, facts.stride)


def _shape(plan: StoragePlan, nbytes: int) -> tuple[tuple[int, ...], bool]:
    """Return the shape of the tensor that holds all of a loaded storage, and whether that is the only one on it."""
    first, count = plan.tensors[0], nbytes // ITEMSIZE[plan.dtype]
    sole = len(plan.tensors) == 1 and _n_from_start(first.shape, first.stride, first.offset) == count
    return (first.shape if sole else (count,)), sole


@lru_cache(maxsize=4096)
def _n_from_start(shape: tuple[int, ...], stride: tuple[int, ...], offset: int) -> int:
    """Return the elements of a tensor that lie row by row from the start of its storage, -1 if they do not."""
    return math.prod(shape) if offset == 0 and stride == contiguous_strides(shape) else -1


def _view(
    checkpoint: Checkpoint, storage: int, dtype: torch.dtype, fds: Sequence[int], shared: dict[int, mmap.mmap]
) -> torch.Tensor:
    """Return the elements of a storage as a private mapping: written pages become copies, the file is never changed.

    Each has a mapping of its own, so that freeing it frees the pages that were written; small ones share one a file.
    """
    import torch

    facts = checkpoint.storages[storage]
    file = checkpoint.files[facts.file]
    if facts.nbytes == 0:
        return torch.empty(0, dtype=dtype)
    count = facts.nbytes // dtype.itemsize
    if facts.nbytes >= _OWN_MAP_BYTES:
        start = facts.start // PAGE * PAGE
        mapping = _map_private(fds[facts.file], start, facts.start + facts.nbytes - start, file)
        return torch.frombuffer(mapping, dtype=dtype, count=count, offset=facts.start - start)
    if facts.file not in shared:
        shared[facts.file] = _map_private(fds[facts.file], 0, file.nbytes, file)
    return torch.frombuffer(shared[facts.file], dtype=dtype, count=count, offset=facts.start)


def _map_private(fd: int, start: int, nbytes: int, file: FileFacts) -> mmap.mmap:
    try:
        return mmap.mmap(fd, nbytes, mmap.MAP_PRIVATE | _MAP_NORESERVE, mmap.PROT_READ | mmap.PROT_WRITE, offset=start)
    except (ValueError, OSError) as error:
        file.check_unchanged()
        raise CheckpointError.because(
            f"cannot be mapped ({error})", "load it with io='buffered'", path=file.path
        ) from error


def convert_storage(tensors: dict[str, torch.Tensor], plan: StoragePlan) -> None:
    """Convert loaded tensors that share a storage, so that they share the converted one."""
    import torch

    if plan.source is None or plan.target is None:
        return
    memory = tensors[plan.tensors[0].name].untyped_storage()
    old = torch.empty(0, dtype=torch_dtype(plan.source), device=memory.device).set_(memory)
    new = old.to(torch_dtype(plan.target)).untyped_storage()
    for facts in plan.tensors:
        tensor = torch.empty(0, dtype=torch_dtype(plan.target), device=memory.device)
        tensors[facts.name] = tensor.set_(new, facts.offset, facts.shape, facts.stride)
