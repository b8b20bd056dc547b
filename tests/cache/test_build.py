"""Builds in the background: one gives way, is waited for, can be stopped, and fails alone."""

import errno
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

import safetensors.torch  # noqa: E402
from programs import run  # noqa: E402

import wan_loader  # noqa: E402
from wan_loader.cache import build as build_module  # noqa: E402
from wan_loader.cache.build import wait_for_builds  # noqa: E402
from wan_loader.cache.cached_load import read_segments  # noqa: E402
from wan_loader.cache.checksums import check_entry  # noqa: E402
from wan_loader.cache.manifest import BLOCK_BYTES, digest  # noqa: E402
from wan_loader.cache.outline import outline_checkpoint  # noqa: E402
from wan_loader.cache.store import Store  # noqa: E402
from wan_loader.cache.use import begin_build, build_entry  # noqa: E402
from wan_loader.engine.activity import loading  # noqa: E402
from wan_loader.formats import open_checkpoint  # noqa: E402
from wan_loader.plan.dtype_policy import DtypePolicy  # noqa: E402

MiB = 1 << 20


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def path(tmp_path):
    torch.manual_seed(7)
    path = tmp_path / "m.safetensors"
    safetensors.torch.save_file({"big": torch.randn(2 * MiB), "odd": torch.randn(1023), "n": torch.arange(3)}, path)
    return path


def outline(path, dtype="bfloat16"):
    checkpoint = open_checkpoint(path)
    return outline_checkpoint(checkpoint, DtypePolicy(dtype))


def rooms(cache):
    return {room: len(list((cache / room).iterdir())) for room in ("entries", "building", "damaged", "trash")}


NOTHING = {"entries": 0, "building": 0, "damaged": 0, "trash": 0}
ONE = {**NOTHING, "entries": 1}


def check_hit(path, cache):
    loaded = wan_loader.load(path, dtype="bf16", cache=True, cache_dir=cache, verify=True)
    assert loaded.report.cache.state == "hit"
    for name, tensor in safetensors.torch.load_file(path).items():
        expected = tensor.bfloat16() if tensor.is_floating_point() else tensor
        assert torch.equal(loaded.tensors[name], expected)


def test_from_the_source_alone(path, cache):
    build = build_entry(Store(cache), outline(path), read_segments, digest_contents=True)
    assert build.wait(60)
    assert (build.failure, build.nbytes_written) == (None, build.nbytes)
    assert build.nbytes_from_source == build.nbytes
    manifest = Store(cache).find(build.path.name).manifest
    assert check_entry(build.path, manifest) == []
    assert len(manifest.contents) == 1
    assert manifest.label == str(path)
    check_hit(path, cache)
    assert build_entry(Store(cache), outline(path), read_segments) == build.path, "it is there"


def test_checksums_are_those_of_the_file(path, cache):
    """By another way: from the bytes on the disk."""
    torch.manual_seed(8)
    safetensors.torch.save_file({"a": torch.randn(9 * MiB), "b": torch.randn(3)}, path)
    build = build_entry(Store(cache), outline(path), read_segments)
    build.wait()
    (file,) = Store(cache).find(build.path.name).manifest.files
    data = (build.path / file.path).read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    assert (file.nbytes, file.header_nbytes) == (len(data), header)
    borders = [0, header, *range(BLOCK_BYTES, len(data), BLOCK_BYTES), len(data)]
    assert list(file.blocks) == [digest(data[a:b]) for a, b in pairwise(borders)]


def test_from_memory_where_it_can(path, cache):
    with loading():
        loaded = wan_loader.load(path, dtype="bf16", cache=True, cache_dir=cache)
    loaded.build.wait()
    assert loaded.build.nbytes_from_source == 1023 * 2 + 3 * 8
    check_hit(path, cache)


def test_it_gives_way_to_loads(path, cache):
    with loading():
        loaded = wan_loader.load(path, dtype="bf16", cache=True, cache_dir=cache)
        for _ in range(3):
            assert not loaded.build.wait(0.1)
            wan_loader.load_file(path, dtype="fp16")
        assert loaded.build.nbytes_written == 0
        with loading():
            pass
        assert not loaded.build.wait(0.1)
    assert loaded.build.wait(30)
    check_hit(path, cache)


def test_stopped(path, cache, caplog):
    with loading():
        build = wan_loader.load(path, dtype="bf16", cache=True, cache_dir=cache).build
        start = time.monotonic()
        build.stop()
        assert time.monotonic() - start < 1
    assert "was stopped" in build.failure
    assert build.path is None
    assert rooms(cache) == NOTHING
    assert len(caplog.records) == 1
    build.stop()


def test_stopped_after_ctrl_c_ended_the_waiting(path, cache, monkeypatch):
    """What was interrupted while it waited for a build still waits for the end of it."""
    write = build_module._Writer._write_all

    def slow(self, part):
        time.sleep(0.5)
        write(self, part)

    monkeypatch.setattr(build_module._Writer, "_write_all", slow)
    build = wan_loader.load(path, dtype="bf16", cache=True, cache_dir=cache).build
    interrupt = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT))
    interrupt.start()
    with pytest.raises(KeyboardInterrupt):
        build.wait(20)
    interrupt.join()
    build.stop()
    assert rooms(cache) == NOTHING


def test_two_at_once_share_the_budget(path, cache):
    with loading():  # neither can write yet
        first = build_entry(Store(cache), outline(path), read_segments, max_size=6_000_000)
        with pytest.raises(wan_loader.CacheError, match="being written"):
            build_entry(Store(cache), outline(path, "float16"), read_segments, max_size=6_000_000)
    assert first.wait(30)
    assert first.failure is None
    assert rooms(cache) == ONE
    check_hit(path, cache)


def test_waiting_for_all(path, cache):
    builds = [wan_loader.load(path, dtype=d, cache=True, cache_dir=cache).build for d in ("bf16", "fp16", "fp64")]
    wait_for_builds()
    assert all(b.path is not None for b in builds)
    assert not [t for t in threading.enumerate() if t.name == "cache"]


def test_no_descriptor_is_left_open(path, cache, open_files):
    wan_loader.load(path, dtype="bf16", cache=True, cache_dir=cache).build.wait()
    before = open_files(cache)
    for dtype in ("fp16", "fp64"):
        wan_loader.load(path, dtype=dtype, cache=True, cache_dir=cache).build.wait()
    assert open_files(cache) == before


# at exit

AT_EXIT = """
import sys, wan_loader
loaded = wan_loader.load(sys.argv[1], dtype="bf16", cache=True, cache_dir=sys.argv[2])
print("loaded", flush=True)
if len(sys.argv) > 3:
    import signal
    signal.raise_signal(signal.SIGINT)
"""


def test_the_interpreter_waits_for_it(path, cache):
    done = subprocess.run([sys.executable, "-c", AT_EXIT, path, cache], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "loaded\n", "")
    assert rooms(cache) == ONE
    check_hit(path, cache)


def test_the_interpreter_waits_after_an_exception_too(path, cache):
    done = subprocess.run(
        [sys.executable, "-c", AT_EXIT, path, cache, "x"], capture_output=True, text=True, check=False
    )
    assert "KeyboardInterrupt" in done.stderr
    assert rooms(cache) == ONE
    check_hit(path, cache)


# disk full


def check_failed_alone(loaded, path, cache, caplog, *words):
    expected = safetensors.torch.load_file(path)
    for name, tensor in loaded.tensors.items():
        assert torch.equal(tensor, expected[name].to(tensor.dtype))
    assert loaded.build.wait(30)
    assert loaded.build.path is None
    for word in words:
        assert word in loaded.build.failure
    assert rooms(cache) == NOTHING
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("wan_loader", logging.WARNING)
    assert loaded.build.failure in record.getMessage()


@pytest.mark.parametrize("call", range(1, 9))
@pytest.mark.parametrize("function", ["write", "fsync", "open", "mkdir"])
def test_no_space_at_any_moment(path, cache, caplog, monkeypatch, function, call):
    """Whichever call it is that finds the disk full."""
    left = [call]

    def full(first):
        ours = function in ("write", "fsync") or str(first).startswith(str(cache))
        if ours and threading.current_thread().name == "cache":
            left[0] -= 1
            if left[0] == 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def failing(original):
        def wrapped(*arguments, **options):
            full(arguments[0])
            return original(*arguments, **options)

        return wrapped

    if function == "write":
        monkeypatch.setattr(build_module._Writer, "_write_all", failing(build_module._Writer._write_all))
    else:
        monkeypatch.setattr(os, function, failing(getattr(os, function)))
    loaded = wan_loader.load(path, dtype="bf16", cache=True, cache_dir=cache)
    loaded.build.wait()
    monkeypatch.undo()
    if left[0] > 0:  # it makes fewer calls
        assert loaded.build.failure is None
        check_hit(path, cache)
    elif loaded.build.path is None:  # it may come after the entry is complete
        check_failed_alone(loaded, path, cache, caplog, "disk is full")
    wan_loader.load(path, dtype="bf16", cache=True, cache_dir=cache, verify=True)
    wait_for_builds()
    check_hit(path, cache)


@pytest.fixture
def small_disk(tmp_path):
    mount = tmp_path / "disk"
    mount.mkdir(mode=0o700)
    words = ["mount", "-t", "tmpfs", "-o", "size=3m,mode=700", "none", str(mount)]
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if done.returncode != 0:
        pytest.skip(f"a file system cannot be mounted here: {done.stderr.strip()}")
    yield mount
    subprocess.run(["umount", "-l", str(mount)], check=True)


def test_too_small_a_disk(path, small_disk, caplog):
    """It is seen before anything is written: not even begun."""
    loaded = wan_loader.load(path, dtype="bf16", cache=True, cache_dir=small_disk)
    assert loaded.build is None
    assert any("more than" in w and "--cache-dir" in w for w in loaded.report.warnings)
    assert rooms(small_disk) == NOTHING


def test_a_disk_that_fills_up_meanwhile(path, small_disk, caplog, monkeypatch):
    """Somebody else writes to it after the room was checked."""
    monkeypatch.setattr(Store, "_make_room", lambda *_: None)
    loaded = wan_loader.load(path, dtype="bf16", cache=True, cache_dir=small_disk)
    check_failed_alone(loaded, path, small_disk, caplog, "disk is full", "4.2 MB")


def test_a_read_only_disk(path, small_disk):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    loaded = wan_loader.load(path, dtype="bf16", cache=True, cache_dir=small_disk)
    assert loaded.build is None
    assert any("Read-only file system" in w for w in loaded.report.warnings)


LIMITED = """
import logging, resource, signal, sys, wan_loader
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (3 << 20, 3 << 20))
loaded = wan_loader.load(sys.argv[1], dtype="bf16", cache=True, cache_dir=sys.argv[2])
loaded.build.wait()
print(len(loaded.tensors), loaded.build.failure)
"""


def test_a_limit_on_the_size_of_files(path, cache):
    done = run("-c", LIMITED, path, cache)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("3 ")
    assert "File too large" in done.stdout
    assert done.stderr.count("not cached") == 1
    assert rooms(cache) == NOTHING


# the source


def test_a_source_that_vanishes(path, cache, caplog):
    with loading():
        loaded = wan_loader.load(path, dtype="bf16", cache=True, cache_dir=cache)
        path.unlink()
    loaded.build.wait()
    assert str(path) in loaded.build.failure
    assert rooms(cache) == NOTHING
    assert len(caplog.records) == 1


def test_a_source_that_is_touched_at_the_last_moment(path, cache, monkeypatch):
    """After the last byte was read, before the entry is published."""
    write_tensors = build_module.Build._write_tensors

    def write_and_touch(self, file):
        written = write_tensors(self, file)
        os.utime(path)
        return written

    monkeypatch.setattr(build_module.Build, "_write_tensors", write_and_touch)
    loaded = wan_loader.load(path, dtype="bf16", cache=True, cache_dir=cache)
    loaded.build.wait()
    assert "was changed while its cache entry was being written" in loaded.build.failure
    assert rooms(cache) == NOTHING


def test_a_source_of_this_moment_is_not_begun_at_once(path, cache):
    """Where file times are coarse, it could be changed again within the same tick, after it was looked at."""
    store, made = Store(cache), outline(path)
    os.utime(path)
    building = begin_build(store, made, made.sources)
    assert time.time() - path.stat().st_ctime >= 0.02
    building.abandon()


def test_a_source_that_cannot_be_cached(tmp_path, cache):
    base = torch.randn(9)
    torch.save({"a": base, "b": base[2:]}, tmp_path / "m.pth")
    with pytest.raises(wan_loader.CacheError, match="cannot be cached"):
        build_entry(Store(cache), outline(tmp_path / "m.pth"), read_segments)
    assert rooms(cache) == NOTHING


def test_a_damaged_entry_is_replaced(path, cache):
    first = build_entry(Store(cache), outline(path), read_segments)
    first.wait()
    (Path(first.path) / "manifest.json").unlink()
    second = build_entry(Store(cache), outline(path), read_segments)
    second.wait()
    assert second.path == first.path
    check_hit(path, cache)
