"""Copies to a device that follow each other go as one, and streams do their work late: nothing is used too early."""

import ctypes
import random
import threading
from collections import deque
from contextlib import contextmanager
from functools import partial
from itertools import pairwise

import pytest
import torch
from fake_gpu import FakeGpu
from hypothesis import given
from hypothesis import strategies as st

from wan_loader.devices import cuda
from wan_loader.devices.cuda import join_copies
from wan_loader.devices.resolve import current
from wan_loader.devices.writer import Destination, HostBlock
from wan_loader.errors import DeviceMemoryError
from wan_loader.events import Recorder
from wan_loader.plan.blocks import Block, Segment, Transport, split

EVERYWHERE = (0, 1 << 40)


def test_neighbours_on_both_sides_become_one():
    copies = [(100, 7, 10), (110, 17, 5), (115, 22, 1)]
    assert list(join_copies(copies, lambda address: EVERYWHERE)) == [(100, 7, 16)]


def test_neighbours_on_one_side_do_not():
    for copies in ([(100, 7, 10), (110, 18, 5)], [(100, 7, 10), (112, 17, 5)], [(100, 7, 10), (90, 17, 10)]):
        assert list(join_copies(copies, lambda address: EVERYWHERE)) == copies


def test_nothing_goes_beyond_its_allocation():
    copies = [(90, 0, 10), (100, 10, 10), (110, 20, 10)]
    ends = {90: (0, 100), 100: (100, 200)}
    assert list(join_copies(copies, ends.__getitem__)) == [(90, 0, 10), (100, 10, 20)]


def test_where_the_driver_cannot_say_every_copy_stays_alone():
    copies = [(90, 0, 10), (100, 10, 10)]
    assert list(join_copies(copies, lambda address: (address, address))) == copies


def test_nothing():
    assert list(join_copies([], lambda address: EVERYWHERE)) == []


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 2), st.integers(0, 2)), max_size=30), st.integers(1, 40))
def test_every_byte_comes_from_where_it_came(sizes, room):
    """Allocations of `room` bytes side by side."""
    copies, to, source = [], 0, 1000
    for nbytes, gap, skip in sizes:
        to, source = to + gap, source + skip
        nbytes = min(nbytes, room - to % room)  # a tensor lies in one allocation
        copies.append((to, source, nbytes))
        to, source = to + nbytes, source + nbytes
    made = list(join_copies(copies, lambda address: (address // room * room, address // room * room + room)))
    bytewise = [(t + i, s + i) for t, s, n in copies for i in range(n)]
    assert [(t + i, s + i) for t, s, n in made for i in range(n)] == bytewise
    assert all(t // room == (t + n - 1) // room for t, _, n in made)
    for (t, s, n), (u, v, _) in pairwise(made):
        assert (u, v) != (t + n, s + n) or u % room == 0, "could have been one"


SLOT_BYTES = 512


class Load:
    """Tensors of a file, of which some are converted: their bytes, their destinations, and the parts of its blocks."""

    def __init__(self, rng, n_tensors, *, aligned=True, share=0.7):
        self.file, self.segments, self.destinations, self.expected = b"", [], [], []
        for storage in range(n_tensors):
            converts, count = rng.random() < share, rng.randint(1, 300)
            source = torch.randn(count).to(rng.choice([torch.float32, torch.float16]))
            whole = torch.zeros(count, dtype=torch.bfloat16 if converts else source.dtype)
            self.expected.append(source.to(whole.dtype))
            nbytes = source.nbytes
            at = len(self.file) if aligned else len(self.file) + rng.randint(0, 3)
            at += -at % 4 if aligned else 0
            self.file = self.file.ljust(at, b"?") + bytes(source.view(torch.uint8).tolist())
            self.segments.append(Segment(storage, 0, at, nbytes, source.itemsize if converts else 1))
            self.destinations.append(Destination(whole, whole.data_ptr(), source.dtype if converts else None))
        self.parts = []
        start, end = self.segments[0].file_start, self.segments[-1].file_end
        all_of_it = Block(Transport.BUFFERED, 0, start, end, tuple(self.segments))
        for block in split(all_of_it, rng.choice([SLOT_BYTES, 4 * SLOT_BYTES])):
            cut = list(split(block, SLOT_BYTES))
            self.parts += [part._replace(whole=block) for part in cut] if len(cut) > 1 else cut


def carry(load, rng, writer, n_slots=5):
    """Carry a load out as the engine does: through a few slots, which are written to again once they are free."""
    slots = [ctypes.create_string_buffer(SLOT_BYTES + 8) for _ in range(n_slots)]
    free, copying, arrived = list(slots), deque(), []
    stream, parts = writer.stream(), list(load.parts)

    def wait_for_first():
        event, used = copying.popleft()
        event.wait()
        assert event.done()
        free.extend(used)

    while parts:
        together = []
        for _ in range(rng.randint(1, min(3, len(parts)))):
            if not free:
                break
            # reads end in another order than they began in
            part = parts.pop(rng.randrange(min(3, len(parts))))
            slot = free.pop()
            ctypes.memmove(slot, load.file[part.start : part.end], part.nbytes)
            together.append((HostBlock(ctypes.addressof(slot), part, quick=True), slot))
        if together:
            copying.append((stream.submit([block for block, _ in together]), [slot for _, slot in together]))
        arrived += check_arrived(load, writer.arrived())
        if copying and (not free or rng.random() < 0.3):
            wait_for_first()
    writer.finish()
    return arrived + check_arrived(load, writer.arrived())


def check_arrived(load, segments):
    """What is said to be there is there."""
    for segment in segments:
        start = segment.storage_start // segment.itemsize
        count = segment.nbytes // segment.itemsize
        whole, expected = load.destinations[segment.storage].whole, load.expected[segment.storage]
        if segment.itemsize == 1:
            whole, expected = whole.view(torch.uint8), expected.view(torch.uint8)
        assert torch.equal(whole[start : start + count], expected[start : start + count])
    return segments


@pytest.mark.parametrize("seed", range(40))
def test_whatever_the_streams_do_first_the_weights_are_right(monkeypatch, seed):
    rng = random.Random(seed)
    monkeypatch.setattr(cuda, "_BUFFER_UNIT", SLOT_BYTES)
    gpu = FakeGpu(rng, monkeypatch)
    load = Load(rng, 40, aligned=seed % 2 == 0, share=rng.choice([0.0, 0.7, 0.7]))
    writer = gpu.writer()
    for destination in load.destinations:  # memory that was let go of while work is still queued on it
        gpu.queue(0, partial(destination.whole.fill_, 7))
    writer.bind(load.destinations)
    arrived = carry(load, rng, writer)
    gpu.drain()
    assert sum(segment.nbytes for segment in arrived) == sum(segment.nbytes for segment in load.segments)
    for destination, expected in zip(load.destinations, load.expected, strict=True):
        assert torch.equal(destination.whole, expected)
    assert gpu.n_streams == 0
    assert gpu.n_events == 1  # the one of `bind`, which goes with the writer
    assert gpu.n_buffers < len(load.parts)


def test_where_no_further_buffer_finds_room_those_there_are_take_turns(monkeypatch):
    rng, refused = random.Random(3), []
    gpu, plain = FakeGpu(rng, monkeypatch), cuda._CopyStream._make_buffer
    load = Load(rng, 40, share=1.0)
    start, end = load.segments[0].file_start, load.segments[-1].file_end
    load.parts = list(split(Block(Transport.BUFFERED, 0, start, end, tuple(load.segments)), SLOT_BYTES))

    def make(stream, nbytes):
        if len(stream._buffers) == 3:  # as many blocks as are submitted together
            refused.append(nbytes)
            raise DeviceMemoryError("no room")
        return plain(stream, nbytes)

    monkeypatch.setattr(cuda._CopyStream, "_make_buffer", make)
    writer = gpu.writer()
    writer.bind(load.destinations)
    carry(load, rng, writer)
    assert refused, "a further one was asked for"
    assert all(torch.equal(d.whole, expected) for d, expected in zip(load.destinations, load.expected, strict=True))


@pytest.mark.parametrize("seed", range(10))
def test_spans_tell_when_the_device_was_at_work(monkeypatch, seed):
    """A cast begins when the copies are over that it waited for, whenever it was submitted."""
    rng, spans = random.Random(seed), Recorder()
    gpu = FakeGpu(rng, monkeypatch)
    monkeypatch.setattr(cuda, "clock_ns", lambda: gpu.now)
    load = Load(rng, 30, share=1.0)
    writer = gpu.writer(spans)
    writer.bind(load.destinations)
    carry(load, rng, writer)
    copies = sorted((span for span in spans.spans if span.name == "h2d"), key=lambda span: span.end_ns)
    casts = sorted((span for span in spans.spans if span.name == "cast"), key=lambda span: span.end_ns)
    nbytes = sum(segment.nbytes for segment in load.segments)
    assert sum(span.nbytes for span in copies) == sum(span.nbytes for span in casts) == nbytes
    for one, next_one in [*pairwise(copies), *pairwise(casts)]:
        assert one.end_ns <= next_one.start_ns
    converted = 0
    for cast in casts:
        converted += cast.nbytes
        assert sum(copy.nbytes for copy in copies if copy.end_ns <= cast.start_ns + 2) >= converted
    assert gpu.n_events == 1


@pytest.mark.parametrize("seed", range(20))
def test_the_caller_may_go_on_with_another_stream(monkeypatch, seed):
    """What was queued on the one before still counts for the memory that was allocated for that."""
    rng = random.Random(seed)
    gpu = FakeGpu(rng, monkeypatch)
    load = Load(rng, 10, share=0.0)
    writer = gpu.writer()
    for destination in load.destinations:
        gpu.queue(gpu.callers, partial(destination.whole.fill_, 7))
        writer.bind([destination])
        gpu.callers = -1 - gpu.callers
    carry(load, rng, writer)
    gpu.drain()
    assert all(torch.equal(d.whole, expected) for d, expected in zip(load.destinations, load.expected, strict=True))


def test_an_allocation_may_be_another_one_after_memory_was_let_go_of(monkeypatch):
    rng, asked = random.Random(1), []
    gpu = FakeGpu(rng, monkeypatch)
    gpu.allocation = lambda address: asked.append(address) or (0, 1 << 63)
    load = Load(rng, 10, share=0.0)
    writer = gpu.writer()
    writer.bind(load.destinations[:5])
    stream, source = writer.stream(), ctypes.create_string_buffer(load.file)
    for start, end in ((0, 5), (5, 10)):
        writer.bind(load.destinations[5:end])
        for segment in load.segments[start:end]:
            block = Block(Transport.BUFFERED, 0, segment.file_start, segment.file_end, (segment,))
            stream.submit([HostBlock(ctypes.addressof(source) + block.start, block)])
        assert len(asked) == (1 if end == 5 else 2)
    writer.finish()


def test_a_mode_of_the_caller_does_not_matter_to_another_thread(monkeypatch):
    """Tensors that are made in inference mode may be written by no thread that is not in it."""
    rng = random.Random(2)
    gpu = FakeGpu(rng, monkeypatch)
    with torch.inference_mode():
        load = Load(rng, 5)
        load.destinations = [d._replace(whole=d.whole.clone()) for d in load.destinations]
        load.destinations = [d._replace(address=d.whole.data_ptr()) for d in load.destinations]
    assert all(destination.whole.is_inference() for destination in load.destinations)
    writer, failed = gpu.writer(), []

    def submit():
        try:
            carry(load, rng, writer)
        except BaseException as error:
            failed.append(error)

    writer.bind(load.destinations)
    thread = threading.Thread(target=submit)
    thread.start()
    thread.join()
    assert not failed
    assert all(torch.equal(d.whole, expected) for d, expected in zip(load.destinations, load.expected, strict=True))


def test_a_new_thread_gets_the_context_of_a_device_that_is_its_own_already(monkeypatch):
    """`torch.cuda.device` leaves such a thread as it is, and calls of the driver would find no context there."""
    done = []

    @contextmanager
    def device(name):
        done.append("device")
        yield
        done.append("as before")

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "set_device", lambda name: done.append(name))
    with current("cuda:0"):
        done.append("body")
    assert done == ["device", "cuda:0", "body", "as before"]
