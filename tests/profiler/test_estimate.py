"""Sizes, the simulated pipeline, ceilings and diagnosis."""

import json
import mmap
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wan_loader.cli.estimate import _measured
from wan_loader.errors import OptionError
from wan_loader.formats.inventory import checkpoints_in
from wan_loader.profiler.analysis.simulate import (
    STORAGES,
    Hardware,
    SimulatedBlock,
    blocks_of,
    plan_elsewhere,
    simulate,
    start_range,
)
from wan_loader.profiler.probe import measure
from wan_loader.profiler.probe.ceilings import find_ceilings, known_ceilings
from wan_loader.profiler.probe.machine_findings import diagnose
from wan_loader.profiler.probe.system_facts import nvidia_gpus
from wan_loader.sizes import parse_rate, parse_size


@pytest.mark.parametrize(
    ("text", "nbytes"), [("3GB", 3 * 10**9), ("512MiB", 512 << 20), ("1.5k", 1500), ("7", 7), ("2 TB", 2 * 10**12)]
)
def test_sizes(text, nbytes):
    assert parse_size(text) == nbytes


@pytest.mark.parametrize(
    ("text", "rate"), [("150MB/s", 150e6), ("3GB", 3e9), ("10Gbit/s", 1.25e9), ("10Gbps", 10e9 / 8)]
)
def test_rates(text, rate):
    if text == "10Gbps":
        text = "10Gbitps"
    assert parse_rate(text) == rate


@pytest.mark.parametrize("text", ["", "fast", "-3GB", "0", "3XB", "1e9", "GB/s"])
def test_nonsense(text):
    for parse in (parse_size, parse_rate):
        with pytest.raises(OptionError):
            parse(text)


def hardware(**changes):
    return Hardware(**{"disk": 1e9, "copy": 10e9, "cast": 1e12, "cuda": True, **changes})


def test_the_slowest_resource_sets_the_pace():
    blocks = [SimulatedBlock(8 << 20, cast=False)] * 1000
    nbytes = sum(p.nbytes for p in blocks)
    by_disk = simulate(blocks, hardware())
    assert by_disk.seconds == pytest.approx(nbytes / 1e9, rel=0.01)
    assert by_disk.bottleneck == "disk"
    by_copy = simulate(blocks, hardware(disk=100e9))
    assert by_copy.seconds == pytest.approx(nbytes / 10e9, rel=0.02)
    assert by_copy.bottleneck == "copy"


def test_one_slot_makes_stages_take_turns():
    blocks = [SimulatedBlock(8 << 20, cast=False)] * 100
    one = simulate(blocks, hardware(copy=1e9, slots=1))
    assert one.seconds == pytest.approx(one.read_s + one.copy_s)


def test_conversion_on_the_cpu_is_the_copy():
    blocks = [SimulatedBlock(8 << 20, cast=True)] * 100
    found = simulate(blocks, hardware(cuda=False, cast=2e9, disk=100e9))
    assert found.copy_s == 0
    assert found.bottleneck == "cast"


def test_on_the_cpu_what_comes_out_of_a_conversion_counts_too(tmp_path):
    import torch
    from safetensors.torch import save_file

    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(1 << 22, dtype=torch.bfloat16)}, path)
    (found,) = checkpoints_in(path)
    up, down = (blocks_of(plan_elsewhere(found, dtype, cuda=False)) for dtype in ("float32", "float8_e4m3fn"))
    assert sum(b.made for b in up) == 2 * sum(b.nbytes for b in up)
    assert sum(b.made for b in down) == sum(b.nbytes for b in down) / 2
    seconds = simulate(up, hardware(cuda=False, cast=3e9, disk=1e15)).seconds
    assert seconds == pytest.approx(3 * (8 << 20) / 3e9, rel=0.01)
    assert simulate(up, hardware(cast=1e9, copy=1e15, disk=1e15)).cast_s == pytest.approx((8 << 20) / 1e9)


def test_a_start_lies_between_the_samples_and_further_apart_in_a_crowd():
    assert start_range(2.0, 3.0, 5.0, 1.0) == (2.0, 5.0)
    assert start_range(2.0, 3.0, 5.0, 1.5) == (pytest.approx(4 / 3), 5.0)
    assert start_range(2.0, 3.0, 5.0, 8.0) == (1.0, 24.0)


def test_fixed_costs_come_first():
    assert simulate([], hardware(fixed_s=3)).seconds == 3


@given(st.lists(st.integers(1, 9 << 20), max_size=50), st.integers(1, 5), st.booleans())
def test_bounds(sizes, slots, cuda):
    blocks = [SimulatedBlock(n, cast=n % 2 == 0) for n in sizes]
    found = simulate(blocks, hardware(slots=slots, cuda=cuda, copy=2e9, cast=3e9))
    work = (found.read_s, found.copy_s, found.cast_s)
    assert max(work) - 1e-9 <= found.seconds <= sum(work) + 1e-9


def test_parts_hold_every_byte_once(checkpoint):
    (found,) = checkpoints_in(checkpoint)
    for cuda in (True, False):
        plain, cast = (blocks_of(plan_elsewhere(found, dtype, cuda=cuda)) for dtype in (None, "bfloat16"))
        assert sum(p.nbytes for p in plain) == sum(p.nbytes for p in cast) == found.nbytes
        assert not any(p.cast for p in plain)
        assert all(p.cast for p in cast)
    assert STORAGES["hdd"] < STORAGES["nvme-gen4"]


def test_ceilings_are_cached_and_measured_again(tmp_path, checkpoint, monkeypatch):
    calls = []
    for name in ("measure_page_cache", "measure_copy", "measure_cast", "measure_disk"):
        monkeypatch.setattr(measure, name, lambda *_, name=name: calls.append(name) or 2.5)
    monkeypatch.setattr(measure, "measure_fill", lambda: calls.append("fill") or {"fill_gbps": 1, "convert_gbps": 2})
    file = tmp_path / "deep" / "ceilings.json"
    first = find_ceilings([str(checkpoint)], quick=True, file=file)
    assert len(calls) == 5 * 3
    assert find_ceilings([str(checkpoint)], quick=True, file=file).values == first.values
    assert len(calls) == 5 * 3
    assert known_ceilings([str(checkpoint)], file=file).values == first.values
    find_ceilings([str(checkpoint)], quick=True, refresh=True, file=file)
    assert len(calls) == 5 * 6


def test_a_ceiling_is_the_best_of_some_samples_which_are_kept(tmp_path, checkpoint, monkeypatch):
    """The best of all times that it was measured, and not more of them than may tell something of today."""
    values = iter(range(1, 1000))
    for name in ("measure_page_cache", "measure_cast", "measure_disk"):
        monkeypatch.setattr(measure, name, lambda *_: 2.5)
    monkeypatch.setattr(measure, "measure_copy", lambda: float(next(values)))
    monkeypatch.setattr(measure, "measure_fill", lambda: {"fill_gbps": 1.0, "convert_gbps": 2.0})
    monkeypatch.setattr(measure, "measure_start", lambda: {"import_torch_s": float(next(values)), "start_s": 9.0})
    file = tmp_path / "ceilings.json"
    first = find_ceilings([str(checkpoint)], file=file)
    assert (first.values["copy_gbps"], first.samples["copy_gbps"]) == (3.0, (1.0, 2.0, 3.0))
    assert (first.values["import_torch_s"], first.samples["import_torch_s"]) == (4.0, (4.0, 5.0, 6.0))
    assert known_ceilings([str(checkpoint)], file=file).samples == first.samples
    for _ in range(3):
        again = find_ceilings([str(checkpoint)], refresh=True, file=file)
    assert len(again.samples["copy_gbps"]) == 9
    assert (again.values["copy_gbps"], again.values["import_torch_s"]) == (21.0, 10.0)
    monkeypatch.setattr(measure, "measure_copy", lambda: 1.0)
    assert find_ceilings([str(checkpoint)], refresh=True, file=file).values["copy_gbps"] == 21.0, "it was had once"


def test_what_takes_long_is_measured_once(tmp_path, monkeypatch):
    ticks = iter(range(0, 10**6, 3))
    monkeypatch.setattr("wan_loader.profiler.probe.ceilings.time.monotonic", lambda: next(ticks))
    for name in ("measure_page_cache", "measure_copy", "measure_cast"):
        monkeypatch.setattr(measure, name, lambda *_: 1.0)
    monkeypatch.setattr(measure, "measure_fill", lambda: {"fill_gbps": 1.0, "convert_gbps": 2.0})
    found = find_ceilings([], quick=True, file=tmp_path / "c.json")
    assert {len(many) for many in found.samples.values()} == {1}


def test_loads_into_host_memory_are_measured():
    found = measure.measure_fill()
    assert found["fill_gbps"] > 0
    assert found["convert_gbps"] > 0


def test_a_start_is_measured_from_its_beginning_to_the_end_of_a_load():
    found = measure.measure_start()
    assert found["start_s"] > found["import_torch_s"] > 0


def test_measuring_takes_no_memory_that_is_not_there(checkpoint, monkeypatch):
    monkeypatch.setattr(measure, "available_memory", lambda: 8 << 20)
    checkpoint.read_bytes()
    paths = [str(checkpoint)]
    for name, arguments in {"copy": (), "cast": (), "page_cache": (paths,), "start": (), "fill": ()}.items():
        with pytest.raises(measure.UnmeasuredError, match="too little memory"):
            getattr(measure, f"measure_{name}")(*arguments)


def test_a_disk_is_not_measured_where_it_is_unknown_what_is_cached(checkpoint, monkeypatch):
    monkeypatch.setattr("wan_loader.system.page_cache.cached_bytes", lambda *_: os.close(-1))
    monkeypatch.setattr("wan_loader.system.page_cache._Tries.is_there", lambda *_: os.close(-1))
    with pytest.raises(measure.UnmeasuredError, match="unknown"):
        measure.measure_disk([str(checkpoint)])


@pytest.mark.parametrize("content", ["", "[]", '{"machine cpu": 7}', '{"x": {"disk_gbps": "fast"}}', "{"])
def test_a_damaged_cache_is_measured_anew(tmp_path, content):
    file = tmp_path / "ceilings.json"
    file.write_text(content)
    assert known_ceilings([], file=file).values == {}


def test_what_cannot_be_measured_is_said(tmp_path, monkeypatch):
    def refuse(*_):
        raise measure.UnmeasuredError("no disk today")

    monkeypatch.setattr(measure, "measure_disk", refuse)
    for name in ("measure_page_cache", "measure_copy", "measure_cast"):
        monkeypatch.setattr(measure, name, lambda *_: 1.0)
    monkeypatch.setattr(measure, "measure_fill", lambda: {"fill_gbps": 1.0, "convert_gbps": 2.0})
    monkeypatch.setattr("wan_loader.profiler.probe.ceilings.busy_note", lambda: "it was busy")
    found = find_ceilings(["/nonexistent"], quick=True, file=tmp_path / "c.json")
    assert found.get("disk_gbps") is None
    assert found.notes == ("no disk today", "it was busy")
    again = find_ceilings(["/nonexistent"], quick=True, file=tmp_path / "c.json")
    assert again.notes == ("no disk today",), "what was measured before is not doubted now"


def test_the_disk_is_measured_where_it_is_cold_and_nothing_is_evicted(checkpoint, evict):
    from wan_loader.system.posix import cached_bytes

    checkpoint.read_bytes()
    with pytest.raises(measure.UnmeasuredError, match="page cache"):
        measure.measure_disk([str(checkpoint)])
    evict(checkpoint, 0, 64 << 20)
    with open(checkpoint, "rb") as f:
        before = cached_bytes(f.fileno(), 0, checkpoint.stat().st_size)
        try:
            assert measure.measure_disk([str(checkpoint)], seconds=0.3) > 0
        except measure.UnmeasuredError as reason:
            pytest.skip(str(reason))
        assert cached_bytes(f.fileno(), 0, checkpoint.stat().st_size) == before


def test_rates_with_a_made_up_clock(checkpoint):
    ticks = iter(range(0, 10**15, 10**9))
    assert measure.measure_page_cache([str(checkpoint)], seconds=0.5, clock=lambda: next(ticks)) > 0


def test_buffers_are_ready_before_the_clock_starts(checkpoint, monkeypatch):
    events = []

    class Buffer(mmap.mmap):
        def write(self, data):
            events.append("buffer")
            return super().write(data)

    def clock():
        events.append("clock")
        return len(events)

    monkeypatch.setattr(measure.mmap, "mmap", Buffer)
    measure.measure_page_cache([str(checkpoint)], clock=clock)
    assert "buffer" in events
    assert "buffer" not in events[events.index("clock") :], "page faults would count as reading"


def test_diagnosis():
    document = {
        "limits": {
            "memory_available_bytes": 1,
            "memory_limit_bytes": 10,
            "memlock_bytes": 65536,
            "transparent_huge_pages": "never",
        },
        "storage": {"network": True, "filesystem": "nfs4"},
        "ceilings": {"h2d_pinned_gbps": 3.0, "import_torch_s": 20.0},
        "files": {"nbytes": 100},
        "device": "cuda:0",
        "machine": {"torch": "2.11", "gpu": "H100"},
        "gpus": {"here": 1, "wanted": True, "torch_cuda": "12.8", "visible": None},
    }
    found = diagnose(document)
    assert len(found) == 6
    assert all(item["evidence"] for item in found)
    json.dumps(found)


@pytest.mark.parametrize(
    ("gpus", "text", "evidence"),
    [
        ({"torch_cuda": None}, "install a torch that is built with CUDA", "2 NVIDIA GPUs here, and torch 2.13.0+cpu"),
        ({"visible": "-1"}, "unset CUDA_VISIBLE_DEVICES", "it is set to '-1'"),
        ({}, "nvidia-smi", "built with CUDA 12.8, finds none"),
        ({"here": 0, "torch_cuda": None}, "", ""),
        ({"wanted": False, "torch_cuda": None}, "", ""),
    ],
)
def test_a_gpu_that_torch_cannot_use(gpus, text, evidence):
    document = {
        "limits": {"memory_available_bytes": 1, "memory_limit_bytes": 10},
        "storage": {},
        "ceilings": {},
        "files": {"nbytes": 0},
        "device": "cpu",
        "machine": {"torch": "2.13.0+cpu"},
        "gpus": {"here": 2, "wanted": True, "torch_cuda": "12.8", "visible": None} | gpus,
    }
    found = diagnose(document)
    assert len(found) == bool(text)
    assert all(text in item["text"] and evidence in item["evidence"] for item in found)


def test_gpus_are_counted_without_torch(tmp_path):
    assert nvidia_gpus(tmp_path) == 0
    for name, vendor, kind in (("a", "0x10de", "0x030200"), ("b", "0x10de", "0x040300"), ("c", "0x8086", "0x030000")):
        device = tmp_path / "sys/bus/pci/devices" / name
        device.mkdir(parents=True)
        (device / "vendor").write_text(f"{vendor}\n")
        (device / "class").write_text(f"{kind}\n")
    assert nvidia_gpus(tmp_path) == 1, "the sound of a graphics card is none"
    (tmp_path / "proc/driver/nvidia/gpus/0000:01:00.0").mkdir(parents=True)
    (tmp_path / "proc/driver/nvidia/gpus/0000:02:00.0").mkdir(parents=True)
    assert nvidia_gpus(tmp_path) == 2


def test_a_range_is_never_narrower_than_quiet_machines_differ():
    one, many = _measured([2.0], 10.0), _measured([1.0, 2.0, 5.0], 10.0)
    assert (one.typical, one.least, one.most) == (20.0, pytest.approx(18.0), pytest.approx(22.0))
    assert (many.typical, many.least, many.most) == (20.0, 10.0, 50.0)
    assert _measured([], 1.0) is None
