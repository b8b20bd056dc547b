"""Binding loaded tensors to a module: names first, weights later.

`match` compares a checkpoint's names and shapes with a module's, before any weight is read, and lists everything that
disagrees in one error; `left_on_meta` tells what would not be filled. `bind` puts the tensors in, and moves the rest to
where they are; what was one object stays one object.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from wan_loader.errors import DeviceMemoryError, KeyMismatchError
from wan_loader.loader.mismatch import mismatch

if TYPE_CHECKING:
    import torch

    from wan_loader.formats.facts import Checkpoint, TensorFacts
    from wan_loader.loader.holdings import Held

__all__ = ["KeyMap", "Match", "bind", "is_dtensor", "left_on_meta", "match", "module_slots"]

#: Checkpoint name -> module name; None leaves a tensor of the checkpoint out.
KeyMap = Mapping[str, str | None] | Callable[[str], str | None]


@dataclass(frozen=True, slots=True)
class Match:
    """Which tensor of the checkpoint goes where in the module."""

    facts: tuple[TensorFacts, ...]
    """Tensors to load, in file order."""
    slots: dict[str, tuple[str, ...]]
    """Checkpoint name -> all module names that it fills (several where parameters are tied)."""
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()

    @property
    def module_names(self) -> list[str]:
        """Every name in the module, filled or missing."""
        return [*itertools.chain.from_iterable(self.slots.values()), *self.missing]


def match(slots: Mapping[str, torch.Tensor], checkpoint: Checkpoint, key_map: KeyMap | None, *, strict: bool) -> Match:
    """Pair names. slots: the module's, of `module_slots`.

    Raises `KeyMismatchError` for missing or unexpected ones if `strict`, for wrong shapes always.
    """
    groups = _tied_groups(slots)
    mapped: dict[str, TensorFacts] = {}
    unexpected: dict[str, tuple[int, ...]] = {}
    renamed: dict[str, str] = {}
    misshaped: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}
    present: set[str] = set()
    for facts in checkpoint.tensors:
        name = _apply(key_map, facts.name)
        if name is None:
            continue
        if name != facts.name:
            renamed[facts.name] = name
        if name not in slots:
            unexpected[facts.name] = facts.shape
            continue
        if name in mapped:
            raise KeyMismatchError(f"{checkpoint.path}: {mapped[name].name!r} and {facts.name!r} both map to {name!r}")
        if (shape := tuple(slots[name].shape)) != facts.shape:
            misshaped[facts.name] = facts.shape, shape
        else:
            mapped[name] = facts
        present.update(groups[name])
    missing = [name for name in slots if name not in present]
    if misshaped or (strict and (missing or unexpected)):
        lacking = {n: tuple(slots[n].shape) for n in missing if strict and groups[n][0] == n}  # tied ones once
        foreign = unexpected if strict else {}
        raise mismatch(checkpoint.path, missing=lacking, unexpected=foreign, misshaped=misshaped, renamed=renamed)
    # Where the file holds a tied tensor under several names, only the first of them is loaded.
    chosen: dict[tuple[str, ...], TensorFacts] = {}
    for name, facts in mapped.items():
        chosen.setdefault(groups[name], facts)
    notes = tuple(f"{name} (as {renamed[name]})" if name in renamed else name for name in unexpected)
    return Match(tuple(chosen.values()), {f.name: names for names, f in chosen.items()}, tuple(missing), notes)


def left_on_meta(module: torch.nn.Module, found: Match) -> list[list[Held]]:
    """The tensors that will still be on the meta device once `found` is bound, each under all of its names."""
    from wan_loader.loader.holdings import held_tensors

    slots = module_slots(module)
    filled = {id(slots[name]) for names in found.slots.values() for name in names}
    left: dict[int, list[Held]] = {}
    for held in held_tensors(module):
        if held.tensor.is_meta and id(held.tensor) not in filled:
            left.setdefault(id(held.tensor), []).append(held)
    return list(left.values())


def bind(module: torch.nn.Module, found: Match, tensors: Mapping[str, torch.Tensor], device: torch.device) -> None:
    """Put the tensors into the module, in place, and move what else it holds to `device`, so that it runs there.

    What is on meta and in no checkpoint stays. Everything new is made before the module is changed.
    """
    from wan_loader.loader.holdings import held_tensors, substitute

    slots = module_slots(module)
    new = {id(slots[names[0]]): _renewed(slots[names[0]], tensors[name]) for name, names in found.slots.items()}
    for _, _, old in held_tensors(module):
        if id(old) not in new and not is_dtensor(old) and old.device != device and not old.is_meta:
            new[id(old)] = _renewed(old, _moved(old, device))
    substitute(module, new)
    if any(is_dtensor(tensor) for tensor in slots.values()):
        module.load_state_dict({}, strict=False)  # changes nothing; FSDP2's hooks take note of the new parameters


def _moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy on the device. Raises `DeviceMemoryError` if it does not fit."""
    import torch

    try:
        return tensor.detach().to(device)
    except torch.OutOfMemoryError as error:
        message = f"{device} has no room for what the module holds beside its weights: {error}"
        raise DeviceMemoryError(message) from error


def _renewed(old: Any, local: torch.Tensor) -> Any:
    """The tensor as what `old` was: a parameter of the same class, DTensor, or plain."""
    import torch

    tensor = _as(old, local)
    if not isinstance(old, torch.nn.Parameter):
        return tensor
    requires_grad = old.requires_grad and (tensor.is_floating_point() or tensor.is_complex())
    if type(tensor) is torch.Tensor:  # also inside of `empty_weights`, where the class itself would make empty ones
        kind = type(old) if issubclass(type(old), torch.nn.Parameter) else torch.nn.Parameter
        new: Any = torch.Tensor._make_subclass(kind, tensor, requires_grad)
    else:
        new = torch.nn.Parameter(tensor, requires_grad=requires_grad)
    new.__dict__.update(old.__dict__)
    return new


def is_dtensor(tensor: Any) -> bool:
    """Whether a tensor is a DTensor. Where nothing has imported those, nothing is, and they need not be imported.

    Nor is anything while another thread is still importing them.
    """
    dtensor = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)
    return dtensor is not None and isinstance(tensor, dtensor)


def _as(old: Any, local: torch.Tensor) -> Any:
    """The tensor in place of `old`: where that is a DTensor, the one whose part of this process is `local`."""
    if not is_dtensor(old):
        return local
    return type(old).from_local(
        local, old.device_mesh, old.placements, run_check=False, shape=old.shape, stride=old.stride()
    )


def module_slots(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter and persistent buffer by name, tied ones under each of their names."""
    slots: dict[str, torch.Tensor] = dict(module.named_parameters(remove_duplicate=False))
    for prefix, owner in module.named_modules(remove_duplicate=False):
        for name, buffer in owner._buffers.items():
            if buffer is not None and name not in owner._non_persistent_buffers_set:
                slots[f"{prefix}.{name}" if prefix else name] = buffer
    return slots


def _tied_groups(slots: Mapping[str, torch.Tensor]) -> dict[str, tuple[str, ...]]:
    by_object: dict[int, list[str]] = {}
    for name, tensor in slots.items():
        by_object.setdefault(id(tensor), []).append(name)
    return {name: tuple(by_object[id(tensor)]) for name, tensor in slots.items()}


def _apply(key_map: KeyMap | None, name: str) -> str | None:
    if key_map is None:
        return name
    return key_map.get(name, name) if isinstance(key_map, Mapping) else key_map(name)
