"""Streams and events of the device, by a GPU that does its work late and in any order that its events allow."""

import itertools
import random
import threading
import time
from collections import Counter
from contextlib import nullcontext

import pytest
import torch
from fake_gpu import FakeGpu
from gguf_files import blocks, gguf_bytes, plain
from safetensors.torch import load_file, save_file
from streamed_models import save_model

import wan_loader
from wan_loader.engine.read_queue import ReadQueue
from wan_loader.formats import open_checkpoint
from wan_loader.formats.quantised import with_values
from wan_loader.plan.blocks import Transport
from wan_loader.plan.dtype_policy import DtypePolicy
from wan_loader.streaming import cuda_device, slots, source
from wan_loader.streaming.blocks import lay_out_block
from wan_loader.streaming.cuda_device import CudaStreamDevice
from wan_loader.streaming.device import convert
from wan_loader.streaming.ledger import Ledger
from wan_loader.streaming.schedule import Schedule, course
from wan_loader.streaming.source import FileSource
from wan_loader.streaming.workspace import Workspace
from wan_loader.system.posix import PAGE

N_BLOCKS, N_BUFFERS = 7, 3


class LockedGpu(FakeGpu):
    """For several threads; knows what is registered."""

    def __init__(self, rng, monkeypatch):
        super().__init__(rng, monkeypatch)
        self.lock = threading.RLock()
        self.pinned = {}
        self.sources = Counter()
        """The copies that are under way: destination, source and length."""
        self.torch.cuda.device = lambda device: nullcontext()
        self.torch.cuda.synchronize = lambda device: self.drain()
        monkeypatch.setattr(cuda_device, "driver", self)
        monkeypatch.setattr(cuda_device, "_torch", lambda: self.torch)
        monkeypatch.setattr(cuda_device, "convert", self._convert)

    def _convert(self, target, raw, *facts):
        target, raw = target.as_subclass(torch.Tensor), raw.as_subclass(torch.Tensor)
        self.queue_current(lambda: convert(target, raw, *facts))

    def queue(self, stream, work):
        with self.lock:
            super().queue(stream, work)

    def record(self, event, stream):
        with self.lock:  # who waits for the event meanwhile would find that nothing leads to it
            super().record(event, stream)

    def _until(self, is_over):
        with self.lock:
            super()._until(is_over)

    def register(self, address, nbytes, context, *, read_only):
        self.pinned[address] = nbytes

    def copy_to_device(self, copies, stream, *, quick):
        for copy in list(copies):
            self.sources[copy] += 1
            super().copy_to_device([copy], stream, quick=quick)
            self.queue(stream, lambda copy=copy: self.sources.subtract([copy]))

    def unregister(self, address, context):
        end = address + self.pinned.get(address, 0)
        used = [source for (_, source, _), n in self.sources.items() if n and address <= source < end]
        assert not used, "unregistered while copies are under way"
        return self.pinned.pop(address, None) is not None


class Streamed:
    """Blocks on their way to a fake device, and what computes with them: it looks at its buffer twice."""

    def __init__(self, path, gpu, *, pinned, dtype=None, share=None):
        self.gpu = gpu
        checkpoint = with_values(open_checkpoint(path)) if dtype else open_checkpoint(path)
        policy = DtypePolicy(dtype)
        self.layouts = [
            lay_out_block(
                f"blocks.{n}", [t for t in checkpoint.tensors if t.name.startswith(f"blocks.{n}.")], checkpoint, policy
            )
            for n in range(N_BLOCKS)
        ]
        self.expected = wan_loader.load_file(path, dtype=dtype)
        nbytes = max(layout.nbytes for layout in self.layouts)
        if share is None:
            device = CudaStreamDevice(0, N_BUFFERS, nbytes)
            self.workspace = Workspace(device, "cuda:0", source.CHUNK_BYTES, Ledger())
        else:
            self.workspace = share.workspace
        self.workspace.join()
        self.device = self.workspace.device
        self.device.reserve(source.CHUNK_BYTES + 512 if dtype else 0)
        self.source = FileSource(
            checkpoint.files,
            self.layouts,
            self.device,
            self.workspace.slots,
            pinned=pinned,
            transport=lambda number: Transport.DIRECT if number % 2 else Transport.BUFFERED,
            course=course(N_BLOCKS, N_BUFFERS),
        )
        self.schedule = Schedule(N_BLOCKS, N_BUFFERS, self.device, self.source, self.workspace.occupancy)
        self.n_looks = 0

    def forward(self, order):
        for block in order:
            self.schedule.enter(block)
            for _ in range(2):
                self.gpu.queue(self.gpu.callers, lambda block=block: self._look(block))
            self.schedule.leave(block)

    def _look(self, block):
        self.n_looks += 1
        memory = self.device.buffers[block % N_BUFFERS].as_subclass(torch.Tensor)
        for place in self.layouts[block].places:
            wanted = self.expected[place.name]
            held = memory[place.start : place.start + place.nbytes].view(wanted.dtype).view(place.shape)
            assert torch.equal(held, wanted), f"{place.name} is not what it should be"

    def close(self):
        self.schedule.close()
        self.source.close()
        self.workspace.leave()


@pytest.fixture
def small_chunks(monkeypatch):
    """Blocks of several parts, and slots that are used again."""
    monkeypatch.setattr(source, "CHUNK_BYTES", PAGE)
    monkeypatch.setattr(slots, "N_READS", 2)


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("pinned", [range(N_BLOCKS), [], [0, 3]], ids=["registered", "read", "some registered"])
@pytest.mark.parametrize("seed", range(8))
def test_no_block_computes_on_anything_but_its_weights(tmp_path, monkeypatch, small_chunks, pinned, dtype, seed):
    rng = random.Random(f"{seed} {list(pinned)} {dtype}")
    gpu = LockedGpu(rng, monkeypatch)
    streamed = Streamed(save_model(tmp_path, N_BLOCKS), gpu, pinned=pinned, dtype=dtype)
    assert sum(gpu.pinned.values()) >= sum(streamed.layouts[n].nbytes_file for n in pinned)
    streamed.schedule.start()
    for _ in range(3):
        streamed.forward(range(N_BLOCKS))
    streamed.forward(rng.choices(range(N_BLOCKS), k=10))
    streamed.close()
    assert streamed.n_looks == 2 * (3 * N_BLOCKS + 10)
    assert (gpu.n_streams, gpu.n_events, gpu.pinned) == (0, 0, {})


@pytest.mark.parametrize("pinned", [range(N_BLOCKS), [], [0, 3]], ids=["registered", "read", "some registered"])
@pytest.mark.parametrize("seed", range(4))
def test_no_block_computes_on_anything_but_its_numbers(tmp_path, monkeypatch, small_chunks, pinned, seed):
    """As above, of blocks that are quantised in their file."""
    content = {}
    for name, tensor in load_file(save_model(tmp_path, N_BLOCKS)).items():
        raw = torch.randint(0, 256, (tensor.numel() // 32, 34), dtype=torch.uint8)
        raw[:, 1] &= 0x3B  # scales are finite
        content[name] = blocks("Q8_0", tensor.shape, raw) if tensor.dim() == 2 else plain(tensor)
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf_bytes(content))
    gpu = LockedGpu(random.Random(f"{seed} {list(pinned)}"), monkeypatch)
    streamed = Streamed(path, gpu, pinned=pinned, dtype="bfloat16")
    streamed.schedule.start()
    for _ in range(3):
        streamed.forward(range(N_BLOCKS))
    streamed.close()
    assert streamed.n_looks == 6 * N_BLOCKS


PINNED = {"registered": range(N_BLOCKS), "read": [], "some registered": [0, 3]}


@pytest.mark.parametrize("first", PINNED)
@pytest.mark.parametrize("second", PINNED)
@pytest.mark.parametrize("seed", range(3))
def test_modules_that_share_buffers_never_see_each_other_s_blocks(
    tmp_path, monkeypatch, small_chunks, first, second, seed
):
    rng = random.Random(f"{seed} {first} {second}")
    gpu = LockedGpu(rng, monkeypatch)
    paths = [tmp_path / "a", tmp_path / "b"]
    for path in paths:
        path.mkdir()
    a = Streamed(save_model(paths[0], N_BLOCKS), gpu, pinned=PINNED[first])
    a.schedule.start()
    # the same names and shapes, and other values
    save_file({name: -2 * t for name, t in load_file(paths[0] / "model.safetensors").items()}, paths[1] / "model")
    b = Streamed(paths[1] / "model", gpu, pinned=PINNED[second], dtype="bfloat16" if seed else None, share=a)
    b.schedule.start()
    for _ in range(4):
        one = rng.choice([a, b])
        one.forward(range(N_BLOCKS) if rng.random() < 0.7 else rng.choices(range(N_BLOCKS), k=5))
    one, other = rng.sample([a, b], 2)
    other.forward(range(3))
    one.close()
    before = other.n_looks
    other.forward(range(N_BLOCKS))
    gpu.drain()
    assert other.n_looks >= before + 2 * N_BLOCKS
    other.close()
    assert (gpu.n_streams, gpu.n_events, gpu.pinned) == (0, 0, {})


def test_after_a_change_of_modules_only_the_first_block_is_late(tmp_path, monkeypatch):
    gpu = LockedGpu(random.Random(5), monkeypatch)
    path = save_model(tmp_path, N_BLOCKS)
    a = Streamed(path, gpu, pinned=range(N_BLOCKS))
    a.schedule.start()
    b = Streamed(path, gpu, pinned=range(N_BLOCKS), share=a)
    b.schedule.start()
    for one in (a, b, a):
        one.forward(range(N_BLOCKS))
    assert (a.schedule.n_late, b.schedule.n_late) == (1, 1)
    a.close()
    b.close()


def test_what_is_registered_needs_no_thread(tmp_path, monkeypatch):
    gpu = LockedGpu(random.Random(1), monkeypatch)
    before = threading.active_count()
    streamed = Streamed(save_model(tmp_path, N_BLOCKS), gpu, pinned=range(N_BLOCKS))
    streamed.schedule.start()
    streamed.forward(range(N_BLOCKS))
    assert threading.active_count() == before
    assert streamed.source.travel()[Transport.BUFFERED] == streamed.source.travel()[Transport.DIRECT] == (0, 0)
    streamed.close()


def test_a_driver_that_registers_nothing_has_all_blocks_read(tmp_path, monkeypatch):
    from wan_loader.devices.writer import PinError

    gpu = LockedGpu(random.Random(2), monkeypatch)

    def refuse(*args, **kwargs):
        raise PinError("not today")

    monkeypatch.setattr(gpu, "register", refuse)
    streamed = Streamed(save_model(tmp_path, N_BLOCKS), gpu, pinned=range(N_BLOCKS))
    streamed.schedule.start()
    streamed.forward(range(N_BLOCKS))
    assert len(streamed.source.fallbacks) == 2  # the pages, and the slots
    assert "blocks.0 and what follows are not registered" in streamed.source.fallbacks[0]
    assert streamed.source.travel()[Transport.MAPPED] == (0, 0)
    streamed.close()
    assert streamed.n_looks == 2 * N_BLOCKS


def test_reads_go_on_between_forwards_within_the_slots(tmp_path, monkeypatch, small_chunks):
    started = []
    start = ReadQueue.start

    def noted(queue, block, place=None):
        started.append(block)
        assert len(queue.used) <= 4
        return start(queue, block, place)

    monkeypatch.setattr(ReadQueue, "start", noted)
    gpu = LockedGpu(random.Random(3), monkeypatch)
    streamed = Streamed(save_model(tmp_path, N_BLOCKS), gpu, pinned=[])
    streamed.schedule.start()
    for _ in range(2):
        streamed.forward(range(N_BLOCKS))
    # every part of every block in turn, and what is next already: nothing twice, although nothing was asked for
    order = [
        block for number in itertools.chain(range(3), [3, 4, 5, 6, 1, 2, 0] * 3) for block in parts(streamed, number)
    ]
    n_asked = sum(len(parts(streamed, number)) for number in range(N_BLOCKS)) * 2 + sum(
        len(parts(streamed, number)) for number in range(3)
    )
    deadline = time.monotonic() + 10
    while len(started) < n_asked + 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(started) == n_asked + 4
    assert started == order[: len(started)]
    streamed.close()


def parts(streamed, number):
    return streamed.source._blocks[number]


@pytest.mark.parametrize("end", ["drop", "close"])
def test_nobody_waits_for_the_rest_of_a_block_that_is_not_needed(tmp_path, monkeypatch, small_chunks, end):
    gpu = LockedGpu(random.Random(6), monkeypatch)
    streamed = Streamed(save_model(tmp_path, N_BLOCKS), gpu, pinned=[])
    begun, n_copied = threading.Event(), []
    copy = streamed.device.copy

    def slow(*arguments):
        copy(*arguments)
        n_copied.append(1)
        begun.set()
        while not streamed.source._is_stopping:
            time.sleep(0.001)

    monkeypatch.setattr(streamed.device, "copy", slow)
    streamed.schedule.start()
    assert begun.wait(10)
    if end == "drop":
        streamed.source.drop()
    streamed.close()
    assert len(n_copied) == 1 < len(parts(streamed, 0))
    assert (gpu.n_streams, gpu.n_events, gpu.pinned) == (0, 0, {})
