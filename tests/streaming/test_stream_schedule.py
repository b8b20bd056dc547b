"""Blocks and buffers: each block in its own, every block in its buffer when it runs, in whatever order they run."""

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wan_loader.errors import OptionError
from wan_loader.streaming.schedule import Schedule, course, following


class Log:
    """A device and a source that do nothing but note what they are asked."""

    def __init__(self, fail=()):
        self.calls = []
        self.holds = {}
        self.fail = set(fail)

    def fetch(self, block, buffer):
        self.calls.append(("fetch", block, buffer))
        self.holds[buffer] = block

    def ready(self, buffer):
        if self.holds[buffer] in self.fail:
            self.fail.discard(self.holds[buffer])
            raise OSError("no disk")

    def use(self, buffer):
        self.calls.append(("use", buffer))

    def used(self, buffer):
        self.calls.append(("used", buffer))

    def synchronize(self):
        self.calls.append(("synchronize",))


def started(n_blocks, n_buffers, **options):
    log = Log(**options)
    schedule = Schedule(n_blocks, n_buffers, log, log)
    schedule.start()
    return schedule, log


def run(schedule, block):
    schedule.enter(block)
    schedule.leave(block)


@given(st.integers(1, 12), st.integers(1, 6), st.integers(1, 4))
def test_in_their_order_all_blocks_come_in_time(n_blocks, n_buffers, n_forwards):
    n_buffers = min(n_blocks, n_buffers)
    schedule, log = started(n_blocks, n_buffers)
    for _ in range(n_forwards):
        for block in range(n_blocks):
            schedule.enter(block)
            assert log.holds[block % n_buffers] == block
            schedule.leave(block)
    assert schedule.n_late == 0


@given(st.integers(1, 8), st.integers(1, 4), st.lists(st.integers(0, 7), max_size=30))
def test_in_any_order_each_block_is_in_its_buffer(n_blocks, n_buffers, order):
    n_buffers = min(n_blocks, n_buffers)
    schedule, log = started(n_blocks, n_buffers)
    for block in (number % n_blocks for number in order):
        schedule.enter(block)
        assert log.holds[block % n_buffers] == block
        assert log.calls[-1] == ("use", block % n_buffers)
        schedule.leave(block)


@given(st.integers(1, 12), st.integers(1, 6))
def test_the_course_says_what_is_asked_for(n_blocks, n_buffers):
    n_buffers = min(n_blocks, n_buffers)
    schedule, log = started(n_blocks, n_buffers)
    for _ in range(3):
        for block in range(n_blocks):
            run(schedule, block)
    asked = [call[1] for call in log.calls if call[0] == "fetch"]
    expected = course(n_blocks, n_buffers)
    assert asked == [*expected.first, *expected.again * 3]


def test_the_next_block_for_a_buffer_is_asked_for_once_it_was_used():
    schedule, log = started(5, 2)
    log.calls.clear()
    run(schedule, 0)
    assert log.calls == [("use", 0), ("used", 0), ("fetch", 2, 0)]


def test_after_the_last_blocks_come_the_first():
    assert [following(block, 5, 2) for block in range(5)] == [2, 3, 4, 1, 0]
    assert following(1, 3, 3) == 1  # all have room: nothing moves


def test_a_block_that_comes_out_of_turn_waits_for_what_uses_its_buffer():
    schedule, log = started(6, 2)
    run(schedule, 0)  # block 2 is on its way to buffer 0
    log.calls.clear()
    schedule.enter(4)
    assert log.calls == [("used", 0), ("fetch", 4, 0), ("use", 0)]
    assert schedule.n_late == 1


def test_a_failed_read_is_tried_again():
    schedule, log = started(4, 2, fail=[1])
    with pytest.raises(OSError, match="no disk"):
        schedule.enter(1)
    assert not schedule.is_in(1)
    log.calls.clear()
    schedule.enter(1)
    assert ("fetch", 1, 1) in log.calls


def test_a_block_that_was_interrupted_is_waited_for():
    schedule, log = started(4, 2)
    schedule.enter(0)
    log.calls.clear()
    schedule.enter(1)
    assert log.calls[0] == ("synchronize",)


def test_two_threads_at_the_same_time_are_refused():
    schedule, _ = started(4, 2)
    entered = threading.Thread(target=schedule.enter, args=(0,))
    entered.start()
    entered.join()
    with pytest.raises(OptionError, match="block 0 is running in another thread"):
        schedule.enter(1)
