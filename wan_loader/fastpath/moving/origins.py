"""What tensors on a device were fetched from: noted when they have moved, for when they come back (`returns`)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from wan_loader.fastpath.moving.slots import Slot, is_plain

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch

    from wan_loader.formats.checkpoint_facts import FileFacts
    from wan_loader.provenance.proof import FileRange

__all__ = ["Origin", "Origins"]

#: So many tensors are noted, then the oldest are forgotten: several pipelines.
_MAX_NOTES = 1 << 14


class Origin(NamedTuple):
    """What a tensor on a device was fetched from, and the name of the dtype that it was converted to on the way."""

    file: FileFacts
    place: FileRange
    target: str

    @property
    def converts(self) -> bool:
        """Whether there was something to convert."""
        return self.target != self.place.dtype


@dataclass(slots=True)
class Origins:
    """Hints, by the addresses of tensors' memory, which hold nothing: something else may be there by now."""

    _notes: dict[tuple[torch.device, int], Origin] = field(default_factory=dict)

    def __bool__(self) -> bool:
        """Say whether anything is noted."""
        return bool(self._notes)

    def note(self, fetched: Iterable[tuple[Slot, Origin]]) -> None:
        """Note what is in some places of a module, once it has moved."""
        for slot, origin in fetched:
            tensor = slot.owner.get(slot.key)
            if tensor is not None and is_plain(tensor):
                key = _key(tensor)
                self._notes.pop(key, None)
                self._notes[key] = origin
        while len(self._notes) > _MAX_NOTES:
            self._notes.pop(next(iter(self._notes)), None)

    def take(self, tensor: torch.Tensor) -> Origin | None:
        """Return what was noted of a tensor of this kind at its address, and forget it: it is about to leave."""
        if (origin := self._notes.pop(_key(tensor), None)) is None:
            return None
        noted = f"torch.{origin.target}", origin.place.shape, origin.place.stride
        return origin if (str(tensor.dtype), tuple(tensor.shape), tensor.stride()) == noted else None


def _key(tensor: torch.Tensor) -> tuple[torch.device, int]:
    return tensor.device, tensor.data_ptr()
