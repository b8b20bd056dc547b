"""The state of a transfer: its counters, what it has taken, and how that is given back."""

from __future__ import annotations

from dataclasses import dataclass, field
from time import monotonic, sleep
from types import MappingProxyType
from typing import TYPE_CHECKING

from wan_loader.engine.activity import wait_until_idle
from wan_loader.plan.blocks import Transport

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["TransferState", "TransferStats"]

#: So long may mapped blocks stay registered after a load because of others.
_IDLE_SECONDS = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferStats:
    """The counters of a transfer that is over, in bytes."""

    nbytes: Mapping[Transport, int]
    """The bytes read, by their transport."""
    in_place_nbytes: int = 0
    """The bytes that were read to their place, into memory that was new."""
    ring_nbytes: int = 0
    """The size of the pinned ring, pinned or not."""
    pinned_nbytes: int = 0
    registered_nbytes: int = 0
    """The bytes of the page cache that were registered with the driver."""
    fallbacks: tuple[str, ...] = ()
    """The reasons for every transport that was not taken."""


@dataclass(slots=True)
class TransferState:
    """A transfer under way: its counters, and the clean-ups that it owes."""

    nbytes: dict[Transport, int] = field(default_factory=lambda: dict.fromkeys(Transport, 0))
    in_place_nbytes: int = 0
    """The bytes that were read to their place, into memory that was new."""
    ring_nbytes: int = 0
    pinned_nbytes: int = 0
    registered_nbytes: int = 0
    fallbacks: list[str] = field(default_factory=list)
    cleanups: list[Callable[[], bool]] = field(default_factory=list)
    """Steps that unregister and unmap what the copies came from, to be called last first. False: not possible yet."""

    def stats(self) -> TransferStats:
        """Return the counters as they are now."""
        return TransferStats(
            nbytes=MappingProxyType(dict(self.nbytes)),
            in_place_nbytes=self.in_place_nbytes,
            ring_nbytes=self.ring_nbytes,
            pinned_nbytes=self.pinned_nbytes,
            registered_nbytes=self.registered_nbytes,
            fallbacks=tuple(self.fallbacks),
        )

    def release(self, pause_s: float = 0.0) -> None:
        """Unregister and unmap. In any thread, after the device writer has finished.

        Unregistering mapped blocks holds the driver's lock for long. With `pause_s`, that gives way to other loads, and
        there are pauses between the steps for whoever else uses the device.
        """
        deadline = monotonic() + _IDLE_SECONDS
        while self.cleanups:
            if pause_s and self.registered_nbytes:
                wait_until_idle(max(0.0, deadline - monotonic()))
            if not self.cleanups[-1]():
                return  # still registered: what lies below must stay mapped
            self.cleanups.pop()
            if pause_s:
                sleep(pause_s)
