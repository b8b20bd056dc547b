"""What each of some streamed modules holds, so that one limit may count for all. Pure."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["Held", "Ledger"]


class Held(NamedTuple):
    """What one module holds for itself, or several together. Amounts are bytes."""

    device: int = 0
    """Weights on the device, without buffers."""
    host: int = 0
    """The page cache that is relied upon."""
    pinned: int = 0
    """The part of that which is registered."""


class Ledger:
    """What each of some modules holds: so that one limit may count for all."""

    def __init__(self) -> None:
        self._held: dict[object, Held] = {}

    def note(self, who: object, held: Held) -> None:
        """Take note of what a module holds."""
        self._held[who] = held

    def strike(self, who: object) -> None:
        """Take note that a module holds nothing any more."""
        self._held.pop(who, None)

    def total(self) -> Held:
        """Return what all hold together."""
        return Held(*map(sum, zip(*self._held.values(), strict=True))) if self._held else Held()
