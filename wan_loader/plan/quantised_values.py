"""Quantised tensors in a plan: what is read for them, as what, and how much memory their numbers take. Pure.

What the file holds of them travels as it is; numbers are made on the device, tensor by tensor, as soon as all of one
has arrived (`loading.make_values`). Then its blocks go, so the peak is that of the numbers, one tensor's blocks, and a
bounded amount of what is half done.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from wan_loader.dtypes import ITEMSIZE

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from wan_loader.formats.checkpoint_facts import Checkpoint, Quantised, TensorFacts
    from wan_loader.plan.dtype_policy import DtypePolicy

__all__ = ["SCRATCH_BYTES", "nbytes_beside", "nbytes_of_values", "parts_of", "read_for", "values_among"]

#: The most that the making of one tensor's numbers takes beside what it reads and what it makes.
SCRATCH_BYTES = 128 << 20


def values_among(tensors: Sequence[TensorFacts], checkpoint: Checkpoint) -> dict[str, Quantised]:
    """Return those of some tensors whose numbers are to be made, by name."""
    if not checkpoint.quantised:
        return {}
    known = ((tensor, checkpoint.quantised.get(tensor.name)) for tensor in tensors)
    return {tensor.name: one for tensor, one in known if one is not None and tensor == one.value}


def parts_of(quantised: Quantised) -> tuple[TensorFacts, ...]:
    """Return the tensors of the file that numbers are made of."""
    return (quantised.raw,) if quantised.scale is None else (quantised.raw, quantised.scale)


def read_for(
    tensors: Sequence[TensorFacts], values: Mapping[str, Quantised], policy: DtypePolicy
) -> tuple[Sequence[TensorFacts], DtypePolicy]:
    """Return the tensors to read in the place of those that are wanted, and the policy that leaves them as they are."""
    if not values:
        return tensors, policy
    parts: list[TensorFacts] = []
    for tensor in tensors:
        parts += parts_of(values[tensor.name]) if tensor.name in values else (tensor,)
    stay = {part.name: part.dtype for one in values.values() for part in parts_of(one)}
    return parts, replace(policy, exact={**policy.exact, **stay})


def nbytes_of_values(values: Mapping[str, Quantised], policy: DtypePolicy) -> int:
    """Return the bytes of all numbers that are made."""
    return sum(_nbytes(one, policy) for one in values.values())


def nbytes_beside(values: Mapping[str, Quantised], policy: DtypePolicy, *, piecemeal: bool) -> int:
    """Return the most memory that making numbers takes beside all that is copied.

    Where all is kept, blocks go as numbers come; where tensors are let go of, the largest counts.
    """
    if not values:
        return 0
    if piecemeal:
        return max(_nbytes(one, policy) for one in values.values()) + SCRATCH_BYTES
    blocks = [sum(part.nbytes for part in parts_of(one)) for one in values.values()]
    # by tensors that shrink, such as eight-bit floats as eight-bit floats, nothing is won before they are made
    grown = sum(max(0, _nbytes(one, policy) - size) for one, size in zip(values.values(), blocks, strict=True))
    return grown + max(blocks) + SCRATCH_BYTES


def _nbytes(quantised: Quantised, policy: DtypePolicy) -> int:
    value = quantised.value
    return math.prod(value.shape) * ITEMSIZE[policy.target(value.name, value.dtype)]
