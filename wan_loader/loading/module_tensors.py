"""The tensors that a module holds: parameters, buffers, and those that it keeps as plain attributes.

Plain attributes are those in the module's own `__dict__`, and what lies one level deep in a list, tuple or dict there.
Modules that are hidden in attributes are not looked into: as for `module.to`, they are not part of it. Nor is what a
hook computes before each forward, as torch's `weight_norm`, `spectral_norm` and `prune` do.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = ["ModuleTensor", "held_tensors", "substitute"]

#: What every module has: registries, hooks, flags.
_OWN = frozenset(torch.nn.Module().__dict__)


class ModuleTensor(NamedTuple):
    """A tensor of a module under one of its names."""

    name: str
    kind: str
    """One of "parameter", "buffer" and "attribute"."""
    stored: bool
    """True if it is in the module's `state_dict`."""
    tensor: torch.Tensor


def held_tensors(module: torch.nn.Module) -> Iterator[ModuleTensor]:
    """Yield each tensor that a module holds, by each of its names; elements of containers as `table.0`, `table.key`."""
    for path, owner in module.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        for name, parameter in owner._parameters.items():
            if parameter is not None:
                yield ModuleTensor(prefix + name, "parameter", True, parameter)
        for name, buffer in owner._buffers.items():
            if buffer is not None:
                yield ModuleTensor(prefix + name, "buffer", name not in owner._non_persistent_buffers_set, buffer)
        for name in _plain_attributes(owner):
            value = owner.__dict__[name]
            if isinstance(value, torch.Tensor):
                yield ModuleTensor(prefix + name, "attribute", False, value)
            else:
                for key, element in _elements(value):
                    if isinstance(element, torch.Tensor):
                        yield ModuleTensor(f"{prefix}{name}.{key}", "attribute", False, element)


def substitute(module: torch.nn.Module, new: Mapping[int, Any]) -> None:
    """Put `new[id(tensor)]` in the place of each tensor that a module holds. Containers are replaced, not changed.

    What was one object under several names, parameter or not, is one afterwards. Everything in `new` must have been
    made while the old tensors lived.
    """
    containers: dict[int, Any] = {}
    for owner in module.modules():
        for registry in (owner._parameters, owner._buffers):
            for name, tensor in registry.items():
                if id(tensor) in new:
                    registry[name] = new[id(tensor)]
        for name in _plain_attributes(owner):
            value = owner.__dict__[name]
            if id(value) in new:
                owner.__dict__[name] = new[id(value)]
            elif any(id(element) in new for _, element in _elements(value)):
                if id(value) not in containers:
                    containers[id(value)] = value, _substituted(value, new)  # the old one is kept: so is its id
                owner.__dict__[name] = containers[id(value)][1]


def _plain_attributes(owner: torch.nn.Module) -> set[str]:
    names = owner.__dict__.keys() - _OWN
    for hook in owner._forward_pre_hooks.values():  # torch's own say so in one of these
        names -= {getattr(hook, "name", None), getattr(hook, "_tensor_name", None)}
    return names


def _elements(value: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(value, dict):
        yield from value.items()
    elif isinstance(value, list) or type(value) is tuple or (isinstance(value, tuple) and hasattr(value, "_make")):
        yield from enumerate(value)


def _substituted(value: Any, new: Mapping[int, Any]) -> Any:
    if isinstance(value, tuple):
        elements = [new.get(id(element), element) for element in value]
        make: Any = getattr(type(value), "_make", tuple)
        return make(elements)
    changed = copy.copy(value)
    for key, element in _elements(value):
        if id(element) in new:
            changed[key] = new[id(element)]
    return changed
