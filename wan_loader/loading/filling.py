"""One module that is filled from one checkpoint: what `load_into` decides before it loads, and does afterwards."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from wan_loader.loading.bind import Match, bind, left_on_meta, match
from wan_loader.loading.mismatch import some, stays_on_meta
from wan_loader.plan.dtype_policy import has_part

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from wan_loader.formats.facts import Checkpoint
    from wan_loader.loading.bind import KeyMap
    from wan_loader.loading.holdings import Held
    from wan_loader.plan.dtype_policy import DtypePolicy

__all__ = ["Filling"]


@dataclass(slots=True, kw_only=True)
class Filling:
    """A module, what was said about names, and, once matched, which tensor goes where."""

    module: torch.nn.Module
    key_map: KeyMap | None
    strict: bool
    allow_meta: tuple[str, ...]
    found: Match = field(default_factory=lambda: Match((), {}))
    targets: dict[str, torch.Tensor] = field(default_factory=dict)
    """Name in the checkpoint -> the module's tensor whose place it takes."""
    _held: list[Held] = field(default_factory=list)
    _on_meta: list[str] = field(default_factory=list)

    def match(self, checkpoint: Checkpoint) -> None:
        """Pair the names. Raises `KeyMismatchError` if they disagree, or if something would stay on meta."""
        from wan_loader.loading.holdings import held_tensors

        self._held = list(held_tensors(self.module))
        slots = {held.name: held.tensor for held in self._held if held.stored}
        self.found = match(slots, checkpoint, self.key_map, strict=self.strict)
        self.targets = {name: slots[names[0]] for name, names in self.found.slots.items()}
        left = left_on_meta(self._held, self.targets.values())
        if refused := [aliases[0] for aliases in left if not self._may_stay(aliases)]:
            raise stays_on_meta(checkpoint.path, refused)
        self._on_meta = [aliases[0].name for aliases in left]

    def _may_stay(self, aliases: list[Held]) -> bool:
        return any(has_part(held.name, self.allow_meta) for held in aliases)

    def bind(self, tensors: Mapping[str, torch.Tensor], device: torch.device) -> None:
        """Put in what was loaded, and move the rest of the module to the device."""
        bind(self.module, self._held, [(old, tensors[name]) for name, old in self.targets.items()], device)

    def notes(self, rule: DtypePolicy) -> list[str]:
        """What the caller should know about names, one line each."""
        notes = {
            "not in the checkpoint": self.found.missing,
            "in the checkpoint, but not in the module": self.found.unexpected,
            "still on the meta device, compute them before use": self._on_meta,
            "in keep_fp32, but part of no name in the module": rule.unused_parts(self.found.module_names),
        }
        return [f"{title}: {some(names)}" for title, names in notes.items() if names]
