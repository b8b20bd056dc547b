"""Tasks by threads: all of them once; the first failure, a signal or `stop` ends them."""

import threading
import time

import pytest

from wan_loader.system.threads import StoppedError, in_background, run_all


@pytest.mark.parametrize("allowed", [True, False])
def test_background_work_is_done_even_where_no_thread_is_allowed(monkeypatch, allowed):
    def refuse(thread):
        raise RuntimeError("can't start new thread")

    if not allowed:
        monkeypatch.setattr(threading.Thread, "start", refuse)
    did = []
    thread = in_background(lambda: did.append(threading.current_thread()), "worker")
    if thread:
        thread.join()
    assert did == [thread if allowed else threading.current_thread()]


def test_background_work_is_done_once_where_a_signal_disturbs_its_start(monkeypatch):
    plain, did = threading.Thread.start, []

    def start(thread):
        plain(thread)
        raise RuntimeError("release unlocked lock")

    monkeypatch.setattr(threading.Thread, "start", start)
    thread = in_background(lambda: did.append(threading.current_thread()), "worker")
    thread.join()
    assert did == [thread]


def test_an_error_of_background_work_is_not_taken_for_a_missing_thread(monkeypatch):
    def refuse(thread):
        raise RuntimeError("can't start new thread")

    def fail():
        raise RuntimeError("of the work")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(RuntimeError, match="of the work"):
        in_background(fail, "worker")


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
