"""Every `DeviceWriter` brings bytes to where they belong, whatever thread submits them, and says when it has."""

import contextlib
import ctypes
import mmap
import random
import threading

import pytest
import torch
from fake_device import FakeDevice

from wan_loader.devices.cpu import CpuWriter
from wan_loader.devices.cuda import CudaWriter
from wan_loader.devices.writer import Destination, HostBlock, PinError
from wan_loader.plan.blocks import Block, Segment, Transport, split
from wan_loader.system.posix import PAGE, read_at

MiB = 1 << 20
FILE_START = 12_345
"""Where in its file the source begins."""


class Source:
    """Host memory that holds bytes of a file, from `FILE_START` on."""

    def __init__(self, nbytes=2 * MiB, seed=1):
        self.data = random.Random(seed).randbytes(nbytes)
        self._map = mmap.mmap(-1, nbytes)
        self._map[:] = self.data
        self._view = (ctypes.c_char * nbytes).from_buffer(self._map)
        self.address = ctypes.addressof(self._view)

    def overwrite(self):
        self._map[:] = bytes(len(self.data))

    def bytes(self, segment):
        start = segment.file_start - FILE_START
        return self.data[start : start + segment.nbytes]


def segments(sizes, storage=0, at=0):
    """One of each size, of storages from `storage` on, one behind the other in the file from `at` on."""
    made = []
    for number, nbytes in enumerate(sizes, storage):
        made.append(Segment(number, 0, FILE_START + at, nbytes))
        at += nbytes
    return made


def host_block(source, all_segments, whole=None):
    start, end = min(s.file_start for s in all_segments), max(s.file_end for s in all_segments)
    block = Block(Transport.BUFFERED, 0, start, end, tuple(all_segments), whole)
    return HostBlock(source.address + start - FILE_START, block)


class TensorTargets:
    """Destinations as a load makes them: bytes of tensors."""

    device = "cpu"

    def prepare(self, sizes):
        self.writer = self.make_writer()
        self.tensors = [torch.zeros(nbytes, dtype=torch.uint8, device=self.device) for nbytes in sizes]
        self.destinations = [Destination(tensor, tensor.data_ptr()) for tensor in self.tensors]

    def bytes_of(self, storage):
        return self.tensors[storage].cpu().numpy().tobytes()


class DeviceWriterContract:
    """What the engine relies on."""

    @pytest.fixture
    def source(self):
        return Source()

    def submit(self, stream, source, all_segments):
        return stream.submit([host_block(source, all_segments)])

    def test_bytes_arrive_where_they_belong(self, source):
        sizes = [1, 7, 4096, 100_001, 1_000_000]
        self.prepare(sizes)
        self.writer.bind(self.destinations)
        all_segments = segments(sizes)
        self.submit(self.writer.stream(), source, all_segments)
        self.writer.finish()
        for segment in all_segments:
            assert self.bytes_of(segment.storage) == source.bytes(segment)

    def test_a_storage_in_pieces(self, source):
        """Of several blocks, in any order; nothing beside them is touched."""
        self.prepare([1000])
        self.writer.bind(self.destinations)
        stream = self.writer.stream()
        self.submit(stream, source, [Segment(0, 600, FILE_START + 5000, 300)])
        self.submit(stream, source, [Segment(0, 10, FILE_START + 77, 590)])
        self.writer.finish()
        expected = bytes(10) + source.data[77:667] + source.data[5000:5300] + bytes(100)
        assert self.bytes_of(0) == expected

    def test_the_source_is_free_once_an_event_says_so(self, source):
        self.prepare([MiB])
        self.writer.bind(self.destinations)
        (segment,) = segments([MiB])
        event = self.submit(self.writer.stream(), source, [segment])
        if event is not None:
            event.wait()
            assert event.done()
            event.wait()
        source.overwrite()
        self.writer.finish()
        assert self.bytes_of(0) == source.bytes(segment)

    def test_destinations_come_in_portions(self, source):
        sizes = [3000, 50, 70_000]
        self.prepare(sizes)
        all_segments = segments(sizes)
        self.writer.bind(self.destinations[:1])
        stream = self.writer.stream()
        self.submit(stream, source, all_segments[:1])
        self.writer.bind(self.destinations[1:])
        self.submit(stream, source, all_segments[1:])
        self.writer.finish()
        for segment in all_segments:
            assert self.bytes_of(segment.storage) == source.bytes(segment)

    def test_what_has_arrived_is_told_once(self, source):
        sizes = [5000, 3, 200_000, 0x10000]
        self.prepare(sizes)
        self.writer.bind(self.destinations)
        stream, all_segments = self.writer.stream(), segments(sizes)
        event = stream.submit([host_block(source, [segment]) for segment in all_segments[:3]])
        if event is not None:
            event.wait()
            assert event.done()
        assert sorted(self.writer.arrived()) == sorted(all_segments[:3])
        assert self.writer.arrived() == []
        self.submit(stream, source, all_segments[3:])
        self.writer.finish()
        assert self.writer.arrived() == all_segments[3:]
        assert self.writer.arrived() == []

    def test_each_thread_has_a_stream_of_its_own(self, source):
        sizes = [1000] * 8
        self.prepare(sizes)
        self.writer.bind(self.destinations)
        all_segments, failures = segments(sizes), []

        def submit(share):
            try:
                stream = self.writer.stream()
                events = [self.submit(stream, source, [segment]) for segment in share]
                for event in filter(None, events):
                    event.wait()
            except BaseException as failure:
                failures.append(failure)

        threads = [threading.Thread(target=submit, args=(all_segments[i::2],)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
        assert failures == []
        self.writer.finish()
        for segment in all_segments:
            assert self.bytes_of(segment.storage) == source.bytes(segment)

    def test_a_place_may_be_read_to_instead(self, source, tmp_path):
        self.prepare([1000])
        self.writer.bind(self.destinations)
        (tmp_path / "f").write_bytes(source.data[:1000])
        place = self.writer.place(Segment(0, 100, FILE_START, 900))
        if place is not None:
            with open(tmp_path / "f", "rb") as file:
                assert read_at(file.fileno(), place, 900, 0) == 900
            assert self.bytes_of(0) == bytes(100) + source.data[:900]
        self.writer.finish()

    @pytest.mark.parametrize("read_only", [True, False])
    def test_pinned_memory_is_copied_as_any_other(self, source, read_only):
        """What refuses to pin says so, and takes bytes all the same."""
        self.prepare([MiB])
        self.writer.bind(self.destinations)
        pinned = False
        with contextlib.suppress(PinError):
            self.writer.pin(source.address, 2 * MiB, read_only=read_only)
            pinned = True
        assert self.writer.can_pin or not pinned
        (segment,) = segments([MiB], at=PAGE + 5)
        self.submit(self.writer.stream(), source, [segment])
        self.writer.finish()
        assert self.bytes_of(0) == source.bytes(segment)
        released = []
        thread = threading.Thread(target=lambda: released.append(self.writer.unpin(source.address)))
        thread.start()
        thread.join(10)
        assert released == [True]

    def test_what_was_never_pinned_counts_as_unpinned(self, source):
        self.prepare([1])
        assert self.writer.unpin(source.address)

    def test_finishing_again_changes_nothing(self, source):
        """As the clean-up after a failure does."""
        self.prepare([1000])
        self.writer.bind(self.destinations)
        (segment,) = segments([1000])
        self.submit(self.writer.stream(), source, [segment])
        self.writer.finish()
        self.writer.finish()
        assert self.bytes_of(0) == source.bytes(segment)

    def test_finishing_without_anything_to_do(self):
        self.prepare([1])
        self.writer.finish()


class ConvertingWriterContract(TensorTargets, DeviceWriterContract):
    """Of those that convert on the way: exactly as `.to(dtype)` does."""

    @pytest.mark.parametrize(
        ("source_dtype", "dtype"),
        [("float32", "bfloat16"), ("float64", "float16"), ("float16", "float32"), ("bfloat16", "float16")],
    )
    @pytest.mark.parametrize("shift", [0, 1, 3])
    def test_conversions_are_torch_s(self, source_dtype, dtype, shift):
        """Of whole storages and of segments of them, wherever they lie in memory."""
        source_dtype, dtype = getattr(torch, source_dtype), getattr(torch, dtype)
        source = Source()
        counts = [1, 33, 5000]
        values = [torch.randn(count, dtype=torch.float32).to(source_dtype) for count in counts]
        raw = bytes(shift) + b"".join(value.view(torch.uint8).numpy().tobytes() for value in values)
        ctypes.memmove(source.address, raw, len(raw))
        tensors = [torch.zeros(count, dtype=dtype, device=self.device) for count in counts]
        writer = self.make_writer()
        writer.bind([Destination(tensor, tensor.data_ptr(), source_dtype) for tensor in tensors])
        itemsize = source_dtype.itemsize
        all_segments, at = [], FILE_START + shift
        for storage, count in enumerate(counts):
            for first, last in ((0, count // 2), (count // 2, count)):
                if first < last:
                    nbytes = (last - first) * itemsize
                    all_segments.append(Segment(storage, first * itemsize, at, nbytes, itemsize))
                    at += nbytes
        assert writer.place(all_segments[0]) is None, "it must pass through here to be converted"
        writer.stream().submit([host_block(source, all_segments)])
        writer.finish()
        assert sorted(writer.arrived()) == sorted(all_segments)
        for tensor, value in zip(tensors, values, strict=True):
            assert torch.equal(tensor, value.to(self.device).to(dtype))

    @pytest.mark.parametrize("shift", [0, 2])
    def test_parts_of_a_whole_come_in_any_order(self, shift):
        """Converted storages, large and small ones, between others that stay as they are."""
        source, generator = Source(), torch.Generator().manual_seed(3)
        counts = [7, 60_000, 11, 13, 30_000, 5]
        values = [torch.randn(count, generator=generator) for count in counts]
        raw = bytes(shift) + b"".join(value.view(torch.uint8).numpy().tobytes() for value in values)
        ctypes.memmove(source.address, raw, len(raw))
        stays = {3, 4}
        tensors = [
            torch.zeros(count, dtype=torch.float32 if i in stays else torch.bfloat16, device=self.device)
            for i, count in enumerate(counts)
        ]
        all_segments, at = [], FILE_START + shift
        for storage, count in enumerate(counts):
            all_segments.append(Segment(storage, 0, at, 4 * count, 1 if storage in stays else 4))
            at += 4 * count
        whole = host_block(source, all_segments).block
        parts = [part._replace(whole=whole) for part in split(whole, 5 * PAGE)]
        random.Random(1).shuffle(parts)
        writer = self.make_writer()
        writer.bind(
            [Destination(t, t.data_ptr(), None if i in stays else torch.float32) for i, t in enumerate(tensors)]
        )
        stream = writer.stream()
        for first in range(0, len(parts), 3):
            stream.submit(
                [HostBlock(source.address + part.start - FILE_START, part) for part in parts[first : first + 3]]
            )
        writer.finish()
        told = dict.fromkeys(range(len(counts)), 0)
        for segment in writer.arrived():
            told[segment.storage] += segment.nbytes
        assert list(told.values()) == [4 * count for count in counts]
        for tensor, value in zip(tensors, values, strict=True):
            assert torch.equal(tensor, value.to(self.device).to(tensor.dtype))


class TestCpuWriter(ConvertingWriterContract):
    def make_writer(self):
        return CpuWriter()


if torch.cuda.is_available():

    @pytest.mark.gpu
    class TestCudaWriter(ConvertingWriterContract):
        device = "cuda"

        def make_writer(self):
            torch.zeros(1, device="cuda")  # makes the context
            return CudaWriter(torch.cuda.current_device())


class TestFakeDevice(DeviceWriterContract):
    """What the engine's tests stand on."""

    @pytest.fixture(autouse=True)
    def closed(self):
        yield
        self.writer.close()

    def prepare(self, sizes):
        self.writer = FakeDevice(sizes, delay_s=0.001)
        self.destinations = list(range(len(sizes)))

    def bytes_of(self, storage):
        return bytes(self.writer.memory[storage])
