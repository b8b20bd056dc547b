"""Slices of tensors: the bytes of the file that hold them, and nothing else. Pure.

A slice of a tensor is a view, as torch's basic indexing gives: another shape, other strides, another offset. From its
first element to its last it takes a contiguous range of bytes. `narrow` makes that range a storage of its own, so that
loads of slices are planned and carried out as all others. Of rows, the range is exactly their bytes; where other
dimensions are cut, it has elements between those that are wanted, which are loaded and left out afterwards.
"""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from wan_loader.dtypes import ITEMSIZE
from wan_loader.errors import KeyMismatchError, OptionError
from wan_loader.formats.checkpoint_facts import StorageFacts, TensorFacts, contiguous_strides
from wan_loader.formats.known_formats import is_planned
from wan_loader.printable import some

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from wan_loader.formats.checkpoint_facts import Checkpoint

__all__ = ["alone", "check_names", "narrow", "view"]


def view(facts: TensorFacts, index: Iterable[Any]) -> TensorFacts:
    """Return the part of a tensor that an index picks: the facts of a view of the same storage.

    Args:
        facts: The tensor.
        index: For each of the first dimensions a slice, as Python's: bounds may be negative, or beyond the end; or a
            number, which takes the dimension away.

    Raises:
        IndexError: There are more than the tensor has dimensions, or a number is out of bounds.
        OptionError: A step is not positive.
    """
    dims = tuple(index)
    if len(dims) > len(facts.shape):
        raise IndexError(f"too many indices for a tensor of {len(facts.shape)} dimensions")
    shape: list[int] = []
    stride: list[int] = []
    offset = facts.offset
    for dim, size, step in zip(dims, facts.shape, facts.stride, strict=False):
        if isinstance(dim, slice):
            if dim.step is not None and operator.index(dim.step) < 1:
                raise OptionError.because(f"step {dim.step} in a slice", "use a positive one, and flip what is loaded")
            picked = range(*dim.indices(size))
            first = picked.start
            shape.append(len(picked))
            stride.append(step * picked.step)
        else:
            first = operator.index(dim)
            if not -size <= first < size:
                raise IndexError(f"index {first} is out of bounds for a dimension of size {size}")
            first %= size
        offset += first * step
    rest = len(dims)
    return facts._replace(shape=(*shape, *facts.shape[rest:]), stride=(*stride, *facts.stride[rest:]), offset=offset)


def alone(facts: TensorFacts, storage: StorageFacts, number: int) -> tuple[StorageFacts, TensorFacts]:
    """Give a tensor a storage of its own: the bytes of its present storage from its first element to its last.

    Args:
        facts: The tensor.
        storage: Its present storage.
        number: The number of the new storage.
    """
    shape, stride, itemsize = facts.shape, facts.stride, ITEMSIZE[facts.dtype]
    if 0 in shape:  # where it would begin may be beyond the end of the file
        return storage._replace(nbytes=0), facts._replace(storage=number, offset=0, stride=contiguous_strides(shape))
    span = 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    start = storage.start + facts.offset * itemsize
    return StorageFacts(storage.file, start, span * itemsize), facts._replace(storage=number, offset=0)


def check_names(checkpoint: Checkpoint, slices: Mapping[str, object]) -> None:
    """Raise `KeyMismatchError` for names that are not in the checkpoint."""
    held = set(checkpoint.names)
    if missing := [name for name in slices if name not in held]:
        message = f"{checkpoint.path} lacks {len(missing)} of the names in slices: {some(missing)}"
        raise KeyMismatchError(message, missing=missing, path=checkpoint.path)


def narrow(checkpoint: Checkpoint, slices: Mapping[str, tuple[slice, ...]]) -> Checkpoint:
    """Return a checkpoint that has slices in the place of some tensors, each with a storage of its own.

    A tensor that shares its storage with others no longer does once it is sliced; the others still have all of it. Of
    a checkpoint that cannot be planned nothing is known but sizes: it stays as it is, and so do quantised tensors of
    which numbers are made.

    Args:
        checkpoint: The checkpoint.
        slices: For each name, a slice for each of the tensor's first dimensions.

    Raises:
        KeyMismatchError: Names are not there.
        OptionError: A tensor has fewer dimensions than there are slices for it.
    """
    if not slices:
        return checkpoint
    check_names(checkpoint, slices)
    storages, tensors = list(checkpoint.storages), list(checkpoint.tensors)
    for number, facts in enumerate(tensors):
        if (index := slices.get(facts.name)) is None:
            continue
        try:
            part = view(facts, index)
        except (IndexError, OptionError) as error:
            raise OptionError(f"slices[{facts.name!r}]: {error}", tensor=facts.name, reason=str(error)) from None
        if (quantised := checkpoint.quantised.get(facts.name)) is not None and facts == quantised.value:
            continue  # its rows are made of whole blocks: it is cut once it is made
        storage, tensors[number] = alone(part, storages[facts.storage], len(storages))
        storages.append(storage)
    if not is_planned(checkpoint):
        return checkpoint
    return replace(checkpoint, storages=tuple(storages), tensors=tuple(tensors))
