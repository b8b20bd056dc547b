"""Ctrl-C at bad moments: memory that is registered with a driver is never unmapped before it is unregistered."""

import gc
import os
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from engine_runs import Batch, run_transfer

from wan_loader.engine.open_files import OpenFiles
from wan_loader.formats.checkpoint_facts import stat_file
from wan_loader.plan.blocks import ByteRange, Transport, plan_blocks
from wan_loader.plan.engine_settings import EngineSettings, TransferMode
from wan_loader.system import posix_aio
from wan_loader.system.posix import PAGE

MiB = 1 << 20


def is_mapped(address):
    with open("/proc/self/maps") as f:
        ranges = (stream.split()[0].split("-") for stream in f)
        return any(int(low, 16) <= address < int(high, 16) for low, high in ranges)


class DeviceWriter:
    """Keeps count of what is registered, as a driver does; can interrupt where told."""

    can_pin = True

    def __init__(self, *, interrupt_pin=False, interrupt_finish=0, pin_s=0.0):
        self.registered = set()
        self.interrupt_pin = interrupt_pin
        self.pin_s = pin_s
        self.interrupt_finish = interrupt_finish
        self.unmapped_first = []

    def bind(self, destinations):
        pass

    def pin(self, address, nbytes, *, read_only):
        time.sleep(self.pin_s)
        self.registered.add(address)
        if self.interrupt_pin:
            self.interrupt_pin = False  # once: a second one may end the cleaning up
            signal.raise_signal(signal.SIGINT)

    def unpin(self, address):
        if address in self.registered and not is_mapped(address):
            self.unmapped_first.append(address)
        self.registered.discard(address)
        return True

    def stream(self):
        return self

    def submit(self, sources):
        return SimpleNamespace(wait=lambda: None, done=lambda: True)

    def arrived(self):
        return []

    def finish(self):
        if self.interrupt_finish:
            self.interrupt_finish -= 1
            raise KeyboardInterrupt


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "data"
    path.write_bytes(os.urandom(8 * MiB))
    return str(path)


def carry(path, writer, transport):
    blocks = tuple(plan_blocks([ByteRange(0, 0, 0, 8 * MiB)], block_bytes=MiB, transport=lambda *_: transport))
    settings = EngineSettings(threads=2, slot_bytes=MiB, n_slots=4)
    with OpenFiles([stat_file(path)]) as reader:
        return run_transfer([Batch(blocks, list)], reader, writer, settings)


def check(writer):
    deadline = time.monotonic() + 5
    while writer.registered and time.monotonic() < deadline and any(t.name == "release" for t in threading.enumerate()):
        time.sleep(0.01)
    gc.collect()
    assert not writer.unmapped_first
    assert all(is_mapped(address) for address in writer.registered)


@pytest.mark.parametrize("transport", [Transport.MAPPED, Transport.BUFFERED])
def test_right_after_registering(path, transport):
    writer = DeviceWriter(interrupt_pin=True)
    with pytest.raises(KeyboardInterrupt):
        carry(path, writer, transport)
    check(writer)
    assert not writer.registered


@pytest.mark.parametrize("times", [1, 2])
def test_while_waiting_for_the_last_copies(path, times):
    writer = DeviceWriter(interrupt_finish=times)
    with pytest.raises(KeyboardInterrupt):
        carry(path, writer, Transport.BUFFERED)
    check(writer)


@pytest.mark.parametrize("moment", [0.1, 0.25])
def test_while_windows_are_registered(path, moment):
    """What the other thread still does is waited for before anything is given back."""
    writer = DeviceWriter(pin_s=0.1)
    interrupt = threading.Timer(moment, os.kill, (os.getpid(), signal.SIGINT))
    interrupt.start()
    with pytest.raises(KeyboardInterrupt):
        carry(path, writer, Transport.MAPPED)
    interrupt.join()
    check(writer)
    assert not writer.registered


def test_a_forgotten_result_stays_mapped(path):
    writer = DeviceWriter()
    carry(path, writer, Transport.BUFFERED)
    gc.collect()
    assert writer.registered
    assert all(is_mapped(address) for address in writer.registered)


@pytest.mark.parametrize(("name", "transport"), [("mapper", Transport.MAPPED), ("pinning", Transport.BUFFERED)])
def test_just_before_a_thread_begins(path, monkeypatch, name, transport):
    """Nobody waits for a thread that is not there: all is given back."""
    plain, writer = threading.Thread.start, DeviceWriter()

    def start(thread):
        if thread.name == name:
            raise KeyboardInterrupt
        plain(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(KeyboardInterrupt):
        carry(path, writer, transport)
    assert not any(thread.name == "release" for thread in threading.enumerate())
    check(writer)


def mappings_of(path):
    return sum(path in stream for stream in Path("/proc/self/maps").read_text().splitlines())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # signals in Python's own clean-up
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # and in its Event.wait
@pytest.mark.parametrize(
    ("transport", "by_threads"), [(Transport.MAPPED, False), (Transport.BUFFERED, False), (Transport.BUFFERED, True)]
)
def test_nothing_stays_mapped_or_open(path, monkeypatch, transport, by_threads):
    """Whenever a signal comes, also between the system call and the note of its result."""
    monkeypatch.setattr(posix_aio, "_orphaned", by_threads)

    class ComeError(BaseException):  # as KeyboardInterrupt is
        pass

    def come(signum, frame):
        raise ComeError

    class QuietAfterwards(DeviceWriter):
        can_pin = not by_threads

        def finish(self):
            signal.setitimer(signal.ITIMER_REAL, 0)

    blocks = tuple(plan_blocks([ByteRange(0, 0, 0, 8 * MiB)], block_bytes=4 * PAGE, transport=lambda *_: transport))
    settings = EngineSettings(threads=8, slot_bytes=4 * PAGE, n_slots=8, mode=TransferMode.MAPPED_HERE, faults_in=False)
    before = signal.signal(signal.SIGALRM, come)
    n_came, fds = 0, len(os.listdir("/proc/self/fd"))
    try:
        for i in range(400):
            with OpenFiles([stat_file(path)]) as reader:
                try:
                    signal.setitimer(signal.ITIMER_REAL, 0.0005 + i * 1e-5)
                    stats = run_transfer([Batch(blocks, list)], reader, QuietAfterwards(), settings)
                except (ComeError, RuntimeError):  # Event.wait may find its lock lost to a signal
                    n_came += 1
                else:
                    stats.release()
    finally:
        signal.signal(signal.SIGALRM, before)
    assert n_came > 100
    assert mappings_of(path) == 0
    assert len(os.listdir("/proc/self/fd")) == fds
