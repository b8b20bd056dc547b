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

from wan_loader.errors import DeviceMemoryError, KeyMismatchError, OptionError
from wan_loader.loading.mismatch import mismatch

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    import torch

    from wan_loader.formats.facts import Checkpoint, TensorFacts
    from wan_loader.loading.holdings import Held

__all__ = ["KeyMap", "Match", "bind", "is_distributed", "is_dtensor", "left_on_meta", "match", "module_slots"]

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
        if (shape := _shape(slots, name)) != facts.shape:
            misshaped[facts.name] = facts.shape, shape
        else:
            mapped[name] = facts
        present.update(groups[name])
    missing = [name for name in slots if name not in present]
    if misshaped or (strict and (missing or unexpected)):
        lacking = {n: _shape(slots, n) for n in missing if strict and groups[n][0] == n}  # tied ones once
        foreign = unexpected if strict else {}
        raise mismatch(checkpoint.path, missing=lacking, unexpected=foreign, misshaped=misshaped, renamed=renamed)
    # Where the file holds a tied tensor under several names, the module's last one counts, as for `load_state_dict`.
    chosen = {groups[name]: mapped[name] for name in slots if name in mapped}
    taken = tuple(facts for name, facts in mapped.items() if chosen[groups[name]] is facts)
    notes = tuple(f"{name} (as {renamed[name]})" if name in renamed else name for name in unexpected)
    return Match(taken, {f.name: names for names, f in chosen.items()}, tuple(missing), notes)


def _shape(slots: Mapping[str, torch.Tensor], name: str) -> tuple[int, ...]:
    try:
        return tuple(slots[name].shape)
    except RuntimeError as error:  # of a lazy module
        message = f"{name} of the module has no shape yet: give the module its sizes, or run it once"
        raise KeyMismatchError(message) from error


def left_on_meta(held: Iterable[Held], targets: Iterable[torch.Tensor]) -> list[list[Held]]:
    """The tensors that stay on the meta device when `targets` are filled, each under all of its names."""
    filled = {id(target) for target in targets}
    left: dict[int, list[Held]] = {}
    for one in held:
        if id(one.tensor) not in filled and one.tensor.is_meta:
            left.setdefault(id(one.tensor), []).append(one)
    return list(left.values())


def bind(
    module: torch.nn.Module,
    held: Iterable[Held],
    filled: Collection[tuple[torch.Tensor, torch.Tensor]],
    device: str | torch.device,
) -> None:
    """Fill a module in place, and move what else it holds to `device`, so that it runs there.

    held: what it holds. filled: tensors of the module, and what takes their places. What is on meta and not filled
    stays; what shares memory with what is filled, does so afterwards. Everything new is made before the module is
    changed.
    """
    import torch

    from wan_loader.loading.holdings import substitute

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
    """By id, what takes the places of those that share the memory of a filled tensor: the same view of the new one.

    rest: what is not filled. filled: what is, and what takes its place.
    """
    by_memory: dict[int, list[Any]] = {}
    for tensor in filter(_has_plain_memory, rest):
        by_memory.setdefault(tensor.untyped_storage()._cdata, []).append(tensor)
    views: dict[int, Any] = {}
    for old, new in filled if by_memory else ():
        if not _has_plain_memory(old) or old.stride() != new.stride():
            continue
        for view in by_memory.get(old.untyped_storage()._cdata, ()):
            start = view.storage_offset() - old.storage_offset()
            if view.dtype == old.dtype and start >= 0 and start + _n_spanned(view) <= _n_spanned(old):
                source = new if view.requires_grad and not view.is_leaf else new.detach()
                view_of_new = source.as_strided(view.size(), view.stride(), new.storage_offset() + start)
                views[id(view)] = _renewed(view, view_of_new)
    return views


def _has_plain_memory(tensor: Any) -> bool:
    import torch

    plain = type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.layout is torch.strided
    return plain and not tensor.is_meta and tensor.numel() > 0


def _n_spanned(tensor: torch.Tensor) -> int:
    """Elements of its storage from its first to its last."""
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy on the device. Raises `DeviceMemoryError` if it does not fit."""
    import torch

    try:
        moved = tensor.detach().to(device)
    except torch.OutOfMemoryError as error:
        message = f"{device} has no room for what the module holds beside its weights: {error}"
        raise DeviceMemoryError(message) from error
    return moved.requires_grad_(tensor.requires_grad and tensor.is_leaf)


def _renewed(old: Any, local: torch.Tensor) -> Any:
    """The tensor as what `old` was: a parameter of the same class, DTensor, or plain."""
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


def is_dtensor(tensor: Any) -> bool:
    """Whether a tensor is a DTensor. Where nothing has imported those, nothing is, and they need not be imported.

    Nor is anything while another thread is still importing them.
    """
    dtensor = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)
    return dtensor is not None and isinstance(tensor, dtensor)


def is_distributed(module: torch.nn.Module) -> bool:
    """Whether a module lies on several processes: some parameter or buffer of it is a DTensor.

    Modules that were gathered for a forward give their full parameters back first.
    """
    fsdp_module = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    if fsdp_module is not None:  # nor still being imported, by another thread
        for owner in module.modules():
            if isinstance(owner, fsdp_module):
                owner.reshard()
    return any(map(is_dtensor, itertools.chain(module.parameters(), module.buffers())))


def _as_distributed(old: Any, local: torch.Tensor) -> Any:
    """The tensor in place of `old`: where that is a DTensor, the one whose part of this process is `local`."""
    if not is_dtensor(old) or is_dtensor(local):
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
    mapped: object = key_map.get(name, name) if isinstance(key_map, Mapping) else key_map(name)
    if mapped is None or isinstance(mapped, str):
        return mapped
    kind = type(mapped).__name__
    raise OptionError(
        f"key_map gives a value of type {kind} for {name!r:.120}: every name is a str, or None to leave out"
    )
