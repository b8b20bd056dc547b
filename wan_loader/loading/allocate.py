"""The memory that weights end up in: one ordinary storage per storage of the checkpoint, and its tensors.

The layout was decided before (`plan.layout`); an `Allocation` makes it, one batch after the other. On CUDA the whole
amount is reserved in blocks of a gigabyte that the caching allocator then splits: allocation costs microseconds a
tensor, yet each tensor owns its memory and can be freed alone. On the CPU a tensor that needs no conversion is a
private (copy-on-write) view of the mapped file, which costs nothing; each view is a storage of its own.
"""

from __future__ import annotations

import ctypes
import math
from functools import lru_cache
from typing import TYPE_CHECKING

from wan_loader.devices.torch_threads import UNDIVIDED
from wan_loader.devices.writer import Destination
from wan_loader.dtypes import ITEMSIZE, torch_dtype
from wan_loader.errors import CheckpointError, DeviceMemoryError, HostMemoryError
from wan_loader.formats.checkpoint_facts import contiguous_strides
from wan_loader.plan.engine_settings import conversion_bytes
from wan_loader.plan.memory import rounded
from wan_loader.plan.quantised_values import parts_of
from wan_loader.system.forks import is_forked
from wan_loader.system.posix import PAGE, map_private

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    import torch

    from wan_loader.formats.checkpoint_facts import FileFacts, StorageFacts
    from wan_loader.plan.layout import StoragePlan
    from wan_loader.plan.plan import LoadPlan

__all__ = ["OWN_MAP_BYTES", "Allocation", "MappedMemory", "compact", "convert_storage", "view_storage"]

#: Views from this size on have a mapping of their own; smaller ones share one a file.
OWN_MAP_BYTES = 1 << 20
#: Reserved at once: 0.2 ms.
_RESERVED_BYTES = 1 << 30
#: The same, in blocks, where what has arrived is let go of: about what is on its way.
_RESERVED_BLOCKS = 8
_SMALL_POOL_BYTES = 1 << 20  # the caching allocator keeps smaller tensors in segments of their own

#: Mapped pages, for the buffer protocol.
MappedMemory = ctypes.Array[ctypes.c_char]


class Allocation:
    """The tensors of a layout, made in its order. About 3 microseconds each on the CPU.

    On CUDA, room is reserved for many at once, but first for the first ones alone, whose bytes need not wait then.

    Args:
        plan: The plan of the load.
        device: Its device.
        memory: Makes the memory of a copied storage: a flat tensor of so many bytes, on a storage that is just these;
            None: it is torch's own.
    """

    def __init__(
        self, plan: LoadPlan, device: torch.device, memory: Callable[[int], torch.Tensor] | None = None
    ) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        """The tensors that were made, by name; what is copied holds nothing yet."""
        self.destinations: list[Destination] = []
        """The places of the bytes of each copied storage."""
        self._checkpoint = plan.checkpoint
        self._layout = plan.layout
        self._converting_nbytes = conversion_bytes(plan.layout.nbytes_converted, plan.blocks.nbytes)
        """Device memory that conversions take meanwhile, until it is reserved."""
        self._memory = memory
        self._n_reserved = 0
        self._refers = not plan.request.piecemeal
        """True if destinations hold their memory; else only the tensors do, so that it goes when they are let go of."""
        self._reserved_nbytes = _RESERVED_BYTES if self._refers else _RESERVED_BLOCKS * plan.blocks.nbytes
        self.device = device
        self._empty: dict[str, torch.Tensor] = {}
        self._let_go = {part.name for one in plan.values.values() for part in parts_of(one)}
        """The tensors that go as soon as numbers are made of them."""

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
            if self.device.type == "cuda" and end > self._n_reserved and self._memory is None:
                self._reserve(end)
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

    def _reserve(self, end: int) -> None:
        """Have the caching allocator hold free memory that storages up to `end`, or more, are split from."""
        import torch

        sizes, start, total = self._layout.copied_nbytes, self._n_reserved, 0
        while self._n_reserved < len(sizes) and (self._n_reserved < end or (start and total < self._reserved_nbytes)):
            nbytes = sizes[self._n_reserved]
            total += rounded(nbytes) if nbytes > _SMALL_POOL_BYTES else 0
            self._n_reserved += 1
        if start or self._n_reserved == len(sizes):
            total, self._converting_nbytes = total + self._converting_nbytes, 0
        # else what the allocator keeps and does not use must do as well: the tensors are allocated one by one
        if total <= torch.cuda.mem_get_info(self.device)[0]:
            torch.empty(total, dtype=torch.uint8, device=self.device)  # freed at once: it stays with the allocator

    def _make(self, plan: StoragePlan, nbytes: int) -> None:
        shape, sole = _shape(plan, nbytes)
        if (empty := self._empty.get(plan.dtype)) is None:
            import torch

            empty = self._empty[plan.dtype] = torch.empty(0, dtype=torch_dtype(plan.dtype), device=self.device)
        if self._memory is not None:
            whole = self._memory(nbytes).view(empty.dtype).view(shape)
        else:
            whole = empty.new_empty(shape)  # a quarter faster than `torch.empty`
        self._name(plan, whole, sole)
        source = torch_dtype(plan.source) if plan.converts and plan.source else None
        refers = self._refers and plan.tensors[0].name not in self._let_go
        self.destinations.append(self._destination(whole, source, refers=refers))

    def _destination(self, whole: torch.Tensor, source: torch.dtype | None, *, refers: bool) -> Destination:
        address = whole.data_ptr()
        if refers or (source is not None and self.device.type != "cpu"):
            return Destination(whole, address, source)
        # bytes that stay as they are go to an address, conversions into a tensor
        return Destination(None if source is None else _unowned(whole), address, source)

    def taken(self, names: Iterable[str], *, keeps: bool) -> dict[str, torch.Tensor]:
        """Return tensors by name, and keep them as well or not."""
        take = self.tensors.__getitem__ if keeps else self.tensors.pop
        return {name: take(name) for name in names}

    def let_go(self) -> bool:
        """Keep no tensor any longer; return True: it is done."""
        self.tensors.clear()
        return True

    def viewed(self, fds: Sequence[int]) -> None:
        """Make what is used where it lies. `fds` are the checkpoint's files, open for reading."""
        shared: dict[int, MappedMemory] = {}
        for plan in self._layout.viewed:
            facts = self._checkpoint.storages[plan.storage]
            shape, sole = _shape(plan, facts.nbytes)
            flat = view_storage(facts, self._checkpoint.files[facts.file], torch_dtype(plan.dtype), fds, shared)
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


def _unowned(whole: torch.Tensor) -> torch.Tensor:
    """Return a flat tensor on the same host memory that does not keep it."""
    import torch

    if not whole.nbytes:
        return torch.empty(0, dtype=whole.dtype)
    memory = (ctypes.c_char * whole.nbytes).from_address(whole.data_ptr())
    return torch.frombuffer(memory, dtype=whole.dtype)


def _shape(plan: StoragePlan, nbytes: int) -> tuple[tuple[int, ...], bool]:
    """Return the shape of the tensor that holds all of a loaded storage, and whether that is the only one on it."""
    first, count = plan.tensors[0], nbytes // ITEMSIZE[plan.dtype]
    sole = len(plan.tensors) == 1 and _n_from_start(first.shape, first.stride, first.offset) == count
    return (first.shape if sole else (count,)), sole


@lru_cache(maxsize=4096)
def _n_from_start(shape: tuple[int, ...], stride: tuple[int, ...], offset: int) -> int:
    """Return the elements of a tensor that lie row by row from the start of its storage, -1 if they do not."""
    return math.prod(shape) if offset == 0 and stride == contiguous_strides(shape) else -1


def view_storage(
    facts: StorageFacts,
    file: FileFacts,
    dtype: torch.dtype,
    fds: Sequence[int],
    shared: dict[int, MappedMemory],
) -> torch.Tensor:
    """Return the elements of a storage as a private mapping: written pages become copies, the file is never changed.

    Each has a mapping of its own, so that freeing it frees the pages that were written; small ones share one a file.
    """
    import torch

    if facts.nbytes == 0:
        return torch.empty(0, dtype=dtype)
    count = facts.nbytes // dtype.itemsize
    if facts.nbytes >= OWN_MAP_BYTES:
        start = facts.start // PAGE * PAGE
        mapping = _map_private(fds[facts.file], start, facts.start + facts.nbytes - start, file)
        return torch.frombuffer(mapping, dtype=dtype, count=count, offset=facts.start - start)
    if facts.file not in shared:
        shared[facts.file] = _map_private(fds[facts.file], 0, file.nbytes, file)
    return torch.frombuffer(shared[facts.file], dtype=dtype, count=count, offset=facts.start)


def _map_private(fd: int, start: int, nbytes: int, file: FileFacts) -> MappedMemory:
    try:
        return map_private(fd, start, nbytes)
    except OSError as error:
        file.check_unchanged()
        raise CheckpointError.because(
            f"cannot be mapped ({error})", "load it with io='buffered'", path=file.path
        ) from error


def compact(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor without what lies between its elements: itself, if there is nothing."""
    import torch

    if tensor.is_contiguous() or tensor.is_cuda or not is_forked():
        return tensor.contiguous()
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
    _copy_undivided(copy, tensor)
    return copy


def _copy_undivided(to: torch.Tensor, source: torch.Tensor) -> None:
    """Copy so little at a time that torch does not divide it: in a forked process it waits for threads of its own."""
    if source.numel() <= UNDIVIDED or source.dim() == 1:
        for some_to, some in zip(to.split(UNDIVIDED), source.split(UNDIVIDED), strict=True):
            some_to.copy_(some)
    else:
        for row_to, row in zip(to, source, strict=True):
            _copy_undivided(row_to, row)


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
