"""Eviction that proves itself: nothing stays, or what stays is said with its reason."""

import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest

from wan_loader.warming.evict import evict, resident_bytes

NBYTES = 3 << 20


@pytest.fixture
def path(tmp_path, evict):
    """A file whose pages are all resident; the fixture `evict` skips where the file system keeps pages."""
    path = tmp_path / "weights.safetensors"
    path.write_bytes(os.urandom(NBYTES))
    evict(path)
    path.read_bytes()
    return path


def test_nothing_stays(path, resident):
    (result,) = evict([path])
    assert (result.nbytes, result.resident_before, result.resident_after) == (NBYTES, NBYTES, 0)
    assert result.reason == ""
    assert resident(path) == 0


def test_unwritten_pages_are_written_first(path, resident):
    content = os.urandom(NBYTES)
    path.write_bytes(content)
    (result,) = evict([path])
    assert result.resident_after == 0
    assert path.read_bytes() == content


def test_pages_that_a_process_has_mapped_stay_and_the_process_is_named(path):
    code = (
        "import mmap, sys; f = open(sys.argv[1], 'rb'); m = mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ)\n"
        "sum(m[::4096]); print(flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        other.stdout.readline()
        (result,) = evict([path])
        other.communicate("\n")
    assert result.resident_after == NBYTES
    assert f"({other.pid})" in result.reason
    assert evict([path])[0].resident_after == 0


def test_tmpfs_keeps_its_pages_and_is_named():
    shm = Path("/dev/shm")
    if not shm.is_dir() or not os.access(shm, os.W_OK):
        pytest.skip("no tmpfs at /dev/shm")
    path = shm / f"wan-loader-test-{os.getpid()}"
    path.write_bytes(bytes(100_000))
    try:
        (result,) = evict([path])
    finally:
        path.unlink()
    assert result.resident_after == 100_000
    assert "tmpfs" in result.reason


def test_a_file_that_is_not_there_is_a_result(path, tmp_path):
    missing, found = evict([tmp_path / "missing", path])
    assert missing.resident_after is None
    assert "No such file" in missing.reason
    assert found.resident_after == 0


def test_resident_bytes_counts_through_the_files(path, tmp_path):
    other = tmp_path / "other"
    other.write_bytes(bytes(mmap.PAGESIZE))
    assert resident_bytes([path, other]) == NBYTES + mmap.PAGESIZE
    assert resident_bytes([path, other], first_nbytes=NBYTES + 10) == NBYTES + 10
    evict([path])
    assert resident_bytes([tmp_path / "missing", path, other]) == mmap.PAGESIZE
