"""Prewarming: everything wanted ends up in the page cache, in bounds, and it ends when told to."""

import os
import subprocess
import sys
import threading

import pytest

from wan_loader.errors import MissingFileError, OptionError
from wan_loader.system.posix import cached_bytes
from wan_loader.warming import prewarm as module
from wan_loader.warming.prewarm import BLOCK_BYTES, prewarm, prewarm_files


@pytest.fixture
def cold_file(tmp_path):
    """Three blocks and a bit, evicted; skipped where the file system keeps its pages."""
    path = tmp_path / "weights.safetensors"
    path.write_bytes(os.urandom(3 * BLOCK_BYTES + 12345))
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)
    if resident(path):
        pytest.skip("this file system does not let go of pages")
    return path


def resident(path):
    fd = os.open(path, os.O_RDONLY)
    try:
        return cached_bytes(fd, 0, os.fstat(fd).st_size)
    finally:
        os.close(fd)


def test_brings_files_into_the_page_cache(cold_file):
    warming = prewarm_files([cold_file])
    assert warming.wait(30)
    assert resident(cold_file) == cold_file.stat().st_size
    assert warming.nbytes_read + warming.nbytes_resident == cold_file.stat().st_size


def test_reads_nothing_that_is_there(cold_file):
    cold_file.read_bytes()
    warming = prewarm_files([cold_file])
    assert warming.wait(30)
    assert warming.nbytes_read == 0
    assert warming.nbytes_resident == cold_file.stat().st_size


def test_stays_within_its_limit(cold_file):
    warming = prewarm_files([cold_file], threads=1, limit_nbytes=BLOCK_BYTES)
    assert warming.wait(30)
    assert warming.nbytes_read <= BLOCK_BYTES


def test_never_takes_more_than_is_available(cold_file, monkeypatch):
    monkeypatch.setattr(module, "available_memory", lambda: 0)
    warming = prewarm_files([cold_file])
    assert warming.wait(30)
    assert warming.nbytes_read == 0


@pytest.fixture
def slow_reads(monkeypatch):
    """Reads wait for the event that is returned; the second event says that one has begun."""
    go, begun = threading.Event(), threading.Event()
    read = os.preadv

    def preadv(fd, buffers, offset):
        begun.set()
        go.wait(30)
        return read(fd, buffers, offset)

    monkeypatch.setattr(module.os, "preadv", preadv)
    yield go, begun
    go.set()


def test_stop_ends_it_within_a_block(cold_file, slow_reads):
    go, begun = slow_reads
    warming = prewarm_files([cold_file], threads=1)
    assert begun.wait(30)
    stopping = threading.Thread(target=warming.stop)
    stopping.start()
    go.set()
    stopping.join(30)
    assert warming.done
    assert warming.nbytes_read <= 2 * BLOCK_BYTES


def test_goes_on_past_files_that_cannot_be_read(cold_file, tmp_path):
    with prewarm_files([tmp_path / "missing", tmp_path, cold_file]) as warming:
        assert warming.wait(30)
    assert resident(cold_file) == cold_file.stat().st_size


def test_refuses_what_makes_no_sense(tmp_path):
    with pytest.raises(OptionError, match="threads"):
        prewarm_files([], threads=0)
    with pytest.raises(MissingFileError):
        prewarm(tmp_path / "nothing.safetensors")


def test_takes_checkpoints(tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(1000)}, path)
    warming = prewarm(path)
    assert warming.wait(30)
    assert warming.nbytes_read + warming.nbytes_resident == path.stat().st_size


def test_needs_no_torch():
    code = "import sys, wan_loader.warming.prewarm; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_ends_when_it_may_not_go_on(cold_file):
    answers = iter([True, True, False])
    # threads that find the end ask again, and are not told anything else
    warming = module.Prewarm([str(cold_file)], threads=2, budget_nbytes=1 << 40, goes_on=lambda: next(answers, False))
    assert warming.wait(30)
    assert warming.nbytes_read == 2 * BLOCK_BYTES
