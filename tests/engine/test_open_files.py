"""What comes off storage: residency as the kernel says, bytes as the file says, or an error that names the file."""

import ctypes
import errno
import mmap
import os
import random
from pathlib import Path

import pytest

from wan_loader.engine.open_files import BlockRead, OpenFiles
from wan_loader.errors import CheckpointError, MissingFileError
from wan_loader.formats.checkpoint_facts import stat_file
from wan_loader.plan.blocks import Block, ByteRange, Segment, Transport, plan_blocks
from wan_loader.system import posix as linux
from wan_loader.system import posix_aio as aio
from wan_loader.system.page_cache import PageCache
from wan_loader.system.posix import PAGE, cached_bytes

MiB = 1 << 20


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "weights"
    path.write_bytes(random.Random(4).randbytes(3 * MiB + 1234))
    return path


@pytest.fixture
def reader(path):
    with OpenFiles([stat_file(str(path))]) as reader:
        yield reader


@pytest.fixture(params=["cachestat", "mincore"])
def page_cache(request, reader, monkeypatch):
    """Residency by either system call."""
    if request.param == "mincore":
        monkeypatch.setattr(linux, "_SYS_CACHESTAT", 9999)  # a kernel without it: ENOSYS
    return PageCache(reader.fds)


@pytest.fixture
def view():
    with mmap.mmap(-1, 4 * MiB) as memory, memoryview(memory) as view:
        yield view


def block(start, end, transport=Transport.BUFFERED):
    return Block(transport, 0, start, end, (Segment(0, 0, start, end - start),))


# residency


def total(page_cache, start, end):
    wanted = [ByteRange(0, 0, start, end)]
    return page_cache.residency(wanted, unit=MiB).total(wanted)


def test_resident_after_writing(path, page_cache):
    size = path.stat().st_size
    assert total(page_cache, 0, size) == size
    assert page_cache.share(0, 0, size) == 1
    assert page_cache.share(0, 5, 6) == 1
    assert total(page_cache, 5, 6) == 1
    assert total(page_cache, 7, 7) == 0


def test_residency_after_evicting(path, page_cache, evict):
    size = path.stat().st_size
    evict(path)
    assert total(page_cache, 0, size) == 0
    assert page_cache.share(0, 0, size) < 1
    assert page_cache.share(0, 0, 1) < 1


@pytest.fixture
def only_in_cache(path, reader, evict):
    """Leave just these byte ranges of the file in the page cache (evicting a part would leave large folios whole).

    Some machines drop single pages that were just read: those are read again.
    """
    fd = reader.fds[0]

    def only(*ranges):
        evict(path)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)  # no readahead
        pages = [at for start, end in ranges for at in range(start, end, PAGE)]
        for _ in range(5):
            for at in pages:
                os.pread(fd, 1, at)
            pages = [at for at in pages if not cached_bytes(fd, at, PAGE)]

    return only


def test_residency_of_parts(path, page_cache, only_in_cache):
    size = path.stat().st_size
    only_in_cache((0, MiB), (2 * MiB, size))
    assert page_cache.share(0, 0, MiB) == 1
    assert page_cache.share(0, 2 * MiB, size) == 1
    assert page_cache.share(0, MiB, 2 * MiB) < 1
    assert page_cache.share(0, MiB - 1, MiB + 1) < 1
    assert total(page_cache, MiB, 2 * MiB) == 0
    assert total(page_cache, 0, 2 * MiB) == MiB
    assert total(page_cache, 0, size) == pytest.approx(size - MiB, abs=PAGE)


def test_residency_after_the_reader_read_a_part(path, page_cache, reader, only_in_cache, view):
    only_in_cache()
    read(reader, block(MiB, MiB + 10 * PAGE), view)
    assert page_cache.share(0, MiB, MiB + 10 * PAGE) == 1
    assert total(page_cache, 0, path.stat().st_size) == 10 * PAGE


def test_both_system_calls_agree(reader, only_in_cache, monkeypatch):
    only_in_cache((0, 512 * 1024), (699_000, 710_000), (2 * MiB, 2 * MiB + 1))
    ranges = [(0, PAGE), (0, MiB), (511 * 1024, 513 * 1024), (700_001, 700_003), (MiB, 3 * MiB), (0, 3 * MiB + 1234)]
    page_cache = PageCache(reader.fds)
    by_cachestat = [total(page_cache, *r) for r in ranges]
    monkeypatch.setattr(linux, "_SYS_CACHESTAT", 9999)
    assert [total(page_cache, *r) for r in ranges] == by_cachestat


def test_total_counts_touching_and_repeated_bytes_once(reader):
    page_cache = PageCache(reader.fds)
    byte_ranges = [
        ByteRange(0, 0, 0, 100),
        ByteRange(1, 0, 100, 5000),
        ByteRange(2, 0, 100, 5000),
        ByteRange(3, 0, 9000, 9001),
    ]
    residency = page_cache.residency(byte_ranges, unit=MiB)
    assert residency.total(byte_ranges) == residency.total(reversed(byte_ranges)) == 5001
    assert residency.total([]) == 0


def test_what_is_uniform_is_asked_once(path, reader, only_in_cache, monkeypatch):
    only_in_cache((0, MiB))
    asked = []
    monkeypatch.setattr("wan_loader.system.page_cache.cached_bytes", lambda *r: asked.append(r) or cached_bytes(*r))
    page_cache = PageCache(reader.fds)
    size = path.stat().st_size
    wanted = [ByteRange(0, 0, 5, MiB - 5), ByteRange(1, 0, 2 * MiB, size)]
    residency = page_cache.residency(wanted, unit=MiB)
    assert residency.total(wanted) == MiB - 10
    assert residency.share(0, 100, 200) == residency.share(0, 0, MiB) == 1.0
    assert residency.share(0, 2 * MiB, 2 * MiB + 1) == residency.share(0, 2 * MiB, size) == 0.0
    assert residency.share(0, MiB, 2 * MiB) == 0.0, "what was not asked for counts as cold"
    assert residency.share(0, MiB // 2, 2 * MiB) == pytest.approx(1 / 3)
    assert len(asked) == 2
    whole = [ByteRange(0, 0, 0, size)]
    residency = page_cache.residency(whole, unit=MiB)
    assert residency.total(whole) == MiB
    assert residency.share(0, 0, MiB) == 1.0
    assert residency.share(0, MiB, size) == 0.0
    assert len(asked) == 2 + 1 + 4, "once for all, and once for each part, since they differ"


def test_residency_that_cannot_be_told_counts_as_cold(tmp_path, monkeypatch):
    monkeypatch.setattr(linux, "_SYS_CACHESTAT", 9999)
    read, write = os.pipe()  # cannot be mapped
    try:
        page_cache = PageCache([read])
        assert total(page_cache, 0, PAGE) == 0
        assert page_cache.share(0, 0, PAGE) < 1
    finally:
        os.close(read)
        os.close(write)


# the reader


def read(reader, block, view):
    """Read a block as the engine does; returns where in `view` it begins, and the way it took."""
    reading, request = BlockRead(reader, block), aio.AioRequest()
    address, complete = ctypes.addressof(ctypes.c_char.from_buffer(view)), False
    while not complete:
        start, nbytes, position = reading.wanted
        request.start(reading.fd, address + start, nbytes, position)
        try:
            while (n := request.result()) is None:
                aio.wait_any([request], 1)
            complete = reading.arrived(n)
        except OSError as error:
            reading.failed(error)
    return reading.data_start, reading.transport


@pytest.mark.parametrize("transport", [Transport.BUFFERED, Transport.DIRECT])
@pytest.mark.parametrize(
    ("start", "end"),
    [(0, 1), (0, PAGE), (1, PAGE), (4095, 4097), (123, 2 * MiB + 77), (PAGE, 3 * MiB), (3 * MiB, 3 * MiB + 1234)],
)
def test_reads_any_range(path, reader, view, transport, start, end):
    if transport is Transport.DIRECT and not reader.open_direct(0):
        pytest.skip("O_DIRECT is refused here")
    data_start, taken = read(reader, block(start, end, transport), view)
    assert taken is transport
    assert bytes(view[data_start : data_start + end - start]) == path.read_bytes()[start:end]
    assert reader.fallbacks == []


@pytest.mark.parametrize("transport", [Transport.BUFFERED, Transport.DIRECT])
@pytest.mark.parametrize("left", [0, 1, PAGE, MiB, MiB + 1, 3 * MiB])
@pytest.mark.timeout(3)
def test_truncated_file_is_named(path, reader, view, transport, left):
    if transport is Transport.DIRECT and not reader.open_direct(0):
        pytest.skip("O_DIRECT is refused here")
    os.truncate(path, left)
    with pytest.raises(CheckpointError, match="truncated") as caught:
        read(reader, block(100, 3 * MiB + 1234, transport), view)
    assert caught.value.path == str(path)


def test_only_the_process_s_own_memory_is_taken_for_it(path, reader):
    assert not reader.is_own_memory
    own = stat_file("/proc/self/mem")
    with OpenFiles([own]) as memory, OpenFiles([own, stat_file(str(path))]) as both, OpenFiles([]) as none:
        assert memory.is_own_memory
        assert not both.is_own_memory
        assert not none.is_own_memory


def test_vanished_file_is_named(tmp_path, path):
    facts = stat_file(str(path))
    path.unlink()
    with pytest.raises(MissingFileError, match="vanished") as caught:
        OpenFiles([facts])
    assert caught.value.path == str(path)


def test_nothing_stays_open_when_one_file_is_missing(tmp_path, path):
    facts = stat_file(str(path))
    gone = tmp_path / "gone"
    gone.write_bytes(b"x")
    missing = stat_file(str(gone))
    gone.unlink()
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(MissingFileError) as caught:
        OpenFiles([facts, missing])
    assert caught.value.path == str(gone)
    assert len(os.listdir("/proc/self/fd")) == before


def test_another_file_in_its_place_is_not_read(tmp_path, path):
    facts = stat_file(str(path))
    other = tmp_path / "other"
    other.write_bytes(path.read_bytes())
    with OpenFiles([facts]) as reader:
        os.replace(other, path)
        with pytest.raises(CheckpointError, match=f"{path} was replaced"):
            reader.open_direct(0)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(CheckpointError, match=f"{path} was replaced"):
        OpenFiles([facts])
    assert len(os.listdir("/proc/self/fd")) == before


def test_o_direct_refused(path, reader, view, monkeypatch):
    def refusing(*_):
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refusing)
        assert not reader.open_direct(0)
    assert not reader.open_direct(0)
    assert len(reader.fallbacks) == 1
    assert str(path) in reader.fallbacks[0]
    assert read(reader, block(7, 9000, Transport.DIRECT), view) == (0, Transport.BUFFERED)
    assert bytes(view[: 9000 - 7]) == path.read_bytes()[7:9000]


def test_io_error_is_named(path, reader, view, monkeypatch):
    result = aio.AioRequest.result

    def failing(request):
        if result(request) is not None:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(aio.AioRequest, "result", failing)
    with pytest.raises(CheckpointError, match="Input/output error") as caught:
        read(reader, block(0, 100), view)
    assert (caught.value.path, caught.value.remedy) == (str(path), "check the disk")


def test_direct_reads_leave_the_page_cache_alone(path, reader, view, evict, resident):
    if not reader.open_direct(0):
        pytest.skip("O_DIRECT is refused here")
    evict(path)
    for b in plan_blocks([ByteRange(0, 0, 10, 3 * MiB)], block_bytes=MiB, transport=lambda *_: Transport.DIRECT):
        read(reader, b, view)
    assert resident(path) == 0


# maps


@pytest.fixture
def mapped(path):
    """The file's first 3 MiB, mapped."""
    with open(path, "rb") as f:
        address = linux.map_file(f.fileno(), 0, 3 * MiB)
    yield address
    linux.unmap(address, 3 * MiB)
    assert str(path) not in Path("/proc/self/maps").read_text()


def test_mapped_file(path, mapped):
    linux.populate(mapped, 3 * MiB)
    assert ctypes.string_at(mapped, 3 * MiB) == path.read_bytes()[: 3 * MiB]
    assert ctypes.string_at(mapped + MiB, 100) == path.read_bytes()[MiB : MiB + 100]


def test_populating_beyond_the_end_is_an_error_not_a_signal(path, mapped):
    os.truncate(path, MiB)
    with pytest.raises(OSError, match="madvise"):
        linux.populate(mapped, 3 * MiB)


def test_mapping_that_is_refused():
    with pytest.raises(OSError, match="mmap"):
        linux.map_file(-1, 0, PAGE)
