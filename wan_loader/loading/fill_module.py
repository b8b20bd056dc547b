"""The filling of a module: loaded tensors take the places of its own, and what else it holds moves to where they are.

What was one object under several names stays one object. Names were paired before (`match`).
"""

from __future__ import annotations

import itertools
import sys
from typing import TYPE_CHECKING, Any

from wan_loader.errors import DeviceMemoryError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    import torch

    from wan_loader.loading.module_tensors import ModuleTensor

__all__ = ["fill", "is_distributed", "is_dtensor"]

#: Where DTensor is: the latter before torch 2.5.
_DTENSOR_MODULES = ("torch.distributed.tensor", "torch.distributed._tensor")


def fill(
    module: torch.nn.Module,
    held: Iterable[ModuleTensor],
    filled: Collection[tuple[torch.Tensor, torch.Tensor]],
    device: str | torch.device,
) -> None:
    """Fill a module in place, and move what else it holds to `device`, so that it runs there.

    Tensors on meta that are not filled stay; what shares memory with what is filled, does so afterwards. Everything new
    is made before the module is changed.

    Args:
        module: The module to fill.
        held: Everything that it holds.
        filled: Tensors of the module, and what takes their places.
        device: The device of what is filled.

    Raises:
        DeviceMemoryError: The device has no room for the rest of the module.
    """
    import torch

    from wan_loader.loading.module_tensors import substitute

    device = torch.device(device)
    new = {id(old): _renewed(old, tensor) for old, tensor in filled}
    rest = [one.tensor for one in held if id(one.tensor) not in new and not one.tensor.is_meta]
    new |= _views(rest, [(old, new[id(old)]) for old, _ in filled] if rest else ())
    dtensors = False
    for *_, old in held:
        if type(old) is not torch.nn.Parameter and is_dtensor(old):
            dtensors = True
        elif id(old) not in new and old.device != device and not old.is_meta:
            new[id(old)] = _renewed(old, _moved(old, device))
    substitute(module, new)
    if dtensors:
        module.load_state_dict({}, strict=False)  # changes nothing; FSDP2's hooks take note of the new parameters


def _views(rest: Iterable[Any], filled: Iterable[tuple[Any, Any]]) -> dict[int, Any]:
    """Return, by id, what replaces the tensors that share memory with a filled one: the same view of the new one.

    Args:
        rest: Tensors that are not filled.
        filled: Tensors that are, and what takes their places.
    """
    by_memory: dict[int, list[Any]] = {}
    for tensor in filter(_has_plain_memory, rest):
        by_memory.setdefault(tensor.untyped_storage()._cdata, []).append(tensor)
    views: dict[int, Any] = {}
    for old, new in filled if by_memory else ():
        # with other strides, the same offsets would be other elements
        if not _has_plain_memory(old) or old.stride() != new.stride():
            continue
        for view in by_memory.get(old.untyped_storage()._cdata, ()):
            start = view.storage_offset() - old.storage_offset()
            if view.dtype == old.dtype and start >= 0 and start + _n_spanned(view) <= _n_spanned(old):
                # a view that hangs on its parameter in autograd's graph still does; all others are leaves
                source = new if view.requires_grad and not view.is_leaf else new.detach()
                view_of_new = source.as_strided(view.size(), view.stride(), new.storage_offset() + start)
                views[id(view)] = _renewed(view, view_of_new)
    return views


def _has_plain_memory(tensor: Any) -> bool:
    import torch

    plain = type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.layout is torch.strided
    return plain and not tensor.is_meta and tensor.numel() > 0


def _n_spanned(tensor: torch.Tensor) -> int:
    """Return the elements of a tensor's storage from its first to its last."""
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a copy on the device. Raises `DeviceMemoryError` if it does not fit."""
    import torch

    try:
        moved = tensor.detach().to(device)
    except torch.OutOfMemoryError as error:
        message = f"{device} has no room for what the module holds beside its weights: {error}"
        raise DeviceMemoryError(message, reason=str(error)) from error
    return moved.requires_grad_(tensor.requires_grad and tensor.is_leaf)


def _renewed(old: Any, local: torch.Tensor) -> Any:
    """Return the tensor as what `old` was: a parameter of the same class, DTensor, or plain."""
    import torch

    tensor = _as_distributed(old, local)
    kind = type(old)
    if not issubclass(kind, torch.nn.Parameter) and not isinstance(old, torch.nn.Parameter):
        return tensor
    requires_grad = old.requires_grad and (tensor.is_floating_point() or tensor.is_complex())
    if issubclass(kind, torch.nn.Parameter):  # the class itself would make an empty one inside of `empty_weights`
        new: Any = torch.Tensor._make_subclass(kind, tensor, requires_grad)
    else:
        new = torch.nn.Parameter(tensor, requires_grad=requires_grad)
    if old.__dict__:
        new.__dict__.update(old.__dict__)
    return new


def _as_distributed(old: Any, local: torch.Tensor) -> Any:
    """Return the tensor in place of `old`: where that is a DTensor, the one whose part of this process is `local`."""
    if not is_dtensor(old) or is_dtensor(local):
        return local
    return type(old).from_local(
        local, old.device_mesh, old.placements, run_check=False, shape=old.shape, stride=old.stride()
    )


def is_dtensor(tensor: Any) -> bool:
    """Return whether a tensor is a DTensor.

    Where nothing has imported those, nothing is, and they need not be imported. Nor is anything while another thread is
    still importing them.
    """
    for name in _DTENSOR_MODULES:
        if (dtensor := getattr(sys.modules.get(name), "DTensor", None)) is not None:
            return isinstance(tensor, dtensor)
    return False


def is_distributed(module: torch.nn.Module) -> bool:
    """Return whether a module lies on several processes: some parameter or buffer of it is a DTensor.

    Modules that were gathered for a forward give their full parameters back first.
    """
    fsdp_module = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    if fsdp_module is not None:  # nor still being imported, by another thread
        for owner in module.modules():
            if isinstance(owner, fsdp_module):
                owner.reshard()
    return any(map(is_dtensor, itertools.chain(module.parameters(), module.buffers())))
