"""The pairing of a load with the module that it fills: decided before a weight is read, carried out at the end.

A load that fills no module has a `Binding`, too, which binds nothing: so all loads take the same steps.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from wan_loader.arguments import check_flag, check_key_map, check_module, checked_strings
from wan_loader.errors import CheckpointError, KeyMismatchError
from wan_loader.formats.checkpoint_facts import Checkpoint, TensorFacts
from wan_loader.loading.fill_module import fill
from wan_loader.loading.match import left_on_meta, match
from wan_loader.loading.mismatch import stays_on_meta
from wan_loader.plan.dtype_policy import has_part
from wan_loader.plan.request import LoadRequest
from wan_loader.printable import some

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    from wan_loader.loading.match import KeyMap, Match
    from wan_loader.loading.module_tensors import ModuleTensor

__all__ = ["Binding", "Into", "bind", "make_binding"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Into:
    """The module that is to be filled, and how its names go with those of a checkpoint."""

    module: torch.nn.Module
    key_map: KeyMap | None = None
    strict: bool = True
    allow_meta: tuple[str, ...] = ()
    """Parts of the names of what may stay on the meta device."""

    def __post_init__(self) -> None:
        check_module(self.module)
        check_key_map(self.key_map)
        check_flag(self.strict, "strict")
        object.__setattr__(self, "allow_meta", checked_strings(self.allow_meta, "allow_meta"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Binding:
    """The loaded tensors and their places in a module, if there is one to fill."""

    request: LoadRequest
    """The request for what the module needs."""
    into: Into | None = None
    targets: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """The module's tensors whose places are taken, by the names in the checkpoint."""
    found: Match | None = None
    held: tuple[ModuleTensor, ...] = field(default=(), repr=False)
    """Everything that the module holds."""
    on_meta: tuple[str, ...] = ()
    """The names of what will stay on the meta device."""

    def bind(self, tensors: Mapping[str, torch.Tensor], device: str | torch.device) -> list[str]:
        """Put in what was loaded, and move the rest of the module to the device; return notes, one line each."""
        if self.into is None:
            return []
        fill(self.into.module, self.held, [(old, tensors[name]) for name, old in self.targets.items()], device)
        return self._notes()

    def _notes(self) -> list[str]:
        if self.found is None:
            return []
        notes = {
            "not in the checkpoint": self.found.missing,
            "in the checkpoint, but not in the module": self.found.unexpected,
            "still on the meta device, compute them before use": self.on_meta,
            "in keep_fp32, but part of no name in the module": self.request.policy.unused_parts(
                self.found.module_names
            ),
        }
        return [f"{title}: {some(names)}" for title, names in notes.items() if names]


def make_binding(request: LoadRequest, checkpoint: Checkpoint, into: Into | None) -> Binding:
    """Pair the names of a checkpoint with those of a module.

    Args:
        request: Everything that was asked for, beside the module.
        checkpoint: The facts of the file.
        into: The module; None: the load fills none.

    Raises:
        KeyMismatchError: The names disagree, or something would stay on the meta device.
        CheckpointError: The checkpoint holds scales that a conversion would leave out, or blocks in place of numbers.
    """
    if into is None:
        return Binding(request=request)
    try:
        return _pair(request, checkpoint, into)
    except KeyMismatchError as error:
        request.policy.check(checkpoint, checkpoint.tensors)  # scales are not the module's: this says more
        if request.policy.dtype is None and checkpoint.quantised:
            reason = "holds quantised tensors, whose blocks are not what the module holds"
            remedy = "pass a dtype, such as bf16, for their numbers"
            raise CheckpointError.because(reason, remedy, path=checkpoint.path) from error
        raise


def _pair(request: LoadRequest, checkpoint: Checkpoint, into: Into) -> Binding:
    from wan_loader.loading.module_tensors import held_tensors

    held = tuple(held_tensors(into.module))
    slots = {one.name: one.tensor for one in held if one.stored}
    found = match(slots, checkpoint, into.key_map, strict=into.strict)
    targets = {name: slots[names[0]] for name, names in found.slots.items()}
    left = left_on_meta(held, targets.values())
    if unfilled := [aliases[0] for aliases in left if not any(has_part(one.name, into.allow_meta) for one in aliases)]:
        raise stays_on_meta(checkpoint.path, unfilled)
    module_names = {name: names[0] for name, names in found.slots.items()}
    return Binding(
        request=replace(
            request,
            names=tuple(facts.name for facts in found.facts),
            policy=replace(request.policy, module_names=module_names),
        ),
        into=into,
        targets=targets,
        found=found,
        held=held,
        on_meta=tuple(aliases[0].name for aliases in left),
    )


def bind(
    module: torch.nn.Module,
    tensors: Mapping[str, torch.Tensor],
    *,
    device: str | torch.device | None = None,
    key_map: KeyMap | None = None,
    strict: bool = True,
    allow_meta: Sequence[str] = (),
) -> list[str]:
    """Put tensors that were loaded into a module, in place of its own, as `load_into` does.

    Nothing is copied: the module holds the very tensors, as parameters of the classes that it had. What is one object
    under several names stays so.

    Args:
        module: May be empty, built under `empty_weights`.
        tensors: By their names in the checkpoint, as `load_file` returns them.
        device: Where the rest of the module goes; None means the device of the tensors.
        key_map: As for `load_into`.
        strict: As for `load_into`.
        allow_meta: As for `load_into`.

    Returns:
        What the caller should know, one line each: names that were left out, what stays on the meta device.

    Raises:
        KeyMismatchError: Names or shapes disagree, or something would stay on the meta device; the module is as it was.
    """
    into = Into(module=module, key_map=key_map, strict=strict, allow_meta=tuple(allow_meta))
    # names and shapes are all that is compared
    facts = tuple(TensorFacts(name, "", tuple(tensor.shape), 0, ()) for name, tensor in tensors.items())
    held = Checkpoint("what was loaded", "memory", (), (), facts)
    if device is None:
        device = next((tensor.device for tensor in tensors.values()), "cpu")
    return make_binding(LoadRequest(source=held), held, into).bind(tensors, device)
