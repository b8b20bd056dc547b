"""Tensors on the CPU whose casts wait until somebody looks at the values, or until they move, converted on the way.

What a program asks for with `torch_dtype=` is done on the CPU by libraries, though the weights go to a GPU right after.
Here such a cast of a tensor in a mapped file is noted (`waiting_cast`), and the program is given a tensor that knows
all but its values (`deferred_tensor`). It differs from an ordinary one in its type alone, `isinstance` included.

    defer     a tensor that waits, or an ordinary one where that is not certain to be the same
    Moves     fetches what waits with everything else, in one plan; then nothing of ours is left in the module
    settle    the same object becomes ordinary; every function of torch that wants values does that by itself

This is the way in, and does not import torch before it is used.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from wan_loader.fastpath.modes import why_not_now
from wan_loader.fastpath.ours import ours

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from wan_loader.fastpath.deferral.waiting_cast import WaitingCast
    from wan_loader.fastpath.tally import Tally

__all__ = [
    "awaits_initialisation",
    "cast_of",
    "defer_all",
    "is_deferred",
    "is_sole",
    "settle",
    "settle_all",
    "settle_file",
]

_TENSORS = "wan_loader.fastpath.deferral.deferred_tensor"


def defer_all(
    sources: Mapping[str, torch.Tensor], dtypes: Mapping[str, torch.dtype], tally: Tally
) -> dict[str, torch.Tensor]:
    """Return `source.to(dtype)` for each of some tensors, deferred where that is safe, with one look at the system.

    Args:
        sources: Tensors by name.
        dtypes: What each becomes, by the same names.
        tally: Is told what was not deferred and why, and what somebody looked at.

    Returns:
        By the same names: tensors that wait, and where that is not certain to be the same, what `.to` gives.
    """
    from wan_loader.fastpath.deferral.deferred_tensor import give
    from wan_loader.fastpath.deferral.waiting_cast import find_casts

    if (why := why_not_now()) is not None:
        tally.leave(why)
        casts = {}
    else:
        with ours():
            casts = find_casts(sources, dtypes, tally)
    return {name: give(casts[name]) if name in casts else source.to(dtypes[name]) for name, source in sources.items()}


def is_deferred(tensor: object) -> bool:
    """Say whether a tensor waits, for a cast or for an initialisation."""
    module = sys.modules.get(_TENSORS)
    return module is not None and type(tensor) is module.Deferred


def awaits_initialisation(tensor: object) -> bool:
    """Say whether a tensor waits for its initialisation: it has no values yet."""
    return is_deferred(tensor) and cast_of(tensor) is None


def is_sole(tensor: torch.Tensor) -> bool:
    """Say whether no other tensor waits for the same as one that waits."""
    from wan_loader.fastpath.deferral.deferred_tensor import is_sole

    answer: bool = is_sole(tensor)
    return answer


def cast_of(tensor: object) -> WaitingCast | None:
    """Return the cast that a tensor waits for; None if it is an ordinary one."""
    # without that module there is none, and it would import torch
    module = sys.modules.get(_TENSORS)
    cast: WaitingCast | None = module.cast_of(tensor) if module is not None else None
    return cast


def settle(tensor: torch.Tensor) -> torch.Tensor:
    """Turn a tensor that waits into an ordinary one, the same object, with exactly what `source.to(dtype)` was.

    Returns:
        The tensor, in which nothing of ours is left. If C++ holds it, which cannot be told of a change, an ordinary one
        in its place, always the same.

    Raises:
        CheckpointError: Its file was modified since it was deferred.
    """
    from wan_loader.fastpath.deferral.deferred_tensor import settle

    settled: torch.Tensor = settle(tensor)
    return settled


def settle_all() -> None:
    """Turn all tensors of the process that wait into ordinary ones.

    Raises:
        CheckpointError: A file was modified since; what is of it waits still.
    """
    if _TENSORS in sys.modules:
        from wan_loader.fastpath.deferral.deferred_tensor import living, settle_each

        settle_each(living())


def settle_file(path: object) -> None:
    """Turn tensors whose casts wait for a file into ordinary ones, before somebody in this process writes to it.

    What opens files as Python does needs nothing of this, only what opens them from C++.

    Raises:
        CheckpointError: The file was modified since; what is of it waits still.
    """
    if _TENSORS in sys.modules:
        from wan_loader.fastpath.deferral.deferred_tensor import settle_file

        settle_file(path)
