"""Conversions in host memory: bit for bit what `.to(dtype)` gives, whatever the file looks like, whoever converts."""

import json
import threading

import pytest
import torch
from pairwise import pairwise
from programs import TORCH, run
from safetensors.torch import save_file

import wan_loader
from wan_loader.devices import cpu
from wan_loader.devices.cpu import CpuWriter
from wan_loader.devices.torch_threads import divide_nothing
from wan_loader.devices.writer import Destination, HostBlock
from wan_loader.engine import convert
from wan_loader.plan import engine_settings
from wan_loader.plan.blocks import Block, Segment, Transport

DTYPES = ["float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"]
TARGETS = ["float32", "bfloat16", "float16"]


def same(a, b):
    """Bit for bit; but of what is not a number, torch's own bits depend on its place in the tensor."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(raw(a), raw(b))


def raw(tensor):
    if tensor.is_floating_point():
        tensor = torch.where(tensor.isnan(), torch.zeros((), dtype=tensor.dtype), tensor)
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def random(count, dtype, seed=0):
    """Random bits: NaN, infinities and subnormal numbers as well."""
    bits = torch.randint(0, 256, (count * dtype.itemsize,), dtype=torch.uint8, generator=torch.manual_seed(seed))
    return bits.view(dtype)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Tensors of some pages are several pieces, for several threads."""
    monkeypatch.setattr(engine_settings, "_PIECE_BYTES", 8192)
    monkeypatch.setattr(engine_settings, "_PIECE_BYTES_OF_MANY", 8192)


@pytest.fixture
def converted(monkeypatch):
    """Loads that were carried out by threads that convert."""
    found, plain = [], convert._Conversion._start
    monkeypatch.setattr(convert._Conversion, "_start", lambda self, slot: found.append(slot) or plain(self, slot))
    return found


@pytest.mark.parametrize(("source", "target", "threads"), pairwise(DTYPES, TARGETS, [None, 1, 7]))
def test_every_dtype(tmp_path, converted, source, target, threads):
    dtype = getattr(torch, source)
    sizes = {"none": 0, "one": 1, "odd": 4097, "large": 300_001, "more": 77}
    state = {name: random(count, dtype, count) for name, count in sizes.items()}
    save_file(state, tmp_path / "f.safetensors")
    # numbers of eight bits stand for others, by a scale; asked for without one they are only converted
    loaded = wan_loader.load_file(tmp_path / "f.safetensors", dtype=target, threads=threads)
    assert loaded.keys() == state.keys()
    for name, tensor in state.items():
        assert same(loaded[name], tensor.to(getattr(torch, target))), name
        assert same(loaded[name].isnan(), tensor.to(getattr(torch, target)).isnan()), name
    assert bool(converted) == (source != target)


@pytest.mark.parametrize("shift", range(1, 9))
def test_misaligned_data(tmp_path, converted, shift):
    """A header of any length is allowed; elements then begin anywhere."""
    state = {"a": random(5001, torch.float32, shift), "b": random(9999, torch.float64, shift)}
    path = tmp_path / "f.safetensors"
    save_file(state, path)
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    path.write_bytes((length + shift).to_bytes(8, "little") + data[8 : 8 + length] + b" " * shift + data[8 + length :])
    loaded = wan_loader.load_file(path, dtype="bfloat16")
    assert converted
    for name, tensor in state.items():
        assert same(loaded[name], tensor.to(torch.bfloat16))


def test_tied_storages_stay_tied_and_what_needs_no_conversion_stays(tmp_path, converted):
    base = random(200_000, torch.float32)
    state = {
        "tied": base,
        "again": base,
        "part": base[100:5000:7],
        "counts": torch.arange(300_000),
        "half": random(3, torch.bfloat16),
    }
    torch.save(state, tmp_path / "f.pth")
    result = wan_loader.load(tmp_path / "f.pth", dtype="bfloat16")
    loaded = result.tensors
    assert converted
    for name, tensor in state.items():
        assert same(loaded[name], tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor), name
    assert loaded["tied"].data_ptr() == loaded["again"].data_ptr()
    assert loaded["part"].untyped_storage().data_ptr() == loaded["tied"].untyped_storage().data_ptr()
    assert all(same(loaded[name].isnan(), tensor.isnan()) for name, tensor in state.items())
    assert result.report.settings["nbytes_straight"] > 2_000_000, "what needs no conversion is read to its place"


def test_several_files_and_more_than_one_batch(tmp_path, converted, monkeypatch):
    monkeypatch.setattr("wan_loader.plan.plan.MIN_BLOCK_BYTES", 1 << 16)
    states = [{f"w{i}.{k}": random(40_000 + k, torch.float32, k) for k in range(8)} for i in range(3)]
    for i, state in enumerate(states):
        save_file(state, tmp_path / f"{i}.safetensors")
    loaded = wan_loader.load_file([tmp_path / f"{i}.safetensors" for i in range(3)], dtype="float16")
    assert converted
    for state in states:
        for name, tensor in state.items():
            assert same(loaded[name], tensor.to(torch.float16))


def test_a_mode_of_the_caller_does_not_matter(tmp_path, converted):
    """Tensors that are made in inference mode may be written by no thread that is not in it."""
    state = {"a": random(50_000, torch.float32)}
    save_file(state, tmp_path / "f.safetensors")
    with torch.inference_mode():
        loaded = wan_loader.load_file(tmp_path / "f.safetensors", dtype="bfloat16")
    assert converted
    assert same(loaded["a"], state["a"].to(torch.bfloat16))


def test_without_a_dtype_nothing_is_converted_and_a_file_stays_where_it_is(tmp_path, converted):
    state = {"a": random(50_000, torch.float32)}
    save_file(state, tmp_path / "f.safetensors")
    result = wan_loader.load(tmp_path / "f.safetensors")
    assert not converted
    assert result.plan.layout.nbytes_viewed == state["a"].nbytes
    assert same(result.tensors["a"], state["a"])


_FORK = """
import os, signal, sys, torch, wan_loader
from safetensors.torch import load_file
from wan_loader.plan import engine_settings

torch.set_num_threads(2)
engine_settings._PIECE_BYTES = engine_settings._PIECE_BYTES_OF_MANY = 1 << 20
torch.ones(1 << 20).to(torch.bfloat16)  # starts torch's own threads, which stay with the parent
wan_loader.load_file(sys.argv[1], dtype="bfloat16")
if not (pid := os.fork()):
    signal.alarm(20)
    # with a reader of its own for each thread, and through the read queue
    loads = [wan_loader.load_file(sys.argv[1], dtype="bfloat16", io=io) for io in ("auto", "direct")]
    expected = {name: tensor for name, tensor in load_file(sys.argv[1]).items()}
    # in pieces that torch does not divide: its threads are not here
    same = all(
        torch.equal(part.bfloat16().view(torch.int16), other.view(torch.int16))
        for loaded in loads
        for name in expected
        for part, other in zip(expected[name].split(1000), loaded[name].split(1000))
    )
    os._exit(0 if same else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


def test_in_a_forked_process(tmp_path):
    save_file({"a": torch.randn(600_000), "b": torch.randn(70_001)}, tmp_path / "f.safetensors")
    done = run("-c", _FORK, tmp_path / "f.safetensors")
    assert done.returncode == 0, done.stderr


def test_a_thread_of_ours_divides_nothing_and_others_do(monkeypatch):
    before, found = torch.get_num_threads(), {}
    torch.set_num_threads(2)
    try:
        for name, action in (("ours", divide_nothing), ("other", lambda: None)):

            def ask(name=name, action=action):
                action()
                found[name] = torch.get_num_threads()

            thread = threading.Thread(target=ask)
            thread.start()
            thread.join()
        assert found == {"ours": 1, "other": 2}
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_what_lies_beside_a_segment_is_left_alone():
    """Also where huge pages begin inside of it, which are touched first."""
    count = 3 << 20
    whole = torch.full((count,), 7.0, dtype=torch.bfloat16)
    source = torch.ones(2 << 20)
    writer = CpuWriter()
    writer.bind([Destination(whole, whole.data_ptr(), torch.float32)])
    block = Block(Transport.BUFFERED, 0, 0, source.nbytes, (Segment(0, 4000, 0, source.nbytes, 4),))
    writer.stream().submit([HostBlock(source.data_ptr(), block)])
    assert whole[:1000].eq(7).all()
    assert whole[1000 : 1000 + source.numel()].eq(1).all()
    assert whole[1000 + source.numel() :].eq(7).all()


def test_places_are_touched_before_they_are_read_to(monkeypatch):
    touched = []
    monkeypatch.setattr(cpu.FreshMemory, "touch_huge", lambda self, *range_: touched.append(range_))
    whole = torch.zeros(100, dtype=torch.uint8)
    writer = CpuWriter()
    writer.bind([Destination(whole, whole.data_ptr())])
    assert writer.place(Segment(0, 10, 0, 50)) == whole.data_ptr() + 10
    assert touched == [(whole.data_ptr() + 10, 50)]


def test_the_benchmark(tmp_path, benchmark_main):
    """It compares bit for bit, and keeps every sample."""
    words = [tmp_path, "--gb", "0.001", "--pairs", "1", "--case", "fp32 to bf16", "--output", tmp_path / "out.json"]
    benchmark_main("cpu_casts", *words, modules=TORCH)
    samples = json.loads((tmp_path / "out.json").read_text())["ways"]["fp32 to bf16"]
    assert [len(samples[way]) for way in ("theirs", "ours")] == [1, 1]
    assert samples["ours"][0]["equal"] is True
    assert samples["ours"][0].keys() >= {"seconds", "cpu_seconds", "peak_rss_bytes"}
