"""Slots pinned in the background while others are pinned, refused or given back: no release beside a registration."""

import contextlib
import os
import threading
import time
import weakref
from types import SimpleNamespace

import pytest
from engine_runs import Batch, run_transfer

from wan_loader.devices.writer import PinError
from wan_loader.engine import TransferState
from wan_loader.engine.open_files import OpenFiles
from wan_loader.engine.pinned_ring import PinnedRing
from wan_loader.engine.pinning import Pinning
from wan_loader.errors import DeviceError
from wan_loader.formats.checkpoint_facts import stat_file
from wan_loader.plan.blocks import ByteRange, Transport, plan_blocks
from wan_loader.plan.engine_settings import EngineSettings

pytestmark = pytest.mark.timeout(10)

MiB = 1 << 20


class DeviceWriter:
    """Registers in `pin`, which a test may make slow or have refuse."""

    can_pin = True

    def __init__(self, before=lambda n: None):
        self.registered = {}
        self.n_pins = 0
        self.busy = 0
        self.released_too_early = []
        self._before = before

    def pin(self, address, nbytes, *, read_only):
        self.n_pins += 1
        self.busy += 1
        try:
            self._before(self.n_pins)
            self.registered[address] = nbytes
        finally:
            self.busy -= 1

    def unpin(self, address):
        if self.busy:
            self.released_too_early.append(address)
        self.registered.pop(address, None)
        return True

    def bind(self, destinations):
        self.bound = destinations

    def stream(self):
        return self

    def submit(self, sources):
        return SimpleNamespace(wait=lambda: None, done=lambda: True)

    def arrived(self):
        return []

    def finish(self):
        pass


@pytest.fixture
def ring():
    ring = PinnedRing(MiB, 8)
    yield ring
    ring.close()


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "data"
    path.write_bytes(os.urandom(6 * MiB))
    return str(path)


def carry(path, writer, each, allocate=list):
    blocks = tuple(plan_blocks([ByteRange(0, 0, 0, 6 * MiB)], block_bytes=MiB, transport=lambda *_: Transport.BUFFERED))
    batches = (Batch(blocks[i : i + each], allocate) for i in range(0, len(blocks), each))
    with OpenFiles([stat_file(path)]) as reader:
        return run_transfer(batches, reader, writer, EngineSettings(threads=2, slot_bytes=MiB, n_slots=8))


def in_main():
    return threading.current_thread() is threading.main_thread()


def test_a_refusal_between_copies_does_not_leave_the_background_behind(path):
    """Else the load ends, and its memory is given back, while some of it is being registered."""

    def before(n):
        if in_main():
            deadline = time.monotonic() + 0.3
            while writer.busy < 2 and time.monotonic() < deadline:
                time.sleep(0.001)
            raise PinError("refused")
        time.sleep(0.2)

    writer = DeviceWriter(before)
    stats = carry(path, writer, each=2)
    assert stats.pinned_nbytes == sum(writer.registered.values())
    stats.release()
    assert not writer.released_too_early
    assert not writer.registered


def test_one_refusal_is_reported_once(ring):
    """Of two threads that both ask at that moment."""
    both = threading.Barrier(2)

    def before(n):
        with contextlib.suppress(threading.BrokenBarrierError):
            both.wait(0.3)
        raise PinError("refused")

    stats = TransferState()
    pinning = Pinning(DeviceWriter(before), stats, None)
    pinning.begin(ring.slots[:2])
    pinning.need(ring.slots[5])
    pinning.end()
    assert len(stats.fallbacks) == 1


def test_a_thread_that_never_began_is_not_waited_for(ring, monkeypatch):
    """Ctrl-C just before it would have."""

    def start(thread):
        raise KeyboardInterrupt

    stats = TransferState()
    pinning = Pinning(DeviceWriter(), stats, None)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        with pytest.raises(KeyboardInterrupt):
            pinning.begin(ring.slots)
    ending = threading.Thread(target=pinning.end, daemon=True)
    ending.start()
    ending.join(1)
    assert not ending.is_alive()


def test_what_is_not_pinned_yet_at_the_end_never_is(ring):
    began = threading.Event()

    def before(n):
        began.set()
        time.sleep(0.05)

    writer = DeviceWriter(before)
    pinning = Pinning(writer, TransferState(), None)
    pinning.begin(ring.slots)
    began.wait()
    pinning.end()
    assert writer.n_pins == 1
    time.sleep(0.1)
    assert writer.n_pins == 1


def test_a_failure_keeps_nothing_alive(path):
    """No cycle through the error: what was allocated for the weights goes at once."""

    class Weights(list):
        pass

    kept = []

    def allocate():
        weights = Weights()
        kept.append(weakref.ref(weights))
        return weights

    def before(n):
        raise DeviceError("boom")

    others = threading.enumerate()  # of tests before this one
    with contextlib.suppress(DeviceError):
        carry(path, DeviceWriter(before), 100, allocate)
    for thread in threading.enumerate():
        if thread not in others:
            thread.join()
    assert [ref() for ref in kept] == [None]
