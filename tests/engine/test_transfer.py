"""The engine, real files, a fake device: each byte arrives once, slots are not reused early, a failure ends all."""

import errno
import itertools
import os
import random
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from engine_runs import Batch, run_transfer
from fake_device import FakeDevice

from wan_loader.engine import transfer as carry
from wan_loader.engine.activity import loading
from wan_loader.engine.open_files import OpenFiles
from wan_loader.errors import CheckpointError, DeviceError
from wan_loader.events import Recorder
from wan_loader.formats.checkpoint_facts import stat_file
from wan_loader.plan.blocks import ByteRange, Transport, plan_blocks
from wan_loader.plan.engine_settings import EngineSettings, TransferMode
from wan_loader.system import posix_aio
from wan_loader.system.posix import PAGE
from wan_loader.system.posix_aio import AioRequest, PosixAio

pytestmark = pytest.mark.timeout(10)

KiB = 1 << 10
SLOT = 64 * KiB
SHARED, HERE = {"mode": TransferMode.SHARED}, {"mode": TransferMode.MAPPED_HERE}
WAYS = [Transport.MAPPED, Transport.DIRECT, Transport.BUFFERED]


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "weights"
    path.write_bytes(random.Random(1).randbytes(1500 * KiB + 321))
    return path


def batches(planned, each, allocate):
    """`each` blocks at a time; `allocate` is told how many storages they are the first to need."""
    done = 0
    for i in range(0, len(planned), each):
        blocks = planned[i : i + each]
        count = blocks[-1].segments[-1].storage + 1 - done
        done += count
        yield Batch(blocks, lambda count=count: allocate(count))


@pytest.fixture
def load(path):
    """Carry out a plan over the file; returns what is needed to judge it."""
    devices = []
    size = path.stat().st_size
    borders = [7, 8, 3000, 70_001, 70_002, 400_000, 401_000, 1_200_000, size]

    def load(
        transport,
        *,
        threads=4,
        n_slots=6,
        mode=TransferMode.STAGED,
        faults_in=True,
        block_bytes=4 * SLOT,
        each=100,
        observer=None,
        allocate=lambda n: range(n),
        **device,
    ):
        byte_ranges = [ByteRange(i, 0, a, b) for i, (a, b) in enumerate(itertools.pairwise(borders))]
        writer = FakeDevice([e.end - e.start for e in byte_ranges], **device)
        devices.append(writer)
        settings = EngineSettings(
            threads=threads,
            slot_bytes=SLOT,
            n_slots=n_slots,
            mode=mode,
            faults_in=faults_in,
        )
        choose = transport if callable(transport) and not isinstance(transport, Transport) else lambda *_: transport
        with OpenFiles([stat_file(str(path))]) as reader:
            if not reader.open_direct(0):
                pytest.skip("O_DIRECT is refused here")
            blocks = tuple(plan_blocks(byte_ranges, block_bytes=block_bytes, transport=choose))
            try:
                stats = run_transfer(batches(blocks, each, allocate), reader, writer, settings, observer)
            except BaseException as error:
                error.writer = writer
                raise
        return SimpleNamespace(writer=writer, stats=stats, blocks=blocks, byte_ranges=byte_ranges)

    load.devices = devices
    yield load
    for device in devices:
        device.close()


def nbytes_by_way(blocks):
    return {transport: sum(block.nbytes for block in blocks if block.transport is transport) for transport in Transport}


def check(result, path):
    """Every byte arrived, once; three threads at most told the device writer; everything was unpinned."""
    data = path.read_bytes()
    for byte_range, memory, arrived in zip(
        result.byte_ranges, result.writer.memory, result.writer.n_copied, strict=True
    ):
        assert bytes(memory) == data[byte_range.start : byte_range.end]
        assert set(arrived) == {1}
    assert len(result.writer.threads) <= 3
    assert sum(result.stats.nbytes.values()) == result.blocks[-1].end - result.blocks[0].start
    result.stats.release()
    assert result.writer.pinned == {}
    assert engine_threads() == set()
    assert mappings_of(path) == 0


@pytest.fixture(autouse=True)
def strays():
    """Threads that others have left: Ctrl-C in the middle of Python's own Event.wait may leave one waiting for ever."""
    _strays.clear()
    _strays.update(threading.enumerate())


_strays = set()


def engine_threads():
    """Names of the engine's threads that stay. One whose work is over may still be on its way out."""
    threads = [t for t in set(threading.enumerate()) - _strays if t.name in ("mapper", "pinning")]
    for thread in threads:
        thread.join(1)
    return {t.name for t in threads if t.is_alive()}


def mappings_of(path):
    return sum(str(path) in stream for stream in Path("/proc/self/maps").read_text().splitlines())


def anonymous_bytes():
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


# success


@pytest.fixture
def no_more_threads(load, monkeypatch):
    """As under a limit of processes: only what stands for a device may start one."""
    plain = threading.Thread.start

    def start(thread):
        if thread.name != "fake device":
            raise RuntimeError("can't start new thread")
        plain(thread)

    monkeypatch.setattr(threading.Thread, "start", start)


@pytest.mark.usefixtures("no_more_threads")
@pytest.mark.parametrize("transport", WAYS)
def test_without_further_threads(load, path, transport):
    result = load(transport, block_bytes=SLOT, each=3)
    assert result.stats.fallbacks[:1] == [
        "no further thread may be started: pages are mapped first, others read later"
    ] * (transport is Transport.MAPPED)
    check(result, path)


@pytest.mark.usefixtures("no_more_threads", "clean")
@pytest.mark.parametrize("transport", WAYS)
def test_failure_without_further_threads(load, transport):
    error = fails_within_a_second(
        DeviceError, lambda: load(transport, block_bytes=SLOT, fail_at=(2, DeviceError("boom")))
    )
    assert error.writer.pinned == {}


@pytest.mark.parametrize("transport", WAYS)
@pytest.mark.parametrize("threads", [1, 2, 7, 32])
@pytest.mark.parametrize("can_pin", [True, False])
def test_every_byte_arrives_once(load, path, transport, threads, can_pin):
    """Nothing is copied out of a mapping unless the device fetches it: the processor would die if the file shrank."""
    result = load(transport, threads=threads, n_slots=threads * 2, can_pin=can_pin)
    taken = Transport.BUFFERED if transport is Transport.MAPPED and not can_pin else transport
    assert {transport for transport, nbytes in result.stats.nbytes.items() if nbytes} == {taken}
    assert result.stats.fallbacks == []
    check(result, path)


@pytest.mark.usefixtures("clean")
@pytest.mark.parametrize("transport", [Transport.DIRECT, Transport.BUFFERED])
def test_reads_by_python_threads(load, path, monkeypatch, transport):
    monkeypatch.setattr(posix_aio, "_orphaned", True)
    result = load(transport, block_bytes=SLOT, each=3, delay_s=0.001)
    assert "read by Python threads" in result.stats.fallbacks[0]
    check(result, path)
    error = DeviceError("boom")
    assert fails_within_a_second(error, lambda: load(transport, block_bytes=SLOT, fail_at=(2, error))) is error


@pytest.mark.parametrize("each", [1, 3, 100])
@pytest.mark.parametrize("mode", [TransferMode.SHARED, TransferMode.STAGED])
@pytest.mark.parametrize("transport", WAYS)
def test_portions(load, path, transport, mode, each):
    """Nothing is copied before its storage is there, whatever comes first."""
    check(load(transport, block_bytes=SLOT, each=each, mode=mode, pin_s=0.001), path)


def test_a_portion_is_made_when_little_is_left(load, path):
    """Not all at once: what comes first is on its way meanwhile."""
    seen = []

    def allocate(count):
        seen.append(load.devices[-1].n_submits)
        return range(count)

    check(load(Transport.BUFFERED, block_bytes=SLOT, each=4, n_slots=2, allocate=allocate, delay_s=0.002), path)
    assert len(seen) == 6
    assert seen[0] == 0
    assert seen[2] < seen[3] < seen[4] < seen[5]


def test_slow_reads_do_not_keep_mapping_waiting(load, path, monkeypatch):
    """Mapping begins once everything is drawn, and drawing waits for no read."""
    plain, waited_s, asked = AioRequest.result, [], []

    def wait_any(requests, timeout_s):
        waited_s.append(timeout_s)
        time.sleep(timeout_s)

    def late(request):
        """Done once mapping has begun, and not at the first look."""
        asked.append(request)
        return plain(request) if load.devices[-1].n_pins and asked[1:] else None

    monkeypatch.setattr(AioRequest, "result", late)
    monkeypatch.setattr(PosixAio, "wait_any", staticmethod(wait_any))
    check(load(Transport.MAPPED, block_bytes=SLOT, each=2, n_slots=2, mode=TransferMode.SHARED), path)
    assert waited_s, "the ring was at work, too"
    assert sum(waited_s) < 0.5


@pytest.mark.parametrize("each", [2, 100])
def test_three_ways_in_one_plan(load, path, each):
    result = load(lambda file, start, end: WAYS[start // SLOT % 3], block_bytes=SLOT, each=each)
    assert all(result.stats.nbytes.values())
    assert result.stats.nbytes == nbytes_by_way(result.blocks)
    check(result, path)


@pytest.mark.parametrize("n_slots", [1, 2, 3])
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("transport", [Transport.DIRECT, Transport.BUFFERED])
def test_a_slot_is_not_reused_before_its_ticket_is_done(load, path, transport, threads, n_slots):
    result = load(transport, threads=threads, n_slots=n_slots, delay_s=0.003)
    assert len(result.writer.addresses) <= n_slots * 2
    assert result.stats.ring_nbytes == n_slots * (SLOT + PAGE)
    check(result, path)


@pytest.mark.parametrize("n_slots", [1, 2])
def test_more_readers_than_slots_do_not_deadlock(load, path, n_slots):
    for _ in range(4):
        check(load(Transport.BUFFERED, threads=8, n_slots=n_slots), path)


def test_stealing(load, path):
    result = load(Transport.MAPPED, mode=TransferMode.SHARED, pin_s=0.02, block_bytes=SLOT)
    assert result.stats.nbytes[Transport.BUFFERED] > 0
    assert result.stats.nbytes[Transport.MAPPED] > 0
    assert result.stats.fallbacks == []
    check(result, path)


@pytest.mark.parametrize("each", [1, 3, 100])
@pytest.mark.parametrize("faults_in", [True, False])
def test_mapping_alone_needs_no_other_thread(load, path, each, faults_in):
    seen = Recorder()
    result = load(
        Transport.MAPPED, block_bytes=SLOT, each=each, mode=TransferMode.MAPPED_HERE, faults_in=faults_in, observer=seen
    )
    assert result.writer.threads == {threading.get_ident()}
    assert result.stats.nbytes[Transport.BUFFERED] == result.stats.ring_nbytes == 0
    assert ("read" in {span.name for span in seen.spans}) == faults_in
    check(result, path)


@pytest.mark.parametrize("each", [1, 2, 7])
def test_mapping_here_stays_here_when_some_is_staged(load, path, each):
    """The reading thread draws mapped blocks, too: they are not taken by two threads then."""
    mapping = set()

    def refuse(n, read_only):
        if read_only:
            mapping.add(threading.get_ident())

    transports = [Transport.MAPPED, Transport.BUFFERED]
    result = load(
        lambda file, start, end: transports[start // SLOT % 2],
        block_bytes=SLOT,
        each=each,
        mode=TransferMode.MAPPED_HERE,
        refuse=refuse,
    )
    assert mapping == {threading.get_ident()}
    assert result.stats.nbytes == nbytes_by_way(result.blocks)
    check(result, path)


def test_mapping_alone_begins_before_the_last_portion_is_made(load, path):
    pins = []

    def allocate(count):
        pins.append(load.devices[-1].n_pins)
        return range(count)

    check(load(Transport.MAPPED, block_bytes=SLOT, each=4, mode=TransferMode.MAPPED_HERE, allocate=allocate), path)
    assert pins == [0, 4, 8, 12, 16, 20][: len(pins)]


def test_without_stealing_everything_stays_mapped(load, path):
    result = load(Transport.MAPPED, pin_s=0.005, block_bytes=SLOT)
    assert result.stats.nbytes[Transport.BUFFERED] == 0
    assert result.stats.ring_nbytes == 0
    check(result, path)


@pytest.mark.parametrize(
    "how",
    [
        {"mode": TransferMode.SHARED},
        {},
        {"mode": TransferMode.MAPPED_HERE},
        {"mode": TransferMode.MAPPED_HERE, "each": 2},
    ],
)
@pytest.mark.parametrize("refused_from", [1, 2, 5])
def test_refused_mapped_blocks_go_through_the_ring(load, path, refused_from, how):
    registrations = iter(range(1, 1000))
    result = load(
        Transport.MAPPED,
        **how,
        block_bytes=SLOT,
        refuse=lambda n, read_only: read_only and next(registrations) >= refused_from,
    )
    assert result.stats.nbytes[Transport.BUFFERED] > 0
    (refusal,) = result.stats.fallbacks
    assert "refused by the fake" in refusal
    assert "regist" in refusal
    assert next(registrations) == refused_from + 1, "asked for once more after the refusal"
    assert (result.writer.threads == {threading.get_ident()}) == (how.get("mode") is TransferMode.MAPPED_HERE)
    check(result, path)


@pytest.mark.parametrize("how", [SHARED, {}, {**HERE, "each": 2}])
@pytest.mark.parametrize("code", [errno.ENODEV, errno.ENOMEM])
@pytest.mark.parametrize("nth", [1, 4])
def test_files_that_cannot_be_mapped_go_through_the_ring(load, path, monkeypatch, nth, code, how):
    """A file system without mmap; more mappings than the kernel allows."""
    plain, calls = carry.map_file, iter(range(1, 1000))

    def failing(*args):
        if next(calls) >= nth:
            raise OSError(code, f"mmap: {os.strerror(code)}")
        return plain(*args)

    monkeypatch.setattr(carry, "map_file", failing)
    result = load(Transport.MAPPED, block_bytes=SLOT, **how)
    assert result.stats.nbytes[Transport.BUFFERED] > 0
    (refusal,) = result.stats.fallbacks
    assert os.strerror(code) in refusal
    assert next(calls) == nth + 1, "asked for once more after the refusal"
    check(result, path)


@pytest.mark.parametrize(("refused_from", "pinned"), [(1, 0), (2, 1), (3, 3), (4, 7), (5, 10)])
def test_an_unpinnable_ring_still_works(load, path, refused_from, pinned):
    result = load(Transport.BUFFERED, threads=4, n_slots=10, refuse=lambda n, read_only: n >= refused_from)
    assert result.stats.pinned_nbytes == pinned * (SLOT + PAGE)
    assert len([r for r in result.stats.fallbacks if "not pinned" in r]) == (refused_from < 5)
    assert result.writer.n_pins == min(refused_from, 4)
    check(result, path)


def test_slots_that_were_not_used_at_first_are_pinned_when_they_are(load, path):
    result = load(Transport.BUFFERED, threads=2, n_slots=8, each=3, block_bytes=SLOT, delay_s=0.002)
    assert result.writer.n_pins > 2
    assert result.stats.pinned_nbytes == sum(result.writer.pinned.values()) <= 8 * (SLOT + PAGE)
    check(result, path)


@pytest.mark.usefixtures("clean")
def test_pinning_that_fails_ends_the_load(load):
    def refuse(n, read_only):
        raise DeviceError("boom")

    error = fails_within_a_second(DeviceError, lambda: load(Transport.BUFFERED, refuse=refuse))
    assert error.writer.pinned == {}


@pytest.mark.usefixtures("clean")
def test_a_load_that_fails_waits_for_pinning(load):
    """Else its memory were given back while the driver registers it."""

    def allocate(count):
        raise DeviceError("boom")

    error = fails_within_a_second(DeviceError, lambda: load(Transport.BUFFERED, allocate=allocate, pin_s=0.2))
    assert error.writer.n_pins
    assert error.writer.pinned == {}


def test_the_ring_is_bounded(load, path):
    result = load(Transport.DIRECT, threads=8, n_slots=3, delay_s=0.001)
    assert result.writer.max_pinned <= 3 * (SLOT + PAGE)
    assert result.stats.pinned_nbytes <= result.stats.ring_nbytes == 3 * (SLOT + PAGE)
    check(result, path)


@pytest.mark.parametrize("transport", WAYS)
def test_slow_allocation_delays_nothing_but_the_submits(load, path, transport):
    def allocate(count):
        time.sleep(0.1)
        return range(count)

    check(load(transport, allocate=allocate), path)


@pytest.mark.parametrize(("transport", "waits"), [(Transport.MAPPED, True), (Transport.BUFFERED, False)])
def test_unregistering_windows_gives_way_to_other_loads(load, transport, waits):
    result = load(transport, block_bytes=SLOT)
    with loading():
        releasing = threading.Thread(target=result.stats.release, args=(0.001,))
        releasing.start()
        releasing.join(0.5)
        assert releasing.is_alive() == waits
        assert bool(result.writer.pinned) == waits
    releasing.join(5)
    assert result.writer.pinned == {}


# failure


@pytest.fixture
def clean(path):
    """Checks afterwards that a failed load left nothing: no thread, descriptor, mapping or ring."""
    fds, anonymous = len(os.listdir("/proc/self/fd")), anonymous_bytes()
    yield
    assert engine_threads() == set()
    assert len(os.listdir("/proc/self/fd")) == fds
    assert mappings_of(path) == 0
    assert anonymous_bytes() - anonymous < 32 << 20


def fails_within_a_second(error, call):
    start = time.monotonic()
    with pytest.raises(type(error) if isinstance(error, BaseException) else error) as caught:
        call()
    assert time.monotonic() - start < 1.0
    return caught.value


@pytest.mark.usefixtures("clean")
@pytest.mark.parametrize("transport", WAYS)
@pytest.mark.parametrize("after", [1, 3])
@pytest.mark.parametrize("error", [RuntimeError("submit failed"), KeyboardInterrupt(), SystemExit(3)], ids=repr)
def test_failing_submit(load, transport, after, error):
    raised = fails_within_a_second(error, lambda: load(transport, block_bytes=SLOT, fail_at=(after, error)))
    assert raised is error
    assert raised.writer.pinned == {}


@pytest.mark.usefixtures("clean")
@pytest.mark.parametrize("transport", [Transport.DIRECT, Transport.BUFFERED])
@pytest.mark.parametrize("nth", [1, 5])
def test_failing_read(load, path, monkeypatch, transport, nth):
    result, calls = AioRequest.result, iter(range(1, 1000))

    def failing(request):
        if (nbytes := result(request)) is not None and next(calls) >= nth:
            raise OSError(5, "Input/output error")
        return nbytes

    monkeypatch.setattr(AioRequest, "result", failing)
    error = fails_within_a_second(CheckpointError, lambda: load(transport))
    assert str(path) in str(error)
    assert error.writer.pinned == {}


@pytest.mark.usefixtures("clean")
@pytest.mark.parametrize(("place", "name", "code"), [(AioRequest, "start", errno.EAGAIN), (os, "dup", errno.ENOMEM)])
def test_read_that_cannot_be_queued(load, path, monkeypatch, place, name, code):
    original, calls = getattr(place, name), iter(range(1, 1000))

    def failing(*args):
        if next(calls) >= 3:
            raise OSError(code, os.strerror(code))
        return original(*args)

    monkeypatch.setattr(place, name, failing)
    error = fails_within_a_second(CheckpointError, lambda: load(Transport.BUFFERED))
    assert str(path) in str(error)


@pytest.mark.parametrize("transport", [Transport.DIRECT, Transport.BUFFERED])
@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENFILE])
@pytest.mark.parametrize("nth", [1, 3])
def test_no_descriptor_is_left(load, path, monkeypatch, transport, code, nth):
    """Rows then read from the file's own."""
    original, calls = os.dup, iter(range(1, 1000))

    def failing(fd):
        if next(calls) >= nth:
            raise OSError(code, os.strerror(code))
        return original(fd)

    monkeypatch.setattr(os, "dup", failing)
    result = load(transport)
    assert os.strerror(code) in result.stats.fallbacks[0]
    check(result, path)


@pytest.mark.parametrize("transport", [Transport.DIRECT, Transport.BUFFERED])
def test_short_reads_are_continued(load, path, monkeypatch, transport):
    start = AioRequest.start
    monkeypatch.setattr(AioRequest, "start", lambda r, fd, a, n, o: start(r, fd, a, min(n, 5 * PAGE), o))
    check(load(transport), path)


@pytest.mark.parametrize("transport", [Transport.DIRECT, Transport.BUFFERED])
def test_a_read_that_ends_inside_a_page_is_continued_the_same_way(load, path, monkeypatch, transport):
    result, refused = AioRequest.result, load(transport).stats.fallbacks

    def short(request):
        nbytes = result(request)
        return nbytes if nbytes is None or nbytes <= PAGE else nbytes - 100

    monkeypatch.setattr(AioRequest, "result", short)
    loaded = load(transport)
    assert loaded.stats.fallbacks == refused
    check(loaded, path)


def test_o_direct_refused_in_the_middle(load, path, monkeypatch):
    result, calls = AioRequest.result, iter(range(1, 1000))

    def refusing(request):
        if (nbytes := result(request)) is not None and next(calls) == 3:
            raise OSError(22, "Invalid argument")
        return nbytes

    monkeypatch.setattr(AioRequest, "result", refusing)
    loaded = load(Transport.DIRECT)
    assert loaded.stats.nbytes[Transport.BUFFERED] > 0
    assert len([r for r in loaded.stats.fallbacks if "O_DIRECT" in r]) == 1
    check(loaded, path)


@pytest.mark.usefixtures("clean")
@pytest.mark.parametrize("transport", WAYS)
@pytest.mark.parametrize("nth", [1, 2, 5])
def test_failing_allocation(load, transport, nth):
    calls = iter(range(1, 100))

    def allocate(count):
        if next(calls) >= nth:
            raise MemoryError("no room")
        return range(count)

    error = fails_within_a_second(MemoryError, lambda: load(transport, block_bytes=SLOT, each=4, allocate=allocate))
    assert error.writer.pinned == {}


@pytest.mark.usefixtures("clean")
@pytest.mark.parametrize("transport", WAYS)
@pytest.mark.parametrize("left", [0, 5000, 700_000])
def test_truncated_file(load, path, transport, left):
    def allocate(count):  # after the file was opened and planned, before much is read
        os.truncate(path, left)
        return range(count)

    error = fails_within_a_second(
        CheckpointError, lambda: load(transport, block_bytes=SLOT, threads=2, allocate=allocate)
    )
    assert str(path) in str(error)


@pytest.mark.usefixtures("clean")
@pytest.mark.parametrize("mode", [TransferMode.STAGED, TransferMode.SHARED])
def test_a_window_that_fails(load, mode):
    error = DeviceError("memory overlaps")

    def fail(n, read_only):
        if read_only:
            raise error

    raised = fails_within_a_second(
        DeviceError, lambda: load(Transport.MAPPED, block_bytes=SLOT, refuse=fail, delay_s=0.02, mode=mode)
    )
    assert raised is error


@pytest.mark.usefixtures("clean")
def test_ctrl_c(load, monkeypatch):
    interrupted = threading.Event()

    def interrupt():
        os.kill(os.getpid(), signal.SIGINT)
        interrupted.set()

    result, timer = AioRequest.result, threading.Timer(0.15, interrupt)
    monkeypatch.setattr(AioRequest, "result", lambda request: result(request) if interrupted.is_set() else None)
    timer.start()
    try:
        fails_within_a_second(KeyboardInterrupt, lambda: load(Transport.BUFFERED, threads=1))
    finally:
        timer.join()


def test_a_read_that_hangs_does_not_hold_up_the_failure(load, monkeypatch):
    """It sits in a system call; its memory stays until it ends."""
    let_go, error, calls, result = threading.Event(), RuntimeError("submit failed"), [], AioRequest.result

    def hang(request):
        if request not in calls:
            calls.append(request)
        return result(request) if request is calls[0] or let_go.is_set() else None

    monkeypatch.setattr(AioRequest, "result", hang)
    try:
        raised = fails_within_a_second(error, lambda: load(Transport.BUFFERED, threads=2, fail_at=(1, error)))
        assert raised.writer.pinned
    finally:
        let_go.set()
        for thread in threading.enumerate():
            if thread.name == "release":
                thread.join()
    assert raised.writer.pinned == {}
