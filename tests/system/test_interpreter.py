"""Turns between threads are short while something loads, and as they were afterwards; what was frozen stays so."""

import gc
import os
import sys
import threading

import pytest

from wan_loader.system import interpreter
from wan_loader.system.interpreter import paused_gc, short_turns


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


@pytest.mark.parametrize(("n_frozen", "n_counts", "n_freezes"), [(500, 3, 3), (5000, 1, 0)])
def test_frozen_objects_are_counted_once(monkeypatch, n_frozen, n_counts, n_freezes):
    """Counting them takes as long as there are many: in a fork of a stand-by server, each load would wait for it."""
    calls = []
    monkeypatch.setattr(interpreter, "_program_froze", False)
    monkeypatch.setattr(gc, "get_freeze_count", lambda: calls.append("count") or n_frozen)
    monkeypatch.setattr(gc, "freeze", lambda: calls.append("freeze"))
    monkeypatch.setattr(gc, "unfreeze", lambda: calls.append("unfreeze"))
    for _ in range(3):
        with paused_gc():
            assert not gc.isenabled()
        assert gc.isenabled()
    assert [calls.count(name) for name in ("count", "freeze", "unfreeze")] == [n_counts, n_freezes, n_freezes]


def test_what_is_frozen_for_good_is_not_counted(monkeypatch):
    monkeypatch.setattr(interpreter, "_program_froze", False)
    monkeypatch.setattr(gc, "freeze", lambda: None)
    monkeypatch.setattr(gc, "get_freeze_count", lambda: pytest.fail("counted"))
    interpreter.freeze_all()
    with paused_gc():
        pass
