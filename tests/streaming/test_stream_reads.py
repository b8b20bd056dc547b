"""Reads ahead: in the order of the course, into a bounded number of slots, and anew after a failure or out of turn."""

import ctypes
import os

import pytest

from wan_loader.devices.writer import PinError
from wan_loader.engine.open_files import OpenFiles
from wan_loader.engine.read_queue import ReadQueue
from wan_loader.errors import CheckpointError
from wan_loader.formats.checkpoint_facts import stat_file
from wan_loader.plan.blocks import ByteRange, Transport, plan_blocks
from wan_loader.streaming import slots as slots_module
from wan_loader.streaming.device import HostStreamDevice
from wan_loader.streaming.reads import Course, ReadAhead
from wan_loader.streaming.schedule import course
from wan_loader.streaming.slots import Slots
from wan_loader.system.posix import PAGE

N, N_BUFFERS, NBYTES = 5, 2, 3 * PAGE + 100


class LateDevice(HostStreamDevice):
    """Host memory that behaves as if copies took long."""

    copies_late = True

    def pin(self, address, nbytes, *, read_only):
        raise PinError("not today")


class Fence:
    """A copy that ends when somebody waits for it."""

    waited = 0

    def is_over(self):
        return False

    def wait(self):
        Fence.waited += 1


@pytest.fixture
def content():
    return os.urandom(N * NBYTES)


@pytest.fixture
def path(tmp_path, content):
    (tmp_path / "file").write_bytes(content)
    return str(tmp_path / "file")


@pytest.fixture
def started(monkeypatch):
    """The places in the file of all reads that were started."""
    places = []
    start = ReadQueue.start
    monkeypatch.setattr(ReadQueue, "start", lambda self, block: (places.append(block.start), start(self, block)))
    return places


@pytest.fixture
def reads(path, monkeypatch):
    monkeypatch.setattr(slots_module, "N_READS", 3)
    blocks = {
        n: list(
            plan_blocks(
                [ByteRange(0, 0, n * NBYTES, (n + 1) * NBYTES)], block_bytes=PAGE, transport=lambda *_: Transport.DIRECT
            )
        )
        for n in range(N)
    }
    slots = Slots(LateDevice(N_BUFFERS, 1), PAGE)
    with OpenFiles([stat_file(path)]) as files:
        reads = ReadAhead(files, blocks, course(N, N_BUFFERS), slots)
        yield reads
        reads.drop()
        slots.close()
    assert len(slots.fallbacks) == 1  # not pinned: said


def take(reads, number, fence=None):
    found = b""
    for host in reads.parts(number):
        found += ctypes.string_at(host.address, host.block.nbytes)
        reads.copied(fence)
    return found


def wanted(content, number):
    return content[number * NBYTES : (number + 1) * NBYTES]


def test_blocks_come_whole_in_any_order(reads, content):
    for number in [0, 1, 2, 3, 4, 1, 0, 2, 3, 3, 0, 4, 2]:
        assert take(reads, number) == wanted(content, number)


def test_nothing_is_read_twice_in_the_usual_order(reads, content, started):
    asked = [0, 1, 2, 3, 4, 1, 0, 2, 3, 4]
    for number in asked:
        assert take(reads, number, Fence()) == wanted(content, number)
        while reads.go_on():
            pass
    starts = [place // NBYTES for place in started]
    assert starts[: sum(len(reads._blocks[n]) for n in asked)] == [n for n in asked for _ in reads._blocks[n]]


def test_what_is_read_ahead_is_bounded_by_the_slots(reads, started):
    take(reads, 0)
    before = len(started)
    while reads.go_on():
        pass
    assert before <= len(started) == len(reads._blocks[0]) + 6
    assert reads.go_on() is False


def test_a_slot_is_filled_again_only_when_the_copy_out_of_it_is_over(reads, started):
    Fence.waited = 0
    take(reads, 0, Fence())
    n_parts = len(reads._blocks[0])
    while reads.go_on():
        pass
    # all slots are full again: each copy was waited for first
    assert Fence.waited == n_parts
    assert len(started) == n_parts + 6


def test_a_block_that_cannot_be_read_is_an_error_and_later_ones_come(reads, path, content):
    assert take(reads, 0) == wanted(content, 0)
    os.truncate(path, 2 * NBYTES)
    with pytest.raises(CheckpointError, match="truncated"):
        take(reads, 3)
    assert reads._queue is None
    with open(path, "r+b") as file:
        file.write(content)
    assert take(reads, 3) == wanted(content, 3)


def test_the_rate_of_the_first_reads_is_known(reads):
    assert reads.rate(0) is None
    take(reads, 0)
    assert reads.rate(0) > 0
    rate = reads.rate(0)
    reads.go_on()
    take(reads, 1)
    assert reads.rate(0) == rate  # from here on reads may have waited


def test_a_course_that_begins_elsewhere():
    usual = Course([0, 1], [2, 3, 4, 1, 0])
    assert usual.begun_at(4) == Course([4, 1, 0], [2, 3, 4, 1, 0])
    assert Course([0, 1], []).begun_at(1) == Course([1], ())
    assert usual.of({1: None, 4: None}) == Course([1], [4, 1])
