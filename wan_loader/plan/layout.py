"""The layout of a load: the fate of each storage of a checkpoint, and the bytes of it that are read. Pure.

A storage of the file becomes one ordinary storage in memory. On the CPU a tensor that needs no conversion may instead
be a private view of the mapped file, which costs nothing.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

from wan_loader.dtypes import ITEMSIZE
from wan_loader.plan.blocks import ByteRange

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from wan_loader.formats.checkpoint_facts import Checkpoint, TensorFacts
    from wan_loader.plan.dtype_policy import DtypePolicy

__all__ = ["Layout", "StoragePlan", "lay_out", "plan_storages", "storage_ranges"]


class StoragePlan(NamedTuple):
    """The fate of one storage: its dtype in the file and its dtype once loaded, None where it is only bytes."""

    storage: int
    source: str | None
    target: str | None
    tensors: tuple[TensorFacts, ...]
    late: bool = False
    """True if its tensors need different dtypes: each is converted after the load and no longer shares memory."""

    @property
    def dtype(self) -> str:
        """The dtype of its memory once loaded."""
        return self.target or "uint8"

    @property
    def converts(self) -> bool:
        """True if bytes are converted on the way."""
        return self.source != self.target

    def nbytes_loaded(self, nbytes_file: int) -> int:
        """Return the bytes that a storage of `nbytes_file` has once loaded."""
        if self.source == self.target or self.source is None or self.target is None:
            return nbytes_file
        return nbytes_file // ITEMSIZE[self.source] * ITEMSIZE[self.target]


def plan_storages(tensors: Iterable[TensorFacts], policy: DtypePolicy) -> list[StoragePlan]:
    """Group tensors by the storage they share and decide its dtype, in the order in which storages are first named."""
    groups: dict[int, list[TensorFacts]] = defaultdict(list)
    for tensor in tensors:
        groups[tensor.storage].append(tensor)
    out = []
    for storage, group in groups.items():
        first = group[0]
        plan = StoragePlan(storage, first.dtype, policy.target(first.name, first.dtype), tuple(group))
        if len(group) > 1:
            pairs = {(t.dtype, policy.target(t.name, t.dtype)) for t in group}
            # read as plain bytes: no single dtype describes this memory while it is filled
            if len(pairs) > 1:
                plan = StoragePlan(storage, None, None, plan.tensors, any(a != b for a, b in pairs))
        out.append(plan)
    return out


def storage_ranges(checkpoint: Checkpoint, tensors: Iterable[TensorFacts]) -> list[ByteRange]:
    """Return the byte ranges of the storages that tensors lie in, once each."""
    storages = ((number, checkpoint.storages[number]) for number in dict.fromkeys(t.storage for t in tensors))
    return [ByteRange(number, s.file, s.start, s.start + s.nbytes) for number, s in storages]


@dataclass(frozen=True, slots=True)
class Layout:
    """The storages that are copied and those that are used where they lie, with sizes; nothing is allocated yet."""

    copied: tuple[StoragePlan, ...]
    copied_nbytes: tuple[int, ...]
    """The bytes once loaded, for each of `copied`."""
    byte_ranges: tuple[ByteRange, ...]
    """The bytes that must be read, in the wanted order; `ByteRange.storage` counts `copied`."""
    viewed: tuple[StoragePlan, ...]
    viewed_ranges: tuple[ByteRange, ...]
    warnings: tuple[str, ...] = ()

    @property
    def nbytes_read(self) -> int:
        """The bytes of the files that are wanted."""
        return sum(r.end - r.start for r in (*self.byte_ranges, *self.viewed_ranges))

    @property
    def nbytes_viewed(self) -> int:
        """The bytes that are used where they lie in the file."""
        return sum(r.end - r.start for r in self.viewed_ranges)

    @property
    def nbytes_converted(self) -> int:
        """The bytes of the files that are converted on the way."""
        return sum(r.end - r.start for r in self.byte_ranges if self.copied[r.storage].converts)

    @property
    def nbytes_loaded(self) -> int:
        """The bytes once loaded."""
        return sum(self.copied_nbytes) + self.nbytes_viewed


def lay_out(
    checkpoint: Checkpoint,
    plans: Sequence[StoragePlan],
    *,
    views: bool,
    to_cut: Collection[str] = (),
    reads: Mapping[int, tuple[int, int]] = MappingProxyType({}),
) -> Layout:
    """Decide for each storage whether it is copied or viewed.

    Args:
        checkpoint: The checkpoint that the storages are of.
        plans: The storages.
        views: Use the mapped file where neither dtype nor alignment stands against it.
        to_cut: Names of tensors that are copied, even so.
        reads: Storages of which only some bytes, from and to, are read; the others come from elsewhere.
    """
    viewed: list[StoragePlan] = []
    copied: list[StoragePlan] = []
    for plan in plans:
        stays = views and _can_view(checkpoint, plan) and plan.tensors[0].name not in to_cut
        (viewed if stays else copied).append(plan)
    # kernels rely on elements that begin at multiples of their size: other views would be refused
    misaligned = sum(not p.converts and not p.late and p.tensors[0].name not in to_cut for p in copied) if views else 0
    return Layout(
        tuple(copied),
        tuple(p.nbytes_loaded(checkpoint.storages[p.storage].nbytes) for p in copied),
        tuple(_byte_range(checkpoint, p, index, reads.get(p.storage)) for index, p in enumerate(copied)),
        tuple(viewed),
        tuple(_byte_range(checkpoint, p, -1) for p in viewed),
        (f"{misaligned} tensors are misaligned in the file: copied, not mapped",) if misaligned else (),
    )


def _can_view(checkpoint: Checkpoint, plan: StoragePlan) -> bool:
    start = checkpoint.storages[plan.storage].start
    return not plan.converts and not plan.late and all(start % ITEMSIZE[t.dtype] == 0 for t in plan.tensors)


def _byte_range(
    checkpoint: Checkpoint, plan: StoragePlan, index: int, only: tuple[int, int] | None = None
) -> ByteRange:
    file, position, nbytes = checkpoint.storages[plan.storage]
    step = ITEMSIZE[plan.source] if plan.converts and plan.source else 1
    start, end = only or (0, nbytes)
    return ByteRange(index, file, position + start, position + end, step, start)
