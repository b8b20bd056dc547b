"""Where weights end up: one ordinary storage per storage of the checkpoint, and the tensors on it.

`lay_out` decides (pure), an `Allocation` does, one portion after the other. On CUDA the whole amount is reserved as one
segment that the caching allocator then splits: allocation costs microseconds a tensor, yet each tensor owns its memory
and can be freed alone. On the CPU a tensor that needs no conversion is a private (copy-on-write) view of the mapped
file, which costs nothing; each view is a storage of its own.
"""

from __future__ import annotations

import math
import mmap
from collections import defaultdict
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

from wan_loader.devices.writer import Destination
from wan_loader.dtypes import ITEMSIZE, torch_dtype
from wan_loader.errors import CheckpointError, DeviceMemoryError, HostMemoryError
from wan_loader.formats.facts import contiguous_strides
from wan_loader.plan.blocks import ByteRange
from wan_loader.system.machine import available_memory, process_headrooms, processors
from wan_loader.system.posix import PAGE, trim_heap

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    import torch

    from wan_loader.formats.facts import Checkpoint, FileFacts, TensorFacts
    from wan_loader.plan.dtype_policy import DtypePolicy

__all__ = [
    "Allocation",
    "Layout",
    "StoragePlan",
    "check_host_memory",
    "check_memory",
    "convert_storage",
    "lay_out",
    "plan_storages",
]

_MAP_NORESERVE = 0x4000
_CUDA_ALIGNMENT = 512
_OWN_MAP_BYTES = 1 << 20
#: Host memory that a load takes beside weights and staging: what the libraries grow by when they are first used, ...
_GROWTH_BYTES = 28 << 20
#: ... stacks and heaps of one thread for each processor, and page tables.
_THREAD_BYTES = 512 << 10
_PAGE_TABLE_SHARE = 256
#: Staging is never smaller than one slot of the largest kind, and its page.
MIN_STAGING_BYTES = (16 << 20) + PAGE
_SMALL_POOL_BYTES = 1 << 20  # the caching allocator keeps smaller tensors in segments of their own


class StoragePlan(NamedTuple):
    """What becomes of one storage: its dtype in the file and its dtype once loaded, None where it is only bytes."""

    storage: int
    source: str | None
    target: str | None
    tensors: tuple[TensorFacts, ...]
    late: bool = False
    """Its tensors need different dtypes: each is converted after the load and no longer shares memory."""

    @property
    def dtype(self) -> str:
        """The dtype of its memory once loaded."""
        return self.target or "uint8"

    @property
    def converts(self) -> bool:
        """Whether bytes are converted on the way."""
        return self.source != self.target

    def nbytes_loaded(self, nbytes_file: int) -> int:
        """Bytes once loaded."""
        if self.source == self.target or self.source is None or self.target is None:
            return nbytes_file
        return nbytes_file // ITEMSIZE[self.source] * ITEMSIZE[self.target]


def plan_storages(tensors: Iterable[TensorFacts], rule: DtypePolicy) -> list[StoragePlan]:
    """Group tensors by the storage they share and decide its dtype, in the order in which storages are first named."""
    groups: dict[int, list[TensorFacts]] = defaultdict(list)
    for tensor in tensors:
        groups[tensor.storage].append(tensor)
    out = []
    for storage, group in groups.items():
        first = group[0]
        plan = StoragePlan(storage, first.dtype, rule.target(first.name, first.dtype), tuple(group))
        if len(group) > 1:
            pairs = {(t.dtype, rule.target(t.name, t.dtype)) for t in group}
            if len(pairs) > 1:
                plan = StoragePlan(storage, None, None, plan.tensors, any(a != b for a, b in pairs))
        out.append(plan)
    return out


@dataclass(frozen=True, slots=True)
class Layout:
    """What is copied and what is used where it lies, with sizes; nothing is allocated yet."""

    copied: tuple[StoragePlan, ...]
    copied_nbytes: tuple[int, ...]
    """Bytes once loaded, for each of `copied`."""
    byte_ranges: tuple[ByteRange, ...]
    """What must be read, in the wanted order; `Extent.storage` counts `copied`."""
    viewed: tuple[StoragePlan, ...]
    viewed_ranges: tuple[ByteRange, ...]
    warnings: tuple[str, ...] = ()

    @property
    def nbytes_read(self) -> int:
        """Bytes of the files that are wanted."""
        return sum(e.end - e.start for e in (*self.byte_ranges, *self.viewed_ranges))

    @property
    def nbytes_loaded(self) -> int:
        """Bytes once loaded."""
        return sum(self.copied_nbytes) + sum(e.end - e.start for e in self.viewed_ranges)


def lay_out(
    checkpoint: Checkpoint,
    plans: Sequence[StoragePlan],
    *,
    views: bool,
    reads: Mapping[int, tuple[int, int]] = MappingProxyType({}),
) -> Layout:
    """Decide for each storage. `views`: use the mapped file where neither dtype nor alignment stands against it.

    reads: storages of which only some bytes, from and to, are read; the others come from elsewhere.
    """
    viewed: list[StoragePlan] = []
    copied: list[StoragePlan] = []
    for plan in plans:
        (viewed if views and _can_view(checkpoint, plan) else copied).append(plan)
    misaligned = sum(not p.converts and not p.late for p in copied) if views else 0
    return Layout(
        tuple(copied),
        tuple(p.nbytes_loaded(checkpoint.storages[p.storage].nbytes) for p in copied),
        tuple(_extent(checkpoint, p, index, reads.get(p.storage)) for index, p in enumerate(copied)),
        tuple(viewed),
        tuple(_extent(checkpoint, p, -1) for p in viewed),
        (f"{misaligned} tensors are misaligned in the file: copied, not mapped",) if misaligned else (),
    )


def _can_view(checkpoint: Checkpoint, plan: StoragePlan) -> bool:
    start = checkpoint.storages[plan.storage].start
    return not plan.converts and not plan.late and all(start % ITEMSIZE[t.dtype] == 0 for t in plan.tensors)


def _extent(checkpoint: Checkpoint, plan: StoragePlan, index: int, part: tuple[int, int] | None = None) -> ByteRange:
    file, position, nbytes = checkpoint.storages[plan.storage]
    step = ITEMSIZE[plan.source] if plan.converts and plan.source else 1
    start, end = part or (0, nbytes)
    return ByteRange(index, file, position + start, position + end, step, start)


def check_memory(layout: Layout, device: torch.device, path: str, sharers: int = 1) -> int | None:
    """Raise `DeviceMemoryError` or `HostMemoryError` if what is copied cannot fit.

    sharers: processes of this machine that take as much of the host's memory at the same time. Returns how many bytes
    of the host's memory are left for all of their staging; None where that is unknown, or nothing is copied.
    """
    if device.type == "cuda":
        _check_device_memory(layout, device, path)
    if not any(byte_range.end > byte_range.start for byte_range in layout.byte_ranges):
        return None
    return check_host_memory(sum(layout.copied_nbytes) if device.type == "cpu" else 0, path, sharers)


def check_host_memory(nbytes: int, path: str, sharers: int = 1) -> int | None:
    """Raise `HostMemoryError` if weights of `nbytes` do not fit; else as `check_memory`."""
    beside = _GROWTH_BYTES + processors() * _THREAD_BYTES + nbytes // _PAGE_TABLE_SHARE
    needed = (nbytes + beside + MIN_STAGING_BYTES) * sharers
    if (free := _free_memory()) is not None and needed > free:
        trim_heap()
        free = _free_memory()
    if free is not None and needed > free:
        raise HostMemoryError(
            f"{path} needs {needed} bytes of memory, {(beside + MIN_STAGING_BYTES) * sharers} of them beside its "
            f"weights; {free} are available: free some memory"
        )
    return None if free is None else free - (nbytes + beside) * sharers


def _free_memory() -> int | None:
    """What this process may still allocate; None where that is unknown."""
    available = available_memory()
    return min([*process_headrooms().values(), *([] if available is None else [available])], default=None)


def _check_device_memory(layout: Layout, device: torch.device, path: str) -> None:
    import torch

    free, total = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    needed = sum(map(_rounded, layout.copied_nbytes))
    if needed > free:
        raise DeviceMemoryError(
            f"{path} needs {needed} bytes on {device}, {free} of {total} are free: ask for a smaller dtype or "
            "another device, or end what else runs there"
        )


def _rounded(nbytes: int) -> int:
    return -(-nbytes // _CUDA_ALIGNMENT) * _CUDA_ALIGNMENT


class Allocation:
    """Makes the tensors of a layout, in its order. About 3 microseconds each on the CPU.

    On CUDA, room for all is reserved before the first one is made: whether it suffices shows then.
    """

    def __init__(self, checkpoint: Checkpoint, layout: Layout, device: torch.device) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        """Those that were made; what is copied holds nothing yet."""
        self.destinations: list[Destination] = []
        """Where the bytes of each copied storage go."""
        self._checkpoint = checkpoint
        self._layout = layout
        self.device = device
        self._empty: dict[str, torch.Tensor] = {}

    def copied(self, count: int | None = None) -> list[Destination]:
        """Make what is to be copied, up to the first `count` storages or all; returns where the new ones are."""
        import torch

        start = len(self.destinations)
        try:
            if start == 0 and self.device.type == "cuda":
                _reserve_cuda(self._layout, self.device)
            for i in range(start, len(self._layout.copied) if count is None else count):
                self._make(self._layout.copied[i], self._layout.copied_nbytes[i])
        except RuntimeError as error:
            if self.device.type != "cpu" and not isinstance(error, torch.OutOfMemoryError):
                raise
            kind = HostMemoryError if self.device.type == "cpu" else DeviceMemoryError
            raise kind(  # somebody else was quicker than our check
                f"{self._checkpoint.path}: {self.device} has no room for its weights any more: {error}"
            ) from error
        return self.destinations[start:]

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
        """Make what is used where it lies. fds: the checkpoint's files, open for reading."""
        shared: dict[int, mmap.mmap] = {}
        for plan in self._layout.viewed:
            shape, sole = _shape(plan, self._checkpoint.storages[plan.storage].nbytes)
            flat = _view(self._checkpoint, plan.storage, torch_dtype(plan.dtype), fds, shared)
            self._name(plan, flat if len(shape) == 1 else flat.resize_(shape), sole)

    def _name(self, plan: StoragePlan, whole: torch.Tensor, sole: bool) -> None:
        """Name the tensors of a storage. sole: `whole`, which holds all of it, is the only one."""
        if sole:
            self.tensors[plan.tensors[0].name] = whole
            return
        import torch

        memory = whole.untyped_storage()
        for facts in plan.tensors:
            tensor = torch.empty(0, dtype=torch_dtype(plan.target or facts.dtype), device=whole.device)
            self.tensors[facts.name] = tensor.set_(memory, facts.offset, facts.shape, facts.stride)


def _shape(plan: StoragePlan, nbytes: int) -> tuple[tuple[int, ...], bool]:
    """Of the tensor that holds all of a loaded storage, and whether that is the only one on it."""
    first, count = plan.tensors[0], nbytes // ITEMSIZE[plan.dtype]
    sole = len(plan.tensors) == 1 and _n_from_start(first.shape, first.stride, first.offset) == count
    return (first.shape if sole else (count,)), sole


@lru_cache(maxsize=4096)
def _n_from_start(shape: tuple[int, ...], stride: tuple[int, ...], offset: int) -> int:
    """Elements of a tensor that lie row by row from the start of its storage, -1 if they do not."""
    return math.prod(shape) if offset == 0 and stride == contiguous_strides(shape) else -1


def _reserve_cuda(layout: Layout, device: torch.device) -> None:
    """Have the caching allocator hold one free segment that the tensors are then split from."""
    import torch

    large = sum(_rounded(n) for n in layout.copied_nbytes if n > _SMALL_POOL_BYTES)
    if large <= torch.cuda.mem_get_info(device)[0]:
        torch.empty(large, dtype=torch.uint8, device=device)  # freed at once: it stays with the allocator


def _view(
    checkpoint: Checkpoint, storage: int, dtype: torch.dtype, fds: Sequence[int], shared: dict[int, mmap.mmap]
) -> torch.Tensor:
    """The elements of a storage as a private mapping: written pages become copies, the file is never changed.

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
        raise CheckpointError(f"{file.path} cannot be mapped ({error}): load it with io='buffered'") from error


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
