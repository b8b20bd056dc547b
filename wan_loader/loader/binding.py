"""Binding loaded tensors to a module: names first, weights later.

`match` compares a checkpoint's names and shapes with a module's, before any weight is read, and lists everything that
disagrees in one error. `bind` puts the tensors in; parameters that were one object stay one object.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from wan_loader.errors import KeyMismatchError

if TYPE_CHECKING:
    import torch

    from wan_loader.formats.facts import Checkpoint, TensorFacts

__all__ = ["KeyMap", "Match", "bind", "is_dtensor", "match", "module_slots"]

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
    unexpected: list[str] = []
    wrong: dict[str, str] = {}
    for facts in checkpoint.tensors:
        name = _apply(key_map, facts.name)
        if name is None:
            continue
        if name not in slots:
            unexpected.append(facts.name if name == facts.name else f"{facts.name} (as {name})")
        elif name in mapped:
            raise KeyMismatchError(f"{checkpoint.path}: {mapped[name].name!r} and {facts.name!r} both map to {name!r}")
        elif (shape := tuple(slots[name].shape)) != facts.shape:
            wrong[name] = f"{facts.name}: {list(facts.shape)} in the file, {list(shape)} in the module"
        else:
            mapped[name] = facts
    present = {alias for name in (*mapped, *wrong) for alias in groups[name]}
    missing = [name for name in slots if name not in present]
    if wrong or (strict and (missing or unexpected)):
        raise _mismatch(checkpoint.path, missing if strict else [], unexpected if strict else [], list(wrong.values()))
    # Where the file holds a tied tensor under several names, only the first of them is loaded.
    chosen: dict[tuple[str, ...], TensorFacts] = {}
    for name, facts in mapped.items():
        chosen.setdefault(groups[name], facts)
    return Match(
        tuple(chosen.values()), {f.name: names for names, f in chosen.items()}, tuple(missing), tuple(unexpected)
    )


def bind(module: torch.nn.Module, found: Match, tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """Put the tensors into the module, in place; returns the names of what is still on the meta device."""
    owners = dict(module.named_modules(remove_duplicate=False))  # get_submodule walks down anew for each tensor
    for name, aliases in found.slots.items():
        new: Any = None
        for alias in aliases:
            path, _, attribute = alias.rpartition(".")
            owner = owners[path]
            if attribute in owner._parameters:
                new = new if new is not None else _parameter(owner._parameters[attribute], tensors[name])
                owner._parameters[attribute] = new
            else:
                owner._buffers[attribute] = _as(owner._buffers[attribute], tensors[name])
    everything = [*module.named_parameters(), *module.named_buffers()]
    if any(is_dtensor(tensor) for _, tensor in everything):
        module.load_state_dict({}, strict=False)  # changes nothing; FSDP2's hooks take note of the new parameters
    return [name for name, tensor in everything if tensor.is_meta]


def _parameter(old: Any, tensor: torch.Tensor) -> torch.nn.Parameter:
    import torch

    tensor = _as(old, tensor)
    differentiable = tensor.is_floating_point() or tensor.is_complex()
    new = torch.nn.Parameter(tensor, requires_grad=old.requires_grad and differentiable)
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


def _mismatch(path: str, missing: list[str], unexpected: list[str], wrong: list[str]) -> KeyMismatchError:
    parts = [f"{path} does not fit the module:"]
    for title, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", wrong)):
        if names:
            parts.append(f"{len(names)} {title}:\n    " + "\n    ".join(names))
    parts.append("check that it is the right checkpoint, or pass key_map= or strict=False")
    return KeyMismatchError("\n  ".join(parts))
