"""Shared memory, on the CPU and on CUDA alike: what outlives whom, and who sees what."""

import gc
import os
import socket

import pytest
import torch
from programs import Program

from wan_loader.devices.shared_memory import HostSharedMemory, chunk_sizes
from wan_loader.keeper.messages import receive, send

ATTACH = """
import os, socket, sys, torch
from wan_loader.keeper.identity import shared_memory_of
from wan_loader.keeper.messages import receive, send
link = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
link.connect(sys.argv[1])
message, fds = receive(link)
device, sizes = message["device"], message["sizes"]
if device == "cuda":
    torch.zeros(1, device="cuda")
memory = shared_memory_of(torch.device(device, 0) if device == "cuda" else torch.device("cpu")).attach(fds, sizes)
for fd in fds:
    os.close(fd)
flat = memory.tensor(0, sum(sizes))
for _ in range(2):
    send(link, {"sum": int(flat.sum(dtype=torch.int64))})
    receive(link)
"""


@pytest.fixture
def memory(device):
    from wan_loader.keeper.identity import shared_memory_of

    if device == "cuda":
        torch.zeros(1, device="cuda")
    return shared_memory_of(torch.device(device, 0) if device == "cuda" else torch.device("cpu"))


def close_all(fds):
    for fd in fds:
        os.close(fd)


def test_chunks():
    assert chunk_sizes(0, 4096) == []
    assert chunk_sizes(1, 4096) == [4096]
    assert chunk_sizes(8192, 4096, 8192) == [8192]
    assert chunk_sizes(20_000, 4096, 8192) == [8192, 8192, 4096]


def test_no_memory_at_all(memory):
    made, fds = memory.make([])
    assert fds == []
    assert made.tensor(0, 0).numel() == 0
    assert memory.attach([], []).nbytes == 0


def test_chunks_lie_one_behind_the_other(memory):
    sizes = [memory.alignment * n for n in (2, 1, 3)]
    made, fds = memory.make(sizes)
    try:
        whole = made.tensor(0, sum(sizes))
        expected = torch.randint(256, whole.shape, dtype=torch.uint8)
        whole.copy_(expected)
        memory.flush()
        seen = memory.attach(fds, sizes)
    finally:
        close_all(fds)
    assert torch.equal(seen.tensor(0, sum(sizes)).cpu(), expected)
    across = seen.tensor(sizes[0] - 10, 20)
    assert across.untyped_storage().nbytes() == 20
    assert torch.equal(across.cpu(), expected[sizes[0] - 10 : sizes[0] + 10])
    assert across.device == whole.device


def test_memory_outlives_its_maker_and_every_descriptor(memory, device, open_dir):
    size = 4 * memory.alignment
    made, fds = memory.make([size])
    made.tensor(0, size).fill_(3)
    memory.flush()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
        server.bind(str(open_dir / "socket"))
        server.listen()
        other = Program("-c", ATTACH, open_dir / "socket")
        link, _ = server.accept()
    with link:
        send(link, {"device": device, "sizes": [size]}, fds)
        assert receive(link)[0]["sum"] == 3 * size, other.output()
        close_all(fds)
        del made
        gc.collect()
        fresh, fds = memory.make([size])  # if that memory were free, this could be it
        fresh.tensor(0, size).fill_(9)
        memory.flush()
        close_all(fds)
        send(link, {})
        assert receive(link)[0]["sum"] == 3 * size
        send(link, {})
    assert other.wait(30) == 0


def test_the_last_tensor_gives_the_addresses_back(memory, device, open_files):
    size = 2 * memory.alignment
    made, fds = memory.make([size])
    close_all(fds)
    closed = []
    made.on_close(lambda: closed.append(1))
    one, other = made.tensor(0, 8), made.tensor(8, 8)
    view = one.view(torch.int64)
    del made, one
    gc.collect()
    other.fill_(1)
    del other
    gc.collect()
    assert not closed
    view.fill_(2)
    assert int(view) == 2
    del view
    gc.collect()
    assert closed == [1]


def test_device_memory_comes_back(memory, device):
    if device != "cuda":
        pytest.skip("the system counts it, and others use it")
    free = memory.free_nbytes()
    size = free // 4 // memory.alignment * memory.alignment  # much more than other tests take meanwhile
    made, fds = memory.make([size])
    tensor = made.tensor(0, size)
    close_all(fds)
    assert free - memory.free_nbytes() >= size
    del made, tensor
    gc.collect()
    assert free - memory.free_nbytes() < size // 2


def test_what_is_written_on_the_cpu_stays_with_who_writes():
    memory = HostSharedMemory()
    made, fds = memory.make([8192])
    first, second = memory.attach(fds, [8192]), memory.attach(fds, [8192])
    first.tensor(0, 8192).fill_(7)
    assert not second.tensor(0, 8192).any()
    assert not made.tensor(0, 8192).any()
    with pytest.raises(OSError, match="not permitted"):
        os.pwrite(fds[0], b"x", 0)
    with pytest.raises(OSError, match="not permitted"):
        os.ftruncate(fds[0], 1)
    close_all(fds)


def test_a_chunk_that_is_too_short_is_refused():
    _, fds = HostSharedMemory().make([4096])
    with pytest.raises(OSError, match="shorter"):
        HostSharedMemory().attach(fds, [8192])
    close_all(fds)


@pytest.mark.gpu
def test_more_than_the_device_has():
    from wan_loader.errors import DeviceMemoryError
    from wan_loader.keeper.identity import shared_memory_of

    torch.zeros(1, device="cuda")
    memory = shared_memory_of(torch.device("cuda", 0))
    n_fds = len(os.listdir("/proc/self/fd"))
    with pytest.raises(DeviceMemoryError, match="no room"):
        memory.make([1 << 30, 1 << 42])
    assert len(os.listdir("/proc/self/fd")) == n_fds
    memory.attach([], [])


@pytest.mark.gpu
def test_a_descriptor_of_something_else():
    from wan_loader.errors import DeviceError
    from wan_loader.keeper.identity import shared_memory_of

    torch.zeros(1, device="cuda")
    memory = shared_memory_of(torch.device("cuda", 0))
    with open("/dev/null") as file, pytest.raises(DeviceError, match="descriptor"):
        memory.attach([file.fileno()], [memory.alignment])
