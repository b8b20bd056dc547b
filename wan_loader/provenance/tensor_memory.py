"""The memory of a tensor, as torch tells: the bytes from its first element to its last."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, NamedTuple

from wan_loader.dtypes import ITEMSIZE
from wan_loader.provenance.proof import Reason

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

__all__ = ["TensorMemory", "is_sole_memory", "memory_of"]


class TensorMemory(NamedTuple):
    """Where a tensor lies: `nbytes` from its first element to its last, with what lies between them."""

    address: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def end(self) -> int:
        """The address behind the last element."""
        return self.address + self.nbytes


def memory_of(tensor: torch.Tensor) -> TensorMemory | Reason:
    """Return where a tensor lies. Costs about 4 microseconds; no element is read.

    Returns:
        A reason for a tensor whose values are not simply the bytes of its memory: a subclass, another device, sparse,
        quantised, lazily conjugated or negated; and for one without elements.
    """
    import torch

    if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        return Reason.NOT_PLAIN
    dtype = str(tensor.dtype).removeprefix("torch.")
    if tensor.device.type != "cpu" or tensor.layout != torch.strided or dtype not in ITEMSIZE:
        return Reason.NOT_PLAIN
    try:
        shape, stride, address = tuple(tensor.shape), tensor.stride(), tensor.data_ptr()
        if tensor.is_conj() or tensor.is_neg():
            return Reason.NOT_PLAIN
    except RuntimeError:  # what transforms of functions wrap has no memory of its own
        return Reason.NOT_PLAIN
    if 0 in shape:
        return Reason.EMPTY
    if not address:
        return Reason.NOT_PLAIN
    span = 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    return TensorMemory(address, span * ITEMSIZE[dtype], dtype, shape, stride)


def is_sole_memory(tensor: torch.Tensor, also: Callable[[torch.Tensor, torch.UntypedStorage], object]) -> bool:
    """Say whether nobody else refers to a tensor's memory: no view, no array, no storage object.

    What torch and Python count is compared with the counts of a tensor that is alone, made here.

    Args:
        tensor: A tensor.
        also: Returns what else must be as of that one, of a tensor and its storage.

    Returns:
        False where torch does not tell.
    """
    import torch

    if (count := getattr(torch._C, "_storage_Use_Count", None)) is None:
        return False

    def counts(tensor: torch.Tensor) -> tuple[object, ...]:
        storage = tensor.untyped_storage()
        return count(storage._cdata), sys.getrefcount(storage), also(tensor, storage)

    return counts(tensor) == counts(torch.empty(1))
