"""Modules that are cast on the CPU: what is in mapped files waits, in the module's own tensors.

`module.to(torch.bfloat16)` gives each parameter the memory of its cast, and stays the same object; so does a parameter
that waits. The original call then finds every tensor as it is to be.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from wan_loader.fastpath.deferral.waiting_cast import find_casts

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch

    from wan_loader.fastpath.moving.slots import Slot
    from wan_loader.fastpath.tally import Tally

__all__ = ["defer_casts", "is_hooked"]


def defer_casts(slots: Iterable[Slot], dtype: torch.dtype, tally: Tally) -> None:
    """Have the casts of some tensors of a module wait, as far as that is certain to be the same.

    Args:
        slots: Places of plain tensors in a module.
        dtype: What they become.
        tally: Is told what was left, and why.
    """
    from wan_loader.fastpath.deferral.deferred_tensor import defer_parameter, give

    waiting: dict[str, Slot] = {}
    seen: set[int] = set()
    for slot in slots:
        # a parameter in several places is one object, a buffer becomes one for each place
        is_new = not slot.is_parameter or id(slot.tensor) not in seen
        if is_new and not is_hooked(slot.tensor):
            waiting[str(len(waiting))] = slot
            seen.add(id(slot.tensor))
    # the memory alone: a parameter's own becomes that of its cast
    sources = {name: slot.tensor.detach() for name, slot in waiting.items()}
    for name, cast in find_casts(sources, dict.fromkeys(sources, dtype), tally).items():
        slot = waiting[name]
        if not slot.is_parameter:
            slot.owner[slot.key] = give(cast)
        elif not defer_parameter(slot.tensor, cast):
            tally.leave("is held by C++ code", slot.tensor.nbytes)


def is_hooked(tensor: torch.Tensor) -> bool:
    """Say whether something hangs on a tensor that would not stay with the object."""
    hooks = getattr(tensor, "_backward_hooks", None), getattr(tensor, "_post_accumulate_grad_hooks", None)
    return any(hooks) or tensor.retains_grad
