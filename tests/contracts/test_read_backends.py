"""Every `ReadBackend` reads the bytes of the file, tells errors as OSError, and lets nobody wait for ever."""

import ctypes
import errno
import mmap
import os
import random
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack

import pytest

from wan_loader.engine.read_backend import choose_backend
from wan_loader.system import posix_aio, read_threads
from wan_loader.system.posix_aio import PosixAio
from wan_loader.system.read_threads import ReadThreads

MiB = 1 << 20
SLOW = 24 * MiB


@pytest.fixture
def data(tmp_path):
    data = random.Random(3).randbytes(2 * MiB + 77)
    (tmp_path / "f").write_bytes(data)
    return data


@pytest.fixture
def fd(data, tmp_path):
    fd = os.open(tmp_path / "f", os.O_RDONLY)
    yield fd
    os.close(fd)


@pytest.fixture
def memory():
    """(address, view) of anonymous memory."""
    with mmap.mmap(-1, 4 * MiB) as mapped, memoryview(mapped) as view:
        yield ctypes.addressof(ctypes.c_char.from_buffer(view)), view


class ReadBackendContract:
    """What the read queue relies on."""

    make: type
    """Of the backend, to be imported from its module in another process, too."""

    @pytest.fixture
    def backend(self):
        return self.make()

    @pytest.fixture
    def wait(self, backend):
        def wait(request):
            while (nbytes := request.result()) is None:
                backend.wait_any([request], 5)
            return nbytes

        return wait

    @pytest.mark.parametrize(("start", "nbytes"), [(0, 1), (5, 2 * MiB), (2 * MiB, 77)])
    def test_reads_a_range(self, backend, wait, fd, data, memory, start, nbytes):
        address, view = memory
        request = backend.request()
        request.start(fd, address + 9, nbytes, start)
        assert wait(request) == nbytes
        assert not request.running
        assert view[9 : 9 + nbytes] == data[start : start + nbytes]
        assert bytes(view[9 + nbytes : 20 + nbytes]) == bytes(11)

    def test_a_request_can_be_used_again(self, backend, wait, fd, data, memory):
        address, view = memory
        request = backend.request()
        for start in range(0, 2 * MiB, 200_000):
            request.start(fd, address, 1000, start)
            assert request.running
            assert wait(request) == 1000
            assert view[:1000] == data[start : start + 1000]

    def test_the_end_of_the_file(self, backend, wait, fd, memory):
        request = backend.request()
        request.start(fd, memory[0], 1000, 2 * MiB)
        assert wait(request) == 77
        request.start(fd, memory[0], 1000, 3 * MiB)
        assert wait(request) == 0

    def test_many_side_by_side(self, backend, wait, fd, data, memory):
        address, view = memory
        fds = [os.dup(fd) for _ in range(8)]
        requests = [backend.request() for _ in range(64)]
        for i, request in enumerate(requests):
            request.start(fds[i % 8], address + i * 30_000, 30_000, i * 30_000)
        for request in requests:
            assert wait(request) == 30_000
        assert view[: 64 * 30_000] == data[: 64 * 30_000]
        for other in fds:
            os.close(other)

    def test_an_error_is_an_oserror(self, backend, wait, fd, memory, tmp_path):
        request = backend.request()
        directory = os.open(tmp_path, os.O_RDONLY)
        request.start(directory, memory[0], 10, 0)
        with pytest.raises(IsADirectoryError):
            wait(request)
        os.close(directory)
        assert not request.running
        request.start(fd, memory[0], 10, 0)
        assert wait(request) == 10

    def test_memory_that_is_not_there(self, backend, wait, fd):
        request = backend.request()
        request.start(fd, 4096, 10, 0)
        with pytest.raises(OSError) as caught:
            wait(request)
        assert caught.value.errno == errno.EFAULT

    def test_waiting_for_all_waits_for_all(self, backend, fd, data, memory, tmp_path):
        """Whatever came of them."""
        address, view = memory
        directory = os.open(tmp_path, os.O_RDONLY)
        requests = [backend.request() for _ in range(5)]
        for i in range(3):
            requests[i].start(fd, address + i * 1000, 1000, i * 1000)
        requests[3].start(directory, address, 10, 0)
        backend.wait_all(requests)
        os.close(directory)
        assert not any(request.running for request in requests)
        assert view[:3000] == data[:3000]

    def test_waiting_ends_with_the_time_or_a_signal(self, backend, slow_reads):
        *_, last = slow_reads(backend, 20)
        start = time.monotonic()
        backend.wait_any([last], 0.05)
        assert 0.04 < time.monotonic() - start < 2
        interrupt = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT))
        interrupt.start()
        with pytest.raises(KeyboardInterrupt):
            backend.wait_any([last], 20)
        assert last.running

    def test_what_has_not_begun_is_taken_back(self, backend, wait, slow_reads):
        """Its memory is free at once, though reads of its descriptor are under way."""
        first, *_, last = slow_reads(backend, 10)
        last.cancel()
        with pytest.raises(OSError) as caught:
            wait(last)
        assert caught.value.errno == errno.ECANCELED
        assert not last.running
        assert first.running
        assert wait(first) == SLOW

    def test_what_is_over_is_not_taken_back(self, backend, fd, data, memory):
        request = backend.request()
        request.cancel()
        request.start(fd, memory[0], 1000, 0)
        backend.wait_any([request], 5)
        request.cancel()
        assert request.result() == 1000
        assert memory[1][:1000] == data[:1000]

    @pytest.mark.parametrize("depth", [1, 2])
    def test_a_forked_process_reads_without_its_parent_s_threads(self, fd, data, memory, tmp_path, depth):
        module, name = self.make.__module__, self.make.__name__
        command = [sys.executable, "-c", FORKED, tmp_path / "f", str(depth), module, name]
        done = subprocess.run(command, capture_output=True, timeout=20)
        assert done.returncode == 0, done.stderr
        assert done.stdout == data[100:1100]

    def test_getting_ready_returns_at_once_and_disturbs_nothing(self, backend, wait, fd, data, memory):
        start = time.monotonic()
        backend.get_ready(8)
        assert time.monotonic() - start < 1
        request = backend.request()
        request.start(fd, memory[0], 1000, 7)
        assert wait(request) == 1000
        assert memory[1][:1000] == data[7:1007]


FORKED = """
import ctypes, importlib, os, signal, sys
backend = getattr(importlib.import_module(sys.argv[3]), sys.argv[4])()
memory = ctypes.create_string_buffer(1000)
fd = os.open(sys.argv[1], os.O_RDONLY)
def read():
    request = backend.request()
    request.start(fd, ctypes.addressof(memory), 1000, 100)
    while (nbytes := request.result()) is None:
        backend.wait_any([request], 1)
    return nbytes
def failing():
    request = backend.request()
    request.start(-1, ctypes.addressof(memory), 1000, 100)
    backend.wait_any([request], 1)
    try:
        return request.result()
    except OSError:
        request.cancel()
        return not request.running
assert read() == 1000
for _ in range(int(sys.argv[2])):  # while its threads are still there, idle
    if pid := os.fork():
        sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    signal.alarm(5)
    memory[:] = bytes(1000)
    assert read() == 1000 and failing() is True
os.write(1, memory.raw)
"""


@pytest.fixture
def slow_reads():
    """Starts reads of one descriptor, each of which takes tens of milliseconds: of random numbers."""
    with ExitStack() as stack:
        memory = stack.enter_context(mmap.mmap(-1, SLOW))
        fd = os.open("/dev/urandom", os.O_RDONLY)
        stack.callback(os.close, fd)

        def start(backend, count):
            address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
            requests = [backend.request() for _ in range(count)]
            stack.callback(backend.wait_all, requests)
            for request in requests:
                request.start(fd, address, SLOW, 0)
            return requests

        yield start


class TestPosixAio(ReadBackendContract):
    make = PosixAio


class TestReadThreads(ReadBackendContract):
    make = ReadThreads


def test_where_there_is_posix_aio_it_is_chosen():
    fallbacks = []
    assert isinstance(choose_backend(fallbacks), PosixAio)
    assert fallbacks == []


@pytest.mark.parametrize(
    ("library", "reason"),
    [(OSError("librt.so.1"), "has no POSIX AIO"), (object(), "is not glibc")],
    ids=["none", "other"],
)
def test_without_glibc_threads_read_and_the_reason_is_said(monkeypatch, library, reason):
    def look(kind):
        if isinstance(library, Exception):
            raise library
        return library

    monkeypatch.setattr(posix_aio, "_library", look)
    posix_aio._what_is_missing.cache_clear()
    try:
        fallbacks = []
        assert isinstance(choose_backend(fallbacks), ReadThreads)
        assert reason in fallbacks[0]
        posix_aio.get_ready(4)  # nothing is there to be made ready
    finally:
        monkeypatch.undo()
        posix_aio._what_is_missing.cache_clear()


def test_in_the_child_of_a_process_that_has_read_threads_read(monkeypatch):
    monkeypatch.setattr(posix_aio, "_orphaned", True)
    fallbacks = []
    assert isinstance(choose_backend(fallbacks), ReadThreads)
    assert "was forked" in fallbacks[0]


def test_of_the_process_s_own_memory_threads_make_copies(memory):
    address, view = memory
    view[MiB : MiB + 1000] = random.Random(4).randbytes(1000)
    backend = choose_backend(own_memory=True)
    request = backend.request()
    request.start(-1, address, 999, address + MiB)  # no descriptor is asked
    backend.wait_all([request])
    assert view[:999] == view[MiB : MiB + 999]
    assert view[999] == 0


@pytest.fixture
def pool(monkeypatch):
    """A pool of this test's own, without any thread yet."""
    pool = read_threads._Pool()
    monkeypatch.setattr(read_threads, "_pool", pool)
    return pool


def test_reads_of_one_descriptor_are_carried_out_one_after_the_other(memory, pool):
    running, most, order, lock = {}, {}, [], threading.Lock()

    def slow(fd, address, nbytes, offset):
        with lock:
            running[fd] = running.get(fd, 0) + 1
            most[fd] = max(most.get(fd, 0), running[fd])
            most["all"] = max(most.get("all", 0), sum(running.values()))
            order.append((fd, offset))
        time.sleep(0.01)
        with lock:
            running[fd] -= 1
        return nbytes

    backend = ReadThreads(slow)
    requests = [backend.request() for _ in range(12)]
    for i, request in enumerate(requests):
        request.start(100 + i % 3, memory[0], 1, i)
    backend.wait_all(requests)
    assert [most[100], most[101], most[102]] == [1, 1, 1]
    assert most["all"] == 3
    for number in range(3):
        assert [offset for fd, offset in order if fd == 100 + number] == list(range(number, 12, 3))


def test_idle_threads_end_and_others_come(fd, data, memory, monkeypatch, pool):
    monkeypatch.setattr(read_threads, "_IDLE_S", 0.01)
    backend = ReadThreads()
    request = backend.request()
    for start in range(5):
        request.start(fd, memory[0], 100, start)
        backend.wait_all([request])
        assert memory[1][:100] == data[start : start + 100]
        end = time.monotonic() + 5
        while pool._threads and time.monotonic() < end:
            time.sleep(0.001)
        assert not pool._threads


def test_there_are_never_many_threads(memory, pool):
    backend = ReadThreads(lambda fd, address, nbytes, offset: time.sleep(0.005) or nbytes)
    requests = [backend.request() for _ in range(100)]
    for number, request in enumerate(requests):
        request.start(1000 + number, memory[0], 1, 0)
    assert 1 < len(pool._threads) <= read_threads._MOST_THREADS
    backend.wait_all(requests)


def test_where_no_thread_may_be_started_the_caller_reads(fd, data, memory, monkeypatch, pool):
    def refuse(work, arguments):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(read_threads, "start_new_thread", refuse)
    backend = ReadThreads()
    request = backend.request()
    request.start(fd, memory[0], 1000, 5)
    assert request.result() == 1000
    assert memory[1][:1000] == data[5:1005]


def test_ctrl_c_before_a_read_was_put_leaves_nothing_to_wait_for(fd, memory, monkeypatch, pool):
    def interrupt(read):
        raise KeyboardInterrupt

    backend = ReadThreads()
    request = backend.request()
    monkeypatch.setattr(pool, "put", interrupt)
    with pytest.raises(KeyboardInterrupt):
        request.start(fd, memory[0], 1000, 5)
    assert request.running, "it may have been put"
    request.cancel()
    backend.wait_all([request])
    assert not request.running


@pytest.mark.parametrize("arguments", [(-5, 0), (10, -(1 << 70))])
def test_what_makes_no_sense_is_an_error_and_ends_no_thread(fd, memory, pool, arguments):
    backend = ReadThreads()
    request = backend.request()
    nbytes, offset = arguments
    for _ in range(3):
        request.start(fd, memory[0], nbytes, offset)
        backend.wait_any([request], 5)
        with pytest.raises(OSError):
            request.result()
    request.start(fd, memory[0], 10, 0)
    backend.wait_any([request], 5)
    assert request.result() == 10
