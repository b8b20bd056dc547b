"""The pairing of a checkpoint's names and shapes with a module's, before any weight is read.

`match` lists everything that disagrees in one error; `left_on_meta` tells what would not be filled.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from wan_loader.errors import KeyMismatchError, OptionError
from wan_loader.loading.mismatch import mismatch

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch

    from wan_loader.formats.checkpoint_facts import Checkpoint, TensorFacts
    from wan_loader.loading.module_tensors import ModuleTensor

__all__ = ["KeyMap", "Match", "left_on_meta", "match", "module_slots"]

#: Checkpoint name -> module name; None leaves a tensor of the checkpoint out.
KeyMap = Mapping[str, str | None] | Callable[[str], str | None]


@dataclass(frozen=True, slots=True)
class Match:
    """The pairs of a checkpoint's tensors and a module's names."""

    facts: tuple[TensorFacts, ...]
    """The tensors to load, in file order."""
    slots: dict[str, tuple[str, ...]]
    """All module names that each name of the checkpoint fills (several where parameters are tied)."""
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()

    @property
    def module_names(self) -> list[str]:
        """Every name in the module, filled or missing."""
        return [*itertools.chain.from_iterable(self.slots.values()), *self.missing]


def match(slots: Mapping[str, torch.Tensor], checkpoint: Checkpoint, key_map: KeyMap | None, *, strict: bool) -> Match:
    """Pair names.

    Args:
        slots: The module's tensors, of `module_slots`.
        checkpoint: The file's side.
        key_map: Turns names of the checkpoint into names of the module.
        strict: Missing and unexpected names are an error.

    Raises:
        KeyMismatchError: Names are missing or unexpected, if `strict`, or shapes are wrong, or two names map to one.
        OptionError: The key map gives something that is no name.
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
            message = f"{checkpoint.path}: {mapped[name].name!r} and {facts.name!r} both map to {name!r}"
            raise KeyMismatchError(message, path=checkpoint.path, tensor=facts.name)
        if (shape := _shape(slots, name)) != facts.shape:
            misshaped[facts.name] = facts.shape, shape
        else:
            mapped[name] = facts
        # misshaped ones, too: a wrong shape is not a missing name as well
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
        reason, remedy = "has no shape yet", "give the module its sizes, or run it once"
        message = f"{name} of the module {reason}: {remedy}"
        raise KeyMismatchError(message, tensor=name, reason=reason, remedy=remedy) from error


def left_on_meta(held: Iterable[ModuleTensor], targets: Iterable[torch.Tensor]) -> list[list[ModuleTensor]]:
    """Return the tensors that stay on the meta device when `targets` are filled, each under all of its names."""
    filled = {id(target) for target in targets}
    left: dict[int, list[ModuleTensor]] = {}
    for one in held:
        if id(one.tensor) not in filled and one.tensor.is_meta:
            left.setdefault(id(one.tensor), []).append(one)
    return list(left.values())


def module_slots(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return every parameter and persistent buffer by name, tied ones under each of their names."""
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
    raise OptionError.because(
        f"key_map gives a value of type {kind} for {name!r:.120}", "every name is a str, or None to leave out"
    )
