"""Turns between threads are short while something loads, and as they were afterwards."""

import os
import sys
import threading

import pytest

from wan_loader.system.interpreter import short_turns


@pytest.fixture(autouse=True)
def turns():
    before = sys.getswitchinterval()
    yield before
    after = sys.getswitchinterval()
    sys.setswitchinterval(before)
    assert after == before


def test_turns_are_short_inside(turns):
    with short_turns():
        assert sys.getswitchinterval() < turns / 10


def test_a_failure_puts_them_back(turns):
    with pytest.raises(ValueError, match="it failed"), short_turns():
        raise ValueError("it failed")


def test_shorter_ones_stay(turns):
    sys.setswitchinterval(0.00005)
    chosen = sys.getswitchinterval()
    with short_turns():
        assert sys.getswitchinterval() <= chosen
    assert sys.getswitchinterval() == pytest.approx(chosen, abs=2e-6)
    sys.setswitchinterval(turns)


def test_the_last_of_several_threads_puts_them_back(turns):
    begun, may_end = threading.Event(), threading.Event()

    def other():
        with short_turns():
            begun.set()
            may_end.wait(10)

    thread = threading.Thread(target=other)
    with short_turns():
        thread.start()
        begun.wait(10)
    assert sys.getswitchinterval() < turns / 10, "the other thread still loads"
    may_end.set()
    thread.join(10)


def test_a_fork_does_not_wait_for_the_parent_s_loads(turns):
    begun, may_end = threading.Event(), threading.Event()

    def other():
        with short_turns():
            begun.set()
            may_end.wait(10)

    thread = threading.Thread(target=other)
    thread.start()
    begun.wait(10)
    if (pid := os.fork()) == 0:
        code = sys.getswitchinterval() != turns
        with short_turns():
            code += sys.getswitchinterval() >= turns
        code += sys.getswitchinterval() != turns
        os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0
    may_end.set()
    thread.join(10)
