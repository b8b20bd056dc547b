"""Pins staging slots: those of the first reads in the background while they are filled, others when first used.

Registering a slot takes several times as long as the copy out of it, so that slots pinned between copies keep the link
waiting. In the background it is done for many slots with one call: a thread waits for the interpreter after each.
"""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from threading import Event
from typing import TYPE_CHECKING

from wan_loader.events import span
from wan_loader.linux import populate
from wan_loader.transfer.base import PinError
from wan_loader.workers import in_background

if TYPE_CHECKING:
    from collections.abc import Sequence

    from wan_loader.engine.carry import Carried
    from wan_loader.events import Observer
    from wan_loader.staging import Slot
    from wan_loader.transfer.base import Target

__all__ = ["Pinning"]


class Pinning:
    """Slots are pinned until the target refuses one. What was pinned, and why not all, is noted in `carried`."""

    def __init__(self, target: Target, carried: Carried, observer: Observer | None) -> None:
        self._target = target
        self._carried = carried
        self._observer = observer
        self._coming: dict[int, Event] = {}
        """Is set once the slot at an address has been dealt with in the background."""
        self._refused = not target.can_pin
        self._failure: BaseException | None = None

    def begin(self, slots: Sequence[Slot]) -> None:
        """Pin slots that follow each other in memory in the background: one, then twice as many at a time."""
        if self._refused:
            return
        groups: list[Sequence[Slot]] = []
        while slots:
            groups.append(slots[: 1 << len(groups)])
            slots = slots[len(groups[-1]) :]
        for group in groups:
            self._coming |= dict.fromkeys((slot.address for slot in group), Event())
        in_background(partial(self._pin_groups, groups), "pinning")

    def need(self, slot: Slot) -> None:
        """Return when the slot is pinned, or pinning was refused. Raises what made it fail otherwise."""
        if slot.pinned or self._refused:
            return
        if event := self._coming.get(slot.address):
            event.wait()
        else:
            self._pin([slot])
        if self._failure is not None:
            raise self._failure

    def end(self) -> None:
        """Wait for the background."""
        for event in self._coming.values():
            event.wait()

    def _pin_groups(self, groups: Sequence[Sequence[Slot]]) -> None:
        for group in groups:
            try:
                if not self._refused and self._failure is None:
                    self._pin(group)
            except BaseException as failure:
                self._failure = failure
            finally:
                self._coming[group[0].address].set()

    def _pin(self, slots: Sequence[Slot]) -> None:
        address, nbytes = slots[0].address, sum(len(slot.view) for slot in slots)
        # First: after the call, Ctrl-C may come before anything else. Unregistering what is not registered is harmless.
        self._carried.cleanups.append(partial(self._target.unpin, address))
        try:
            with span(self._observer, "init", track="pinning"):
                with suppress(OSError):  # then registering has more to do
                    populate(address, nbytes, write=True)
                self._target.pin(address, nbytes, read_only=False)
        except PinError as refusal:
            self._refused = True
            self._carried.refusals.append(f"staging is not pinned, copies are slower: {refusal}")
        else:
            self._carried.pinned_nbytes += nbytes
            for slot in slots:
                slot.pinned = True
