"""What a load reports, its fallbacks, and the state in which it leaves the process."""

import errno
import gc
import itertools
import json
import os
import re
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")

from loader_cases import IO, KINDS, MiB, same_dicts, weights, write, write_by_hand  # noqa: E402

import wan_loader  # noqa: E402
from wan_loader.devices.resolve import is_busy  # noqa: E402
from wan_loader.devices.writer import PinError  # noqa: E402
from wan_loader.engine import Need  # noqa: E402
from wan_loader.loading import run as load  # noqa: E402
from wan_loader.plan import plan as course  # noqa: E402
from wan_loader.system import interpreter  # noqa: E402
from wan_loader.system.posix_aio import AioRequest  # noqa: E402

# the report


def test_the_repr_of_a_result_is_one_short_line(tmp_path):
    path = write("safetensors", tmp_path, {"line\nbreak": torch.ones(3), "big": torch.ones(100_000)})
    loaded = wan_loader.load(path)
    checkpoint = wan_loader.open_checkpoint(path)
    assert repr(loaded) == "LoadResult(2 tensors, 400 kB on cpu)"
    assert repr(checkpoint) == f"Checkpoint({str(path)!r}, 'safetensors', 1 file, 2 tensors, 400 kB)"
    assert "\n" not in repr(loaded.report)
    assert repr(loaded.plan) == f"LoadPlan({str(path)!r}, 2 tensors, 400 kB, to cpu, io='auto')"
    assert repr(wan_loader.Recorder()) == "Recorder(0 spans)"
    with wan_loader.prewarm(path) as warming:
        warming.wait()
        assert re.fullmatch(r"Prewarm\(done: .* read, .* were there\)", repr(warming))


@pytest.mark.parametrize("mode", IO)
@pytest.mark.parametrize("kind", KINDS)
def test_report_adds_up(tmp_path, device, kind, mode):
    tensors = weights(5)
    path = write(kind, tmp_path, tensors)
    observer = wan_loader.Recorder()
    loaded = wan_loader.load(path, device=device, io=mode, dtype="bf16", observer=observer)
    report = loaded.report
    nbytes = sum(t.nbytes for t in tensors.values())
    gaps = 64 * len(tensors) * 4  # zip records lie apart, and what is between them is read too
    transports = report.io.nbytes_mapped + report.io.nbytes_direct + report.io.nbytes_buffered
    assert nbytes <= transports <= nbytes + (gaps if "pth" in kind else 0)
    assert report.nbytes_file == nbytes
    assert report.nbytes_device == sum(t.nbytes for t in loaded.tensors.values()) == nbytes // 2
    assert report.n_tensors == len(tensors)
    assert report.device.startswith(device)
    assert report.dtype == "bfloat16"
    assert 0 < report.seconds < 60
    brought = {"read", "cast"} if device == "cpu" else {"register" if mode == "mapped" else "read", "h2d"}
    assert {p.name for p in report.phases} >= {"header", "init", "assign"} | brought
    assert {s.name for s in observer.spans} == {p.name for p in report.phases}
    json.dumps(report.to_json())
    if mode != "auto":
        assert mode in report.io.reason


def test_report_can_be_asked_for_after_the_weights_are_gone(tmp_path, device):
    loaded = wan_loader.load(write("safetensors", tmp_path, weights(5)), device=device, io="buffered")
    gone = [weakref.ref(tensor) for tensor in loaded.tensors.values()]
    loaded.tensors.clear()
    assert not any(tensor() for tensor in gone), "nothing but the dict holds them"
    assert loaded.report.n_tensors == len(gone)
    assert loaded.report is loaded.report


def test_report_of_views(tmp_path):
    tensors = weights(5)
    path = write("safetensors", tmp_path, tensors)
    nbytes = sum(t.nbytes for t in tensors.values())
    report = wan_loader.load(path).report
    assert (report.io.mode, report.io.nbytes_mapped) == ("mapped", nbytes)
    assert report.io.resident_before == nbytes
    assert "page cache" in report.io.reason


def test_host_memory_is_read_into_and_not_copied_to(tmp_path):
    """Small neighbours are read together, through the ring."""
    tensors = {"a": torch.ones(1000), "b": torch.ones(3), "large": torch.randn(3 * MiB), "last": torch.ones(3)}
    loaded = wan_loader.load(write("pth", tmp_path, tensors), observer=wan_loader.Recorder())
    report = loaded.report
    copied = sum(phase.nbytes for phase in report.phases if phase.name == "h2d")
    assert copied == tensors["a"].nbytes + tensors["b"].nbytes
    assert report.io.nbytes_buffered >= sum(t.nbytes for t in tensors.values())
    same_dicts(loaded.tensors, tensors)


def test_what_is_converted_is_not_mapped_on_the_cpu(tmp_path):
    tensors = {"float": torch.randn(1000), "int": torch.arange(1000)}
    path = write("safetensors", tmp_path, tensors)
    io = wan_loader.load(path, io="mapped", dtype="bf16").report.io
    assert (io.nbytes_viewed, io.nbytes_mapped, io.nbytes_buffered) == (8000, 8000, 4000)
    assert "io=mapped was asked for" in io.reason
    assert "is read" in io.reason
    assert "is read" not in wan_loader.load(path, io="mapped").report.io.reason


def test_empty_checkpoint(tmp_path, device):
    path = write("safetensors", tmp_path, {})
    loaded = wan_loader.load(path, device=device)
    assert loaded.tensors == {}
    assert loaded.report.nbytes_file == 0


def test_cold_file_is_read_direct_and_leaves_the_page_cache(tmp_path, device, evict, resident):
    tensors = weights(4, nbytes=10 * MiB)
    path = write("safetensors", tmp_path, tensors)
    evict(path)
    fd = os.open(path, os.O_RDONLY)
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT))
    except OSError:
        pytest.skip("O_DIRECT is refused here")
    finally:
        os.close(fd)
    loaded = wan_loader.load(path, device=device, dtype="bf16")
    nbytes = sum(t.nbytes for t in tensors.values())
    assert loaded.report.io.resident_before < MiB
    assert loaded.report.io.nbytes_direct == nbytes
    assert loaded.report.io.mode == "direct"
    assert resident(path) < MiB  # the header's own pages
    same_dicts(loaded.tensors, {n: t.to(device).to(torch.bfloat16) for n, t in tensors.items()})


def test_half_resident_file_goes_both_ways(tmp_path, device, evict, resident):
    tensors = weights(4, nbytes=12 * MiB)
    path = write("safetensors", tmp_path, tensors)
    half = 32 * MiB  # a border of blocks: a block that is partly resident is read through the page cache
    evict(path, half, path.stat().st_size - half)
    before = resident(path)
    report = (loaded := wan_loader.load(path, device=device, dtype="bf16")).report
    assert report.io.nbytes_direct > 8 * MiB
    assert report.io.nbytes_mapped + report.io.nbytes_buffered > 8 * MiB  # which, depends on the number of processors
    assert half - MiB <= report.io.resident_before <= half + 2 * MiB
    assert "%" in report.io.reason
    assert resident(path) <= before + MiB
    same_dicts(loaded.tensors, {n: t.to(device).to(torch.bfloat16) for n, t in tensors.items()})


def test_of_a_partly_resident_block_only_the_rest_is_read(tmp_path, device, evict):
    """Half of every block is cold: O_DIRECT would read all of it."""
    tensors = weights(4, nbytes=12 * MiB)
    path = write("safetensors", tmp_path, tensors)
    for start in range(0, path.stat().st_size - 8 * MiB, 16 * MiB):
        evict(path, start, 8 * MiB)
    before = device_bytes_read()
    loaded = wan_loader.load(path, device=device, dtype="bf16")
    assert device_bytes_read() - before < 34 * MiB
    same_dicts(loaded.tensors, {n: t.to(device).to(torch.bfloat16) for n, t in tensors.items()})


def device_bytes_read():
    return int(Path("/proc/self/io").read_text().split("read_bytes:")[1].split()[0])


# fallbacks


def test_o_direct_refused_is_reported(tmp_path, device, monkeypatch):
    tensors = weights(3)
    path = write("safetensors", tmp_path, tensors)
    real = os.open

    def refusing(name, flags, *args, **kwargs):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(name, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", refusing)
    loaded = wan_loader.load(path, device=device, io="direct")
    same_dicts(loaded.tensors, tensors)
    assert (loaded.report.io.mode, loaded.report.io.nbytes_direct) == ("buffered", 0)
    assert any("O_DIRECT" in w and str(path) in w for w in loaded.report.warnings)


def test_o_direct_refused_at_the_first_read_is_reported(tmp_path, device, monkeypatch):
    tensors = weights(3)
    path = write("safetensors", tmp_path, tensors)
    start = AioRequest.start

    def refusing(request, fd, *args):
        if os.readlink(f"/proc/self/fd/{fd}") == str(path) and _flags(fd) & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        start(request, fd, *args)

    monkeypatch.setattr(AioRequest, "start", refusing)
    loaded = wan_loader.load(path, device=device, io="direct")
    same_dicts(loaded.tensors, tensors)
    assert loaded.report.io.nbytes_direct == 0
    assert any("O_DIRECT" in w for w in loaded.report.warnings)


def _flags(fd):
    import fcntl

    return fcntl.fcntl(fd, fcntl.F_GETFL)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", IO)
def test_pinning_refused_is_reported(tmp_path, monkeypatch, mode):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    tensors = weights(3)
    path = write("safetensors", tmp_path, tensors)

    def refusing(address, nbytes, context, *, read_only):
        raise PinError("out of luck")

    monkeypatch.setattr("wan_loader.devices.driver.register", refusing)
    loaded = wan_loader.load(path, device="cuda", io=mode)
    same_dicts(loaded.tensors, tensors)
    assert any("out of luck" in w for w in loaded.report.warnings)
    assert loaded.report.memory.pinned_bytes == 0


def test_misaligned_tensors_are_reported_as_copied(tmp_path):
    path = write_by_hand(tmp_path / "x.safetensors", {"x": torch.ones(5)}, header_remainder=3)
    report = wan_loader.load(path, io="mapped").report
    assert any("aligned" in w for w in report.warnings)


# state of the process


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("fails", [True, False])
def test_gc_is_as_it_was(tmp_path, enabled, fails):
    path = write("safetensors", tmp_path, weights(1))
    was = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        if fails:
            with pytest.raises(wan_loader.OptionError):
                wan_loader.load_file(path, threads=1000)
        else:
            wan_loader.load_file(path, io="buffered")
        assert gc.isenabled() is enabled
    finally:
        (gc.enable if was else gc.disable)()


@pytest.fixture
def thawed(monkeypatch):
    """As in a program that has frozen nothing."""
    monkeypatch.setattr(interpreter, "_program_froze", False)
    gc.unfreeze()
    yield
    gc.freeze()


@pytest.mark.usefixtures("thawed")
def test_what_a_load_made_is_not_looked_at_by_the_next_collection(tmp_path):
    path = write("safetensors", tmp_path, {f"w{i}": torch.ones(1) for i in range(2000)})
    started = []
    gc.callbacks.append(lambda phase, info: started.append(info["generation"]) if phase == "start" else None)
    try:
        loaded = wan_loader.load(path, io="buffered")
        assert gc.get_count()[0] < 200
        assert started == []
    finally:
        gc.callbacks.pop()
    assert len(loaded.tensors) == 2000


@pytest.fixture
def portion_sizes(monkeypatch):
    """How many blocks each batch of a load has; one at a time is the rule here."""
    sizes, plain = [], load.transfer_blocks

    def transfer_blocks(*args, **options):
        steps, answer = plain(*args, **options), None
        while True:
            try:
                step = steps.send(answer)
            except StopIteration:
                return
            answer = yield step
            if step is Need.BLOCKS and answer:
                sizes.append(len(answer))

    monkeypatch.setattr(load, "transfer_blocks", transfer_blocks)
    monkeypatch.setattr(course, "block_bytes", lambda *_: 64 << 10)
    monkeypatch.setattr(course, "_BATCH_BLOCKS", 1)
    return sizes


@pytest.mark.parametrize(("busy_from", "expected"), [(0, [11]), (2, [1, 1, 9]), (99, [1] * 11)])
def test_what_is_left_is_allocated_at_once_where_the_stream_is_busy(
    tmp_path, monkeypatch, portion_sizes, busy_from, expected
):
    """With each batch, copies would wait anew for what is queued there."""
    asked = itertools.count()
    monkeypatch.setattr(load, "is_busy", lambda device: next(asked) >= busy_from)
    tensors = weights(7)  # 700 kB
    same_dicts(wan_loader.load_file(write("safetensors", tmp_path, tensors), io="buffered"), tensors)
    assert portion_sizes == expected


def test_a_cold_load_takes_all_its_room_at_once(tmp_path, monkeypatch, portion_sizes):
    """It takes long, and others could take the room meanwhile."""
    monkeypatch.setattr("wan_loader.system.page_cache.Residency.total", lambda *_: 0)
    tensors = weights(7)
    same_dicts(wan_loader.load_file(write("safetensors", tmp_path, tensors), io="buffered"), tensors)
    assert portion_sizes == [11]


def test_a_device_is_busy_while_its_stream_is(monkeypatch):
    done = iter([False, True])
    stream = SimpleNamespace(query=lambda: next(done))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    cuda = torch.device("cuda", 0)
    assert [is_busy(torch.device("cpu")), is_busy(cuda), is_busy(cuda)] == [False, True, False]


def test_what_a_program_froze_stays_frozen():
    """Even if it froze before it imported much."""
    code = """
import gc; gc.freeze(); frozen = gc.get_freeze_count()
from wan_loader.system.interpreter import paused_gc
with paused_gc(): made = [[] for _ in range(1000)]
print(frozen, gc.get_freeze_count())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True)
    before, after = map(int, done.stdout.split())
    assert 0.9 * before < after <= before  # some of it may have gone


@pytest.mark.parametrize("mode", IO)
def test_nothing_stays_open(tmp_path, open_files, mode):
    path = write("safetensors", tmp_path, weights(3))
    wan_loader.load_file(path, io=mode, dtype="bf16")
    threads, before = threading.active_count(), open_files(path)
    wan_loader.load_file(path, io=mode, dtype="bf16")
    assert open_files(path) == before
    assert open_files(path)[1] == 0
    assert threading.active_count() == threads


@pytest.mark.parametrize("mode", ["direct", "buffered"])
def test_the_ring_is_bounded(tmp_path, mode, monkeypatch):
    path = write("safetensors", tmp_path, weights(3))
    monkeypatch.setattr("wan_loader.loading.probe.memory_limit", lambda: 100 * MiB)
    settings = wan_loader.load(path, io=mode, threads=32).report.settings
    assert settings["slot_bytes"] * settings["n_slots"] <= 25 * MiB
    monkeypatch.undo()
    settings = wan_loader.load(path, io=mode, threads=64).report.settings
    assert settings["slot_bytes"] * settings["n_slots"] <= 512 * MiB


def test_unknown_residency_is_said_and_taken_for_cold(tmp_path, device, monkeypatch):
    path = write("safetensors", tmp_path, weights(3))
    path.read_bytes()
    monkeypatch.setattr("wan_loader.system.page_cache.cached_bytes", lambda *_: os.close(-1))
    estimated = wan_loader.load(path, device=device, dtype="bf16").report.io
    assert estimated.resident_before > 0
    assert "estimated" in estimated.reason
    monkeypatch.setattr("wan_loader.system.page_cache._Tries.is_there", lambda *_: os.close(-1))
    monkeypatch.setattr("wan_loader.system.page_cache.mount_of", lambda _: None)
    unknown = wan_loader.load(path, device=device, dtype="bf16").report
    assert unknown.io.resident_before is unknown.to_json()["io"]["resident_before"] is None
    assert "unknown" in unknown.io.reason
    assert unknown.io.mode in ("direct", "buffered")
    assert wan_loader.load(path, device=device, io="buffered").report.io.reason == "io=buffered was asked for"


def test_verification_converts_large_tensors_in_batches(tmp_path, monkeypatch):
    from wan_loader import verify

    tensors = weights(2, nbytes=1000)
    path = write("safetensors", tmp_path, tensors)
    loaded, sizes, same_bits = wan_loader.load_file(path, dtype="bf16"), [], verify.same_bits
    monkeypatch.setattr(verify, "_BATCH", 100)
    monkeypatch.setattr(verify, "same_bits", lambda a, b: sizes.append(a.numel()) or same_bits(a, b))
    assert verify.verify(path, loaded) == 2
    assert max(sizes) == 100
    assert sum(sizes) == sum(t.numel() for t in tensors.values())
    loaded["layer.1.weight"].view(torch.uint8)[-1] ^= 1
    with pytest.raises(wan_loader.CheckpointError, match=r"layer\.1\.weight"):
        verify.verify(path, loaded)
