"""Reads by the C library's threads: the bytes of the file, errors as OSError, and nobody waits for ever."""

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
from types import SimpleNamespace

import pytest

from wan_loader.system import posix_aio as aio
from wan_loader.system.posix_aio import Request, wait_any

MiB = 1 << 20


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


def wait(request):
    while (nbytes := request.result()) is None:
        wait_any([request], 5)
    return nbytes


@pytest.mark.parametrize(("start", "nbytes"), [(0, 1), (5, 2 * MiB), (2 * MiB, 77)])
def test_reads_a_range(fd, data, memory, start, nbytes):
    address, view = memory
    request = Request()
    request.start(fd, address + 9, nbytes, start)
    assert wait(request) == nbytes
    assert not request.running
    assert view[9 : 9 + nbytes] == data[start : start + nbytes]
    assert bytes(view[9 + nbytes : 20 + nbytes]) == bytes(11)


def test_a_request_can_be_used_again(fd, data, memory):
    address, view = memory
    request = Request()
    for start in range(0, 2 * MiB, 200_000):
        request.start(fd, address, 1000, start)
        assert wait(request) == 1000
        assert view[:1000] == data[start : start + 1000]


def test_the_end_of_the_file(fd, memory):
    request = Request()
    request.start(fd, memory[0], 1000, 2 * MiB)
    assert wait(request) == 77
    request.start(fd, memory[0], 1000, 3 * MiB)
    assert wait(request) == 0


def test_many_side_by_side(fd, data, memory):
    address, view = memory
    fds = [os.dup(fd) for _ in range(8)]
    requests = [Request() for _ in range(64)]
    for i, request in enumerate(requests):
        request.start(fds[i % 8], address + i * 30_000, 30_000, i * 30_000)
    for request in requests:
        assert wait(request) == 30_000
    assert view[: 64 * 30_000] == data[: 64 * 30_000]
    for other in fds:
        os.close(other)


def test_an_error_is_an_oserror(fd, memory, tmp_path):
    request = Request()
    directory = os.open(tmp_path, os.O_RDONLY)
    request.start(directory, memory[0], 10, 0)
    with pytest.raises(IsADirectoryError):
        wait(request)
    os.close(directory)
    assert not request.running
    request.start(fd, memory[0], 10, 0)
    assert wait(request) == 10


def test_memory_that_is_not_there(fd):
    request = Request()
    request.start(fd, 4096, 10, 0)
    with pytest.raises(OSError) as caught:
        wait(request)
    assert caught.value.errno == errno.EFAULT


@pytest.mark.parametrize("depth", [1, 2])
def test_a_forked_process_reads_without_its_parent_s_threads(fd, data, memory, tmp_path, depth):
    code = """
import ctypes, os, signal, sys
from wan_loader.system.posix_aio import Request, wait_any
memory = ctypes.create_string_buffer(1000)
fd = os.open(sys.argv[1], os.O_RDONLY)
def read():
    request = Request()
    request.start(fd, ctypes.addressof(memory), 1000, 100)
    while (nbytes := request.result()) is None:
        wait_any([request], 1)
    return nbytes
def failing():
    request = Request()
    request.start(-1, ctypes.addressof(memory), 1000, 100)
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
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "f", str(depth)], capture_output=True, timeout=20)
    assert done.returncode == 0, done.stderr
    assert done.stdout == data[100:1100]


@pytest.fixture
def hanging(tmp_path):
    """A descriptor whose reads take until the second, a function, was called: a terminal that waits for input."""
    master, slave = os.openpty()
    yield slave, lambda: os.write(master, b"x\n")
    os.close(master)
    os.close(slave)


def test_waiting_ends_with_the_time_or_a_signal(hanging, memory):
    slave, let_go = hanging
    request = Request()
    request.start(slave, memory[0], 10, 0)
    if request.result() is not None or _fails(request):
        pytest.skip("this terminal does not read at positions")
    start = time.monotonic()
    wait_any([request], 0.1)
    assert 0.09 < time.monotonic() - start < 2
    interrupt = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT))
    interrupt.start()
    with pytest.raises(KeyboardInterrupt):
        wait_any([request], 20)
    let_go()
    assert wait(request) == 2


def _fails(request):
    time.sleep(0.05)
    try:
        return request.running and request.result() is not None
    except OSError:
        return True


def test_where_no_thread_may_be_made_reads_are_carried_out_at_once(fd, data, memory, monkeypatch):
    class Refusing:
        def aio_read(self, block):
            ctypes.set_errno(errno.EAGAIN)
            return -1

    monkeypatch.setattr(aio, "_library", lambda kind: Refusing())
    address, view = memory
    requests = [Request(), Request()]
    requests[0].start(fd, address, 1000, 5)
    requests[1].start(fd, address, -1 & 0xFFFF, 1 << 40)
    wait_any(requests, 60)
    requests[0].cancel()
    assert requests[0].running
    assert [request.result() for request in requests] == [1000, 0]
    assert not any(request.running for request in requests)
    assert view[:1000] == data[5:1005]


READY = """
import os, sys, threading, time
from wan_loader.system.posix_aio import get_ready

def kernel(): return len(os.listdir("/proc/self/task")) - threading.active_count()
def room(): return int(next(l for l in open("/proc/self/status") if l.startswith("FDSize")).split()[1])

fds, was = sorted(os.listdir("/proc/self/fd")), kernel()
get_ready(6)
end = time.monotonic() + 5
while threading.active_count() > 1 and time.monotonic() < end:
    time.sleep(0.001)
time.sleep(0.05)  # for the kernel, too, that thread has ended by then
print(kernel() - was, room(), sorted(os.listdir("/proc/self/fd")) == fds)
"""


def test_threads_and_room_for_descriptors_are_there_before_they_are_needed():
    done = subprocess.run([sys.executable, "-c", READY], capture_output=True, text=True, timeout=20, check=True)
    threads, room, same = done.stdout.split()
    assert 1 <= int(threads) <= 6
    assert int(room) >= 1024
    assert same == "True", "all descriptors were given back"


def test_getting_ready_closes_nothing_that_is_still_read(monkeypatch):
    """What has its number by then would be read instead."""
    read, plain = [], aio.Request.result

    def result(self):
        nbytes = plain(self)
        read.extend([] if nbytes is None else [nbytes])
        return nbytes

    monkeypatch.setattr(aio.Request, "result", result)
    aio._get_ready(30)  # more than the library has threads: the last begin long after they were asked for
    assert read == [aio._BUSY_BYTES] * 30


def test_few_descriptors_are_left_alone():
    code = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (1023, 1023))\n" + READY
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=20, check=True)
    _, room, same = done.stdout.split()
    assert int(room) < 1024
    assert same == "True"


def test_loads_that_follow_each_other_get_ready_once(monkeypatch):
    started = []
    monkeypatch.setattr(aio.threading, "Thread", lambda **how: SimpleNamespace(start=lambda: started.append(how)))
    monkeypatch.setattr(aio, "_ready_at", -1e9)
    for now in (100.0, 100.1, 100.4, 101.0):
        monkeypatch.setattr(aio, "monotonic", lambda now=now: now)
        aio.get_ready(3)
    assert len(started) == 2


@pytest.mark.parametrize("limit", ["RLIMIT_NOFILE", "RLIMIT_NPROC"])
def test_getting_ready_where_little_is_allowed(limit):
    """Reads then take what they take."""
    code = f"import resource; resource.setrlimit(resource.{limit}, (12, 12))\n" + READY
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=20, check=True)
    assert done.stderr == ""
    assert done.stdout.split()[2] == "True"
