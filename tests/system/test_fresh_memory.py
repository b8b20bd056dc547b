"""Huge pages are tried one by one, and no longer asked for once one was slow."""

import ctypes
import errno
import mmap
import os

import pytest

from wan_loader.system import fresh_memory
from wan_loader.system.fresh_memory import HUGE_PAGE, FreshMemory

N_PAGES = 8


class Clock:
    """Tells that each thing that is timed takes as long as was said."""

    def __init__(self, *seconds):
        self._left, self.now, self._begins = list(seconds), 0, True

    def __call__(self):
        if not self._begins:
            self.now += self._left.pop(0)
        self._begins = not self._begins
        return self.now


@pytest.fixture
def memory():
    with mmap.mmap(-1, N_PAGES * HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as found:
        view = ctypes.c_char.from_buffer(found)
        yield found, ctypes.addressof(view)
        del view


@pytest.fixture
def advice(monkeypatch):
    """What was asked of the system: address, size, and whether huge pages are preferred."""
    given = []
    monkeypatch.setattr(fresh_memory, "prefer_huge_pages", lambda *range_, prefer=True: given.append((*range_, prefer)))
    monkeypatch.setattr(fresh_memory, "_small_pages_ns", lambda: 100)
    return given


def test_the_first_slow_page_is_the_last(memory, advice):
    _, address = memory
    fresh = FreshMemory(Clock(50, 200, 201))
    fresh.add(address, 4 * HUGE_PAGE)
    fresh.add(address + 4 * HUGE_PAGE, 4 * HUGE_PAGE)
    fresh.touch_huge(address, N_PAGES * HUGE_PAGE)
    assert not fresh.is_huge
    ranges = [(address, 4 * HUGE_PAGE), (address + 4 * HUGE_PAGE, 4 * HUGE_PAGE)]
    assert advice == [(*r, True) for r in ranges] + [(*r, False) for r in ranges]
    fresh.add(address, 4 * HUGE_PAGE)
    fresh.touch_huge(address, N_PAGES * HUGE_PAGE)  # the clock would have nothing to say
    assert len(advice) == 4


def test_quick_pages_stay(memory, advice):
    _, address = memory
    fresh = FreshMemory(Clock(*[200] * N_PAGES))
    fresh.add(address, N_PAGES * HUGE_PAGE)
    fresh.touch_huge(address, N_PAGES * HUGE_PAGE)
    assert fresh.is_huge
    assert advice == [(address, N_PAGES * HUGE_PAGE, True)]


def test_small_memory_is_not_asked_for(memory, advice):
    _, address = memory
    FreshMemory().add(address, 2 * HUGE_PAGE - 1)
    assert advice == []


@pytest.mark.parametrize(("start", "nbytes"), [(0, 1), (1, HUGE_PAGE), (5, 2 * HUGE_PAGE), (100, 3000), (4096, 4096)])
def test_nothing_is_written_outside_of_the_range(memory, start, nbytes):
    found, address = memory
    found[:] = b"x" * len(found)
    fresh = FreshMemory()
    fresh.add(address, len(found))
    fresh.touch(address + start, nbytes)
    fresh.touch_huge(address + start, nbytes)
    assert found[:start] == b"x" * start
    assert found[start + nbytes :] == b"x" * (len(found) - start - nbytes)


def test_pages_are_there_once_they_were_touched(memory):
    _, address = memory
    fresh = FreshMemory()
    fresh.touch(address + 10, 5 * 4096)
    vector = (ctypes.c_ubyte * 8)()
    ctypes.CDLL(None).mincore(ctypes.c_void_p(address), ctypes.c_size_t(8 * mmap.PAGESIZE), vector)
    assert [flag & 1 for flag in vector] == [0, 1, 1, 1, 1, 0, 0, 0]


def test_memory_that_cannot_be_touched_is_left_to_who_writes_to_it():
    FreshMemory().touch(mmap.PAGESIZE, 10 * mmap.PAGESIZE)


def test_what_small_pages_cost_is_measured_once():
    fresh_memory._small_pages_ns.cache_clear()
    assert 0 < fresh_memory._small_pages_ns() < 10**9
    assert fresh_memory._small_pages_ns() == fresh_memory._small_pages_ns()


def test_a_kernel_may_know_no_huge_pages(memory, monkeypatch):
    """It refuses any word about them, as one for real-time work does."""

    class Refusing(mmap.mmap):
        def madvise(self, *_):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(fresh_memory.mmap, "mmap", Refusing)
    fresh_memory._small_pages_ns.cache_clear()
    _, address = memory
    FreshMemory().touch_huge(address, 2 * HUGE_PAGE)
