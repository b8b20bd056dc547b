"""Carries out a plan: the only threads of the package.

Readers (threads) fill staging slots, and fault in mapped windows ahead of time. The calling thread does everything that
touches the target: it registers windows and submits copies, in whichever order the parts become ready. Readers with
nothing left to fill take windows from the far end of the queue and send them through staging, because registering
pages is slower than the PCIe link, and no second thread makes it faster.

Readers never touch the target: the driver serialises its callers, so a copy submitted by a reader would wait behind
each registration. The first failure of any thread cancels the others and is raised when they have ended.
"""

from __future__ import annotations

import threading
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from time import sleep
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from wan_loader.engine.board import Board, CancelledError, Filled, Window
from wan_loader.events import span
from wan_loader.linux import forget, map_file, populate, unmap
from wan_loader.plan import Way
from wan_loader.staging import Slot, Staging
from wan_loader.transfer.base import PinError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from wan_loader.events import Observer
    from wan_loader.plan import Block, Plan
    from wan_loader.source.reader import Reader
    from wan_loader.transfer.base import Destination, Target

__all__ = ["Carried", "EngineSettings", "carry_out"]

#: How long a failed load waits for its clean-up, which goes on by itself after that.
_END_SECONDS = 0.9


class Prepared(Protocol):
    """What `prepare` returns."""

    @property
    def destinations(self) -> Sequence[Destination]:
        """Where each storage of the plan goes."""


P = TypeVar("P", bound=Prepared)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """How many threads and how much memory a load may use."""

    threads: int
    """Readers."""
    slot_bytes: int
    """Size of a staging slot: larger blocks pass through it in parts."""
    n_slots: int
    may_steal: bool = False
    """Whether idle readers send mapped windows through staging."""


@dataclass(slots=True)
class Carried:
    """What was done: bytes by way, memory used, the reasons for every way not taken."""

    nbytes: dict[Way, int] = field(default_factory=lambda: dict.fromkeys(Way, 0))
    staging_nbytes: int = 0
    pinned_nbytes: int = 0
    registered_nbytes: int = 0
    refusals: list[str] = field(default_factory=list)
    cleanups: list[Callable[[], bool]] = field(default_factory=list)
    """What unregisters and unmaps the places that the copies came from, to be called last first."""

    def release(self, pause_s: float = 0.0) -> None:
        """Unregister and unmap. In any thread, after the target has finished.

        Pauses between the steps leave the driver's lock to whoever else uses the device.
        """
        while self.cleanups:
            if not self.cleanups[-1]():
                return  # still registered: what lies below must stay mapped
            self.cleanups.pop()
            if pause_s:
                sleep(pause_s)


def carry_out(
    plan: Plan,
    reader: Reader,
    target: Target,
    settings: EngineSettings,
    prepare: Callable[[], P],
    observer: Observer | None = None,
) -> tuple[P, Carried]:
    """Move every block of the plan into the target and wait until it has arrived.

    `prepare` allocates the destinations and returns them. It runs first: beside reader threads it would wait for the
    interpreter at every tensor, which takes ten times longer than to allocate one. The caller must call `release` on
    the `Carried`. Raises the first failure of any thread; then everything is released.
    """
    load = _Load(plan, reader, target, settings, prepare, observer)
    carried = load.run()
    assert load.prepared is not None
    return load.prepared, carried


class _Load(Generic[P]):
    def __init__(
        self,
        plan: Plan,
        reader: Reader,
        target: Target,
        settings: EngineSettings,
        prepare: Callable[[], P],
        observer: Observer | None,
    ) -> None:
        self._reader = reader
        self._target = target
        self._settings = settings
        self._prepare = prepare
        self._observer = observer
        self._board = Board(plan, settings.slot_bytes, may_steal=settings.may_steal)
        self._n_readers = settings.threads if plan.blocks else 0
        self._needs_slots = settings.may_steal or any(b.way is not Way.MAPPED for b in plan.blocks)
        self._staging: Staging | None = None
        self._carried = Carried()
        self._pin_slots = target.can_pin
        self.prepared: P | None = None

    def run(self) -> Carried:
        threads = [
            threading.Thread(target=self._guarded, args=(self._read_all,), name=f"reader {i}", daemon=True)
            for i in range(self._n_readers)
        ]
        try:
            self.prepared = self._prepare()
            self._target.bind(self.prepared.destinations)
            if self._needs_slots:
                self._add_staging()
            for thread in threads:
                thread.start()
            self._submit_all()
            with span(self._observer, "wait"):
                self._target.finish()
            for thread in threads:
                thread.join()
        except BaseException:
            self._board.cancel()
            self._abandon(threads)
            raise
        self._carried.refusals += self._reader.refusals
        return self._carried

    def _abandon(self, threads: list[threading.Thread]) -> None:
        """End everything after a failure, within a second.

        In a thread that gets no signals: a second Ctrl-C ends the waiting, not the clean-up, and copies that still run
        keep what they read and write. A reader that hangs in a system call keeps its memory until it returns.
        """
        ending = threading.Thread(target=self._end, args=(threads,), name="release", daemon=True)
        ending.start()
        ending.join(_END_SECONDS)

    def _end(self, threads: list[threading.Thread]) -> None:
        for thread in threads:
            if thread.ident is not None:
                thread.join()
        with suppress(BaseException):  # the failure that brought us here is the one to raise
            self._target.finish()
        self._carried.release()

    # other threads

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except CancelledError:
            pass
        except BaseException as failure:
            self._board.fail(failure)

    def _read_all(self) -> None:
        while (block := self._board.take()) is not None:
            self._board.put(self._fault_in(block) if block.way is Way.MAPPED else self._fill(block))

    def _fault_in(self, block: Block) -> Window:
        start, nbytes = block.page_start, block.page_end - block.page_start
        with span(self._observer, "read", block.nbytes):
            try:
                address = map_file(self._reader.fds[block.file], start, nbytes)
                self._carried.cleanups.append(partial(unmap, address, nbytes))
                populate(address, nbytes)
            except OSError as error:
                raise self._reader.failed(block.file, start, nbytes, error) from error
        return Window(block, address)

    def _fill(self, block: Block) -> Filled:
        with span(self._observer, "wait"):
            slot = self._board.acquire_slot()
            if slot.pending is not None:
                slot.pending.wait()
        with span(self._observer, "read", block.nbytes):
            slot.data_start, way = self._reader.read(block, slot.view)
        return Filled(block, slot, way)

    # the carrying thread

    def _submit_all(self) -> None:
        while (ready := self._board.next_ready()) is not None:
            if isinstance(ready, Filled):
                self._submit_slot(ready)
            elif not self._target.can_pin or self._pin_window(ready):
                self._submit_window(ready)

    def _add_staging(self) -> None:
        self._staging = Staging(self._settings.slot_bytes, self._settings.n_slots)
        self._carried.cleanups.append(self._staging.close)
        self._carried.staging_nbytes = self._staging.nbytes
        self._board.add_slots(self._staging.slots)

    def _submit_slot(self, filled: Filled) -> None:
        block, slot = filled.block, filled.slot
        if self._pin_slots and not slot.pinned:
            self._pin_slot(slot)
        slot.pending = self._target.submit(slot.address + slot.data_start, block.start, block.pieces)
        self._carried.nbytes[filled.way] += block.nbytes
        self._board.submitted(slot)

    def _pin_slot(self, slot: Slot) -> None:
        """Pin a slot when it is first used: its pages are there by then, which makes it cheap."""
        # First: after the call, Ctrl-C may come before anything else. Unregistering what is not registered is harmless.
        self._carried.cleanups.append(partial(self._target.unpin, slot.address))
        try:
            with span(self._observer, "init"):
                self._target.pin(slot.address, len(slot.view), read_only=False)
        except PinError as refusal:
            self._pin_slots = False
            self._carried.refusals.append(f"staging is not pinned, copies are slower: {refusal}")
        else:
            slot.pinned = True
            self._carried.pinned_nbytes += len(slot.view)

    def _pin_window(self, window: Window) -> bool:
        """False if the driver refuses: the window then comes back through staging."""
        block, nbytes = window.block, window.block.page_end - window.block.page_start
        self._carried.cleanups.append(partial(self._target.unpin, window.address))
        try:
            with span(self._observer, "register", block.nbytes):
                self._target.pin(window.address, nbytes, read_only=True)
        except PinError as refusal:
            self._refused(window, refusal)
            return False
        self._carried.registered_nbytes += nbytes
        return True

    def _submit_window(self, window: Window) -> None:
        block = window.block
        if self._target.submit(window.address, block.page_start, block.pieces) is None:
            forget(window.address, block.page_end - block.page_start)
        self._carried.nbytes[Way.MAPPED] += block.nbytes
        self._board.submitted()

    def _refused(self, window: Window, refusal: PinError) -> None:
        self._carried.refusals.append(f"page-cache pages are not registered, read through staging: {refusal}")
        if self._staging is None:
            self._add_staging()
        self._board.give_up_windows(window)
