"""The places of tensors in a module, and what is given new memory there as torch does it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import torch

    from wan_loader.fastpath.deferral.waiting_cast import WaitingCast

__all__ = ["Slot", "bind", "in_both_roles", "is_plain", "slots_of", "why_not_bound"]


class Slot(NamedTuple):
    """The place of a tensor in a module."""

    owner: dict[str, Any]
    key: str
    tensor: torch.Tensor
    is_parameter: bool


def why_not_bound() -> str | None:
    """Return why parameters may not be given new memory; None if they may."""
    import torch

    future = torch.__future__
    if future.get_overwrite_module_params_on_conversion() or future.get_swap_module_params_on_conversion():
        return "torch.__future__ asks for parameters that are replaced or swapped"
    return None


def slots_of(module: torch.nn.Module) -> Iterator[Slot]:
    """Yield every place of a parameter or buffer in a module and in those within it.

    Not those of modules that `torch.jit` has compiled: what they have is held by C++, which takes memory unasked.
    """
    import torch

    for part in module.modules():
        if isinstance(part, torch.jit.ScriptModule):
            continue
        for key, parameter in part._parameters.items():
            if parameter is not None:
                yield Slot(part._parameters, key, parameter, is_parameter=True)
        for key, buffer in part._buffers.items():
            if buffer is not None:
                yield Slot(part._buffers, key, buffer, is_parameter=False)


def in_both_roles(slots: Sequence[Slot]) -> set[int]:
    """Return the ids of tensors that are parameters in one place and buffers in another.

    What the original makes of the buffer depends on which of both it comes to first.
    """
    parameters = {id(slot.tensor) for slot in slots if slot.is_parameter}
    return {id(slot.tensor) for slot in slots if not slot.is_parameter} & parameters


def is_plain(tensor: torch.Tensor) -> bool:
    """Say whether a tensor is of no subclass: others may have no size, or not say it truly."""
    import torch

    return type(tensor) in (torch.Tensor, torch.nn.Parameter)


def bind(slot: Slot, tensor: torch.Tensor, cast: WaitingCast | None = None) -> bool:
    """Give a parameter its new memory, or a buffer's place its new tensor, as `torch.nn.Module._apply` does.

    Args:
        slot: The place.
        tensor: What it gets.
        cast: The cast that its tensor waited for; None: it is an ordinary one.

    Returns:
        False if somebody has settled what waited, or C++ holds it; then nothing was changed.
    """
    if not slot.is_parameter:
        if cast is not None and cast.is_done:
            return False
        slot.owner[slot.key] = tensor
    elif cast is None:
        slot.tensor.data = tensor
    else:
        from wan_loader.fastpath.deferral.deferred_tensor import give_memory

        return give_memory(slot.tensor, cast, tensor)
    return True
