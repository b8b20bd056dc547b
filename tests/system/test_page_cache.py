"""What is in the page cache: exactly, by trying pages, or unknown; and trying leaves everything as it was."""

import errno
import os

import pytest

from wan_loader.plan.blocks import ByteRange
from wan_loader.stage_copy.copy_blocks import BLOCK_BYTES, cold_blocks
from wan_loader.system import page_cache as module
from wan_loader.system.mounts import Mount
from wan_loader.system.page_cache import WINDOW_BYTES, Knowledge, PageCache, cached, describe, knowledge_of
from wan_loader.system.posix import PAGE
from wan_loader.warming.evict import evict as push_out
from wan_loader.warming.evict import resident_bytes
from wan_loader.warming.tree import list_tree
from wan_loader.warming.warm import warm

N_WINDOWS = 10
NBYTES = N_WINDOWS * WINDOW_BYTES - 5000


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("residency") / "weights.safetensors"
    path.write_bytes(bytes(NBYTES))
    return path


@pytest.fixture
def fd(weights, evict):
    """A cold file, open for reading."""
    evict(weights)
    fd = os.open(weights, os.O_RDONLY)
    yield fd
    os.close(fd)


@pytest.fixture
def not_told(monkeypatch):
    """As for a file that one neither owns nor may write."""

    def refuse(fd, start, nbytes):
        raise PermissionError(errno.EPERM, "refused")

    monkeypatch.setattr(module, "cached_bytes", refuse)
    monkeypatch.setattr("wan_loader.warming.prewarm.cached_bytes", refuse)


@pytest.fixture
def unknown(not_told, monkeypatch):
    """On a file system, too, that does not know reads without waiting."""
    read = os.preadv

    def preadv(fd, buffers, offset, flags=0):
        if flags & os.RWF_NOWAIT:
            raise OSError(errno.EOPNOTSUPP, "not supported")
        return read(fd, buffers, offset, flags)

    monkeypatch.setattr(os, "preadv", preadv)


def bring_in(fd, *windows):
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
    for window in windows:
        os.pread(fd, WINDOW_BYTES, window * WINDOW_BYTES)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_NORMAL)


def test_what_the_kernel_tells_is_exact(fd, weights):
    bring_in(fd, 3)
    assert cached(fd, 0, NBYTES) == WINDOW_BYTES
    assert knowledge_of([weights]) is Knowledge.EXACT
    assert describe([weights, weights.with_name("missing")]) == ()


@pytest.mark.usefixtures("not_told")
def test_trying_tells_cold_from_warm(fd, weights):
    assert cached(fd, 0, NBYTES) == 0
    bring_in(fd, *range(N_WINDOWS))
    assert cached(fd, 0, NBYTES) == NBYTES
    assert cached(fd, 5000, 100) == 100
    assert cached(fd, 0, 0) == 0
    assert knowledge_of([weights]) is Knowledge.ESTIMATED
    assert "estimated" in describe([weights])[0]


def test_trying_leaves_a_cold_file_cold(fd, weights, resident):
    for _ in range(3):
        module._try(fd, 0, NBYTES)
    assert resident(weights) < 4 * PAGE  # of 30 that were tried


@pytest.mark.usefixtures("not_told")
def test_a_page_that_stays_does_not_answer_for_its_window(fd, monkeypatch):
    """Where trying could not undo what it caused, the next answer is right all the same."""
    monkeypatch.setattr(module._Tries, "__exit__", lambda *_: None)
    for _ in range(3):
        assert cached(fd, 0, NBYTES - WINDOW_BYTES) <= WINDOW_BYTES


@pytest.mark.usefixtures("not_told")
def test_trying_finds_where_a_warm_part_ends(fd, monkeypatch):
    monkeypatch.setattr(module, "_FIRST_TRIES", 3)
    bring_in(fd, 0, 1, 2)
    pages = PageCache([fd])
    wanted = [ByteRange(0, 0, 100, NBYTES)]
    assert pages.residency(wanted, unit=WINDOW_BYTES).total(wanted) == 3 * WINDOW_BYTES
    assert pages.share(0, WINDOW_BYTES, 2 * WINDOW_BYTES) == 1.0
    assert pages.share(0, 2 * WINDOW_BYTES, 4 * WINDOW_BYTES) == 0.5
    assert pages.share(0, 5 * WINDOW_BYTES, NBYTES) < 1
    assert pages.knowledge is Knowledge.ESTIMATED


@pytest.mark.usefixtures("not_told")
def test_a_file_is_tried_once_with_few_reads(fd, monkeypatch):
    tried = []
    monkeypatch.setattr(module._Tries, "is_there", lambda self, start, end: bool(tried.append(start)))
    monkeypatch.setattr(module, "WINDOW_BYTES", 64 << 10)
    pages = PageCache([fd])
    for start in range(0, NBYTES - 4096, NBYTES // 50):
        wanted = [ByteRange(0, 0, start, start + 4096)]
        assert pages.residency(wanted, unit=WINDOW_BYTES).total(wanted) == 0
    assert len(tried) <= 17


@pytest.mark.usefixtures("not_told")
def test_a_disk_that_is_quicker_than_the_answer_makes_no_page_warm(fd, monkeypatch):
    read = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset, flags: read(fd, buffers, offset))
    assert cached(fd, 0, NBYTES) == 0


@pytest.mark.usefixtures("not_told")
def test_a_patchy_file_costs_a_bounded_number_of_reads(fd, monkeypatch):
    monkeypatch.setattr(module, "_MAX_MISSES", 2)
    reads, read = [], os.preadv
    monkeypatch.setattr(os, "preadv", lambda *a: reads.append(a) or read(*a))
    assert cached(fd, 0, NBYTES) == 0
    assert len(reads) == 2


def test_what_cannot_be_known_is_unknown_and_counts_as_cold(fd, weights, unknown):
    bring_in(fd, 0, 1)
    assert cached(fd, 0, NBYTES) is None
    assert resident_bytes([weights]) is None
    pages = PageCache([fd])
    wanted = [ByteRange(0, 0, 0, NBYTES)]
    assert pages.residency(wanted, unit=WINDOW_BYTES).total(wanted) == 0
    assert pages.share(0, 0, 4096) == 0.0
    assert pages.knowledge is Knowledge.UNKNOWN
    assert "unknown" in describe([weights])[0]


@pytest.mark.usefixtures("unknown")
def test_what_lies_in_memory_is_there_whatever_the_kernel_tells(fd, monkeypatch):
    monkeypatch.setattr(module, "mount_of", lambda fd: Mount("tmpfs", "tmpfs", "/ram"))
    assert cached(fd, 0, NBYTES) == NBYTES


def test_eviction_says_that_it_does_not_know(fd, weights, unknown):
    (result,) = push_out([weights])
    assert (result.nbytes, result.resident_before, result.resident_after) == (NBYTES, None, None)
    assert "unknown" in result.reason


def test_eviction_is_proved_by_trying(fd, weights, not_told, resident):
    bring_in(fd, *range(N_WINDOWS))
    (result,) = push_out([weights])
    assert (result.resident_before, result.resident_after, result.reason) == (NBYTES, 0, "")


def test_warming_reads_all_and_says_that_it_does_not_know(fd, weights, unknown, resident):
    result = warm(list_tree(weights).files)
    assert (result.resident_before, result.resident_after, result.complete) == (None, None, None)
    assert result.nbytes_read == NBYTES
    assert resident(weights) == NBYTES


@pytest.mark.usefixtures("unknown")
def test_pages_that_may_have_been_there_are_not_dropped_after_staging(fd, weights):
    (source,) = list_tree(weights).files
    assert cold_blocks(source) == set()


@pytest.mark.usefixtures("not_told")
def test_blocks_that_were_tried_cold_are_dropped_after_staging(fd, weights):
    (source,) = list_tree(weights).files
    assert cold_blocks(source) == set(range(-(-NBYTES // BLOCK_BYTES)))


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become another user")
def test_another_user_s_cold_file_is_cold(open_dir, evict, resident, unprivileged):
    path = open_dir / "weights"
    path.write_bytes(bytes(3 * WINDOW_BYTES))
    path.chmod(0o644)
    evict(path)
    with unprivileged():
        assert knowledge_of([path]) is Knowledge.ESTIMATED
        assert resident_bytes([path]) == 0
    assert resident(path) < 4 * PAGE
    path.read_bytes()
    with unprivileged():
        assert resident_bytes([path]) == 3 * WINDOW_BYTES
        assert push_out([path])[0].resident_after == 0
    assert resident(path) < WINDOW_BYTES
