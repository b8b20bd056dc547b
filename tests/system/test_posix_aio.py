"""What is particular to POSIX AIO; what every way to read promises is in `tests/contracts`."""

import ctypes
import errno
import mmap
import os
import random
import subprocess
import sys
from types import SimpleNamespace

import pytest

from wan_loader.system import posix_aio as aio
from wan_loader.system.posix_aio import AioRequest, wait_any

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


def test_where_no_thread_may_be_made_reads_are_carried_out_at_once(fd, data, memory, monkeypatch):
    class Refusing:
        def aio_read(self, block):
            ctypes.set_errno(errno.EAGAIN)
            return -1

    monkeypatch.setattr(aio, "_library", lambda kind: Refusing())
    address, view = memory
    requests = [AioRequest(), AioRequest()]
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
    read, plain = [], aio.AioRequest.result

    def result(self):
        nbytes = plain(self)
        read.extend([] if nbytes is None else [nbytes])
        return nbytes

    monkeypatch.setattr(aio.AioRequest, "result", result)
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
