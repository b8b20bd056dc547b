"""Pinning of the ring's slots: of the first reads in the background while they are filled, else when first used.

Registering a slot takes several times as long as the copy out of it, so that slots pinned between copies keep the link
waiting. In the background it is done for many slots with one call: a thread waits for the interpreter after each.
"""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from threading import Event, Lock
from typing import TYPE_CHECKING

from wan_loader.devices.writer import PinError
from wan_loader.engine.first_failure import FirstFailure
from wan_loader.events import span
from wan_loader.system.posix import populate
from wan_loader.system.threads import in_background

if TYPE_CHECKING:
    from collections.abc import Sequence

    from wan_loader.devices.writer import DeviceWriter
    from wan_loader.engine.pinned_ring import Slot
    from wan_loader.engine.transfer_state import TransferState
    from wan_loader.events import Observer

__all__ = ["Pinning"]


class Pinning:
    """The pinning of one ring, until the device writer refuses a slot. `state` has what was pinned, and why not all."""

    def __init__(self, writer: DeviceWriter, state: TransferState, observer: Observer | None) -> None:
        self._writer = writer
        self._state = state
        self._observer = observer
        self._coming: dict[int, Event] = {}
        """Events by the address of a slot, set once it has been dealt with in the background."""
        self._at_work = Lock()
        """Held while the background pins."""
        self._is_over = not writer.can_pin
        """True once nothing is pinned any more."""
        self._failure = FirstFailure()

    def begin(self, slots: Sequence[Slot]) -> None:
        """Pin slots that follow each other in memory in the background: one, then twice as many at a time."""
        if self._is_over:
            return
        # the first copy waits for one slot only, and the calls stay few
        groups: list[Sequence[Slot]] = []
        while slots:
            groups.append(slots[: 1 << len(groups)])
            slots = slots[len(groups[-1]) :]
        for group in groups:
            self._coming |= dict.fromkeys((slot.address for slot in group), Event())
        in_background(partial(self._pin_groups, groups), "pinning")

    def need(self, slot: Slot) -> None:
        """Return when the slot is pinned, or will not be. Raise the background's failure, if there was one."""
        if slot.pinned:
            return
        if event := self._coming.get(slot.address):
            event.wait()  # also once another was refused: its memory must not go while it is being registered
        elif not self._is_over:
            self._pin([slot])
        self._failure.raise_it()

    def end(self) -> None:
        """Wait for the background. It pins nothing afterwards, even if its thread has yet to begin."""
        self._is_over = True
        with self._at_work:
            pass

    def _pin_groups(self, groups: Sequence[Sequence[Slot]]) -> None:
        for group in groups:
            try:
                # under the lock, so that `end` returns only when no registration is under way
                with self._at_work:
                    if not self._is_over:
                        self._pin(group)
            except BaseException as failure:
                self._failure.note(failure)
                self._is_over = True
            finally:
                self._coming[group[0].address].set()

    def _pin(self, slots: Sequence[Slot]) -> None:
        address, nbytes = slots[0].address, sum(len(slot.view) for slot in slots)
        # First: after the call, Ctrl-C may come before anything else. Unregistering what is not registered is harmless.
        self._state.cleanups.append(partial(self._writer.unpin, address))
        try:
            with span(self._observer, "init", track="pinning"):
                with suppress(OSError):  # then registering has more to do
                    populate(address, nbytes, write=True)
                self._writer.pin(address, nbytes, read_only=False)
        except PinError as refusal:
            was_over, self._is_over = self._is_over, True
            if not was_over:  # else the other thread was refused, too
                self._state.fallbacks.append(f"the ring is not pinned, copies are slower: {refusal}")
        else:
            self._state.pinned_nbytes += nbytes
            for slot in slots:
                slot.pinned = True
