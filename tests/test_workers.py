"""Tasks by threads: all of them once; the first failure, a signal or `stop` ends them."""

import threading
import time

import pytest

from wan_loader.workers import StoppedError, run_all


def test_every_task_runs_once():
    done = []
    run_all([lambda i=i: done.append(i) for i in range(100)], threads=7, stop=threading.Event())
    assert sorted(done) == list(range(100))


def test_the_first_failure_is_raised_and_ends_the_rest():
    stop, later = threading.Event(), []

    def fail():
        raise ValueError("first")

    def wait():
        assert stop.wait(30)
        raise StoppedError

    with pytest.raises(ValueError, match="first"):
        run_all([wait, fail, *[lambda: later.append(1)] * 50], threads=2, stop=stop)
    assert not later


def test_a_tick_that_raises_does_not_wait_for_a_thread_that_hangs():
    never = threading.Event()

    def interrupted():
        raise KeyboardInterrupt

    start, later = time.perf_counter(), []
    with pytest.raises(KeyboardInterrupt):
        run_all([lambda: never.wait(30), lambda: later.append(1)], threads=1, stop=threading.Event(), tick=interrupted)
    assert time.perf_counter() - start < 5
    never.set()
    time.sleep(0.05)
    assert not later


def test_tasks_are_taken_lazily_and_a_failing_source_is_an_error():
    def tasks():
        yield lambda: None
        raise OSError("listing failed")

    with pytest.raises(OSError, match="listing failed"):
        run_all(tasks(), threads=3, stop=threading.Event())
