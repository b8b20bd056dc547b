"""What WAN2.2-T2V-A14B needs, from its headers, on a GPU that only says how large it is."""

import importlib
from dataclasses import replace

import pytest
import torch
from programs import ROOT

import wan_loader
from wan_loader.errors import DeviceMemoryError, HostMemoryError
from wan_loader.formats.checkpoint_facts import Quantised
from wan_pipeline import fitting
from wan_pipeline.fitting import make_memory_plan, measure_blocks
from wan_pipeline.memory_plan import CONTEXT_BYTES, HOST_PROCESS_BYTES, LIBRARY_BYTES, WORKSPACE_BYTES
from wan_pipeline.start_options import StartOptions
from wan_pipeline.wan_checkpoint import open_wan

GB = 10**9
SMALL, LARGE = {"size": (832, 480), "frame_num": 81}, {"size": (1280, 720), "frame_num": 81}


@pytest.fixture(scope="module")
def a14b(tmp_path_factory):
    """The published checkpoint, 126 GB, without the weights."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        path = tmp_path_factory.mktemp("a14b")
        importlib.import_module("sparse").make_sparse(path, layout="diffusers", size="full")
    return open_wan(path)


@pytest.fixture
def plan(a14b, monkeypatch):
    """The plan on a GPU of 80 GB in a machine of 64 GiB."""
    held = {"reserved": 0, "allocated": 0, "free": 79 * GB}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (held["free"], 80 * GB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: held["reserved"])
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: held["allocated"])
    monkeypatch.setattr(fitting, "memory_limit", lambda: 64 << 30)
    monkeypatch.setattr(fitting, "available_memory", lambda: 60 << 30)

    def plan(**settings):
        held.update(settings.pop("held", {}))
        return make_memory_plan(a14b, StartOptions(**settings), torch.device("cuda:0"))

    return plan


def n_streamed(plan):
    return {name: one.n_streamed for name, one in plan.streams.items()}


def test_smaller_limits_stream_more(plan):
    assert plan(**LARGE).preset.name == "fastest"
    assert plan(**SMALL, device_memory=40 * GB).preset.name == "min-memory"
    at_24 = plan(**SMALL, device_memory=24 * GB)
    at_12 = plan(**SMALL, device_memory=12 * GB)
    at_8 = plan(**SMALL, device_memory=8 * GB)
    assert list(at_24.streams) == ["transformer", "transformer_2"]
    assert list(at_12.streams) == ["text_encoder", "transformer", "transformer_2"]
    assert n_streamed(at_24)["transformer"] < n_streamed(at_12)["transformer"] < n_streamed(at_8)["transformer"]
    assert [x.tiled for x in (at_24, at_12, at_8)] == [frozenset(), frozenset(), {"vae"}]
    assert plan(**SMALL, preset="streamed").streams == at_12.streams
    assert plan(**LARGE, device_memory=24 * GB).tiled == {"vae"}
    with pytest.raises(DeviceMemoryError, match=r"low-noise expert .* allow \d+\.\dGB or more"):
        plan(**LARGE, device_memory=8 * GB)


def test_what_the_process_holds_already(plan):
    """Tensors that stay count; what the allocator has and nothing uses does not."""
    alone = plan(**SMALL, device_memory=12 * GB).streams["transformer"].device_nbytes
    held = {"allocated": GB, "reserved": 3 * GB, "free": 76 * GB}
    assert plan(**SMALL, device_memory=12 * GB, held=held).streams["transformer"].device_nbytes == alone - GB
    # where less is free than the limit, that binds, but for what libraries will take
    work = alone - (12 * GB - CONTEXT_BYTES - LIBRARY_BYTES - WORKSPACE_BYTES)
    full = plan(**SMALL, device_memory=30 * GB, held={"allocated": 0, "reserved": 0, "free": 10 * GB})
    assert full.streams["transformer"].device_nbytes == 10 * GB - LIBRARY_BYTES - WORKSPACE_BYTES + work
    assert "9.5 GB allowed on cuda:0 of 10.0 GB, as 500 MB are left" in full.reason
    for limit in (None, 30 * GB):  # to allow more would not help
        with pytest.raises(DeviceMemoryError, match=r"of 5\.0 GB, as 500 MB .*5\.0 GB are free") as error:
            plan(**SMALL, device_memory=limit, held={"free": 5 * GB})
        assert error.value.remedy == "use a smaller size, or fewer frames"


def test_quantised_blocks_are_small_in_their_files_and_take_more_on_the_way(a14b):
    expert = a14b["transformer"]
    plain = measure_blocks(expert, "bfloat16")
    in_blocks = [t for t in expert.facts.tensors if t.name.startswith("blocks.") and len(t.shape) == 2]
    raw = {t.name: t._replace(dtype="uint8") for t in in_blocks}  # a byte for each number
    quantised = {t.name: Quantised("scaled", raw[t.name], t) for t in in_blocks}
    small = measure_blocks(replace(expert, facts=replace(expert.facts, quantised=quantised)), "bfloat16", cuda=True)
    assert small.nbytes == plain.nbytes
    assert small.nbytes_file == pytest.approx(plain.nbytes_file / 4, rel=0.01)
    assert small.rest_nbytes - plain.rest_nbytes == (17 << 20) + (128 << 20)
    assert measure_blocks(expert, "bfloat16", cuda=True).rest_nbytes - plain.rest_nbytes == 17 << 20
    assert measure_blocks(expert, None, cuda=True).rest_nbytes == measure_blocks(expert, None).rest_nbytes


def test_host_memory(plan):
    """The published experts are fp32 in their files: 1.4 GB a block."""
    block = plan(**SMALL, device_memory=12 * GB).streams["transformer"]
    assert block.cache_nbytes == 45 << 30
    assert block.blocks.nbytes_file == pytest.approx(2 * block.blocks.nbytes, rel=0.01)
    limited = plan(**SMALL, device_memory=12 * GB, host_memory=24 * GB)
    one = limited.streams["transformer"]
    assert one.cache_nbytes == 24 * GB - HOST_PROCESS_BYTES - (512 << 20)
    assert one.n_read == one.n_streamed - one.cache_nbytes // one.blocks.nbytes_file > block.n_read > 0
    assert f"{one.n_read} of 40 blocks of the high-noise expert and of the low-noise expert are read" in limited.reason
    with pytest.raises(HostMemoryError, match=r"3 GB of host memory are too little: .* take 3\.54 GB"):
        plan(**SMALL, host_memory=3 * GB)


def test_kept_networks_take_room_that_they_have_already(plan, a14b, monkeypatch):
    """What is kept counts as held all the time, and is not taken from what is free a second time."""
    sizes = {c.name: c.nbytes("float32" if c.name == "vae" else "bfloat16") for c in a14b.components}
    asked = []

    def kept_nbytes(facts, device, *, dtype, keep_fp32):
        name = next(c.name for c in a14b.components if c.facts is facts)
        asked.append((name, dtype, tuple(keep_fp32)))
        return sizes[name] if name in there else 0

    monkeypatch.setattr(wan_loader, "kept_nbytes", kept_nbytes)
    there = set(sizes)
    free = 81 * GB - sum(sizes.values())
    with pytest.raises(DeviceMemoryError):
        plan(**SMALL, preset="fastest", held={"free": free})
    assert asked == []
    assert plan(**SMALL, preset="fastest", keep=True).preset.name == "fastest"
    assert plan(**SMALL, keep=True).preset.name == "fastest"
    assert {name: dtype for name, dtype, _ in asked} == {
        "text_encoder": None, "transformer": torch.bfloat16, "transformer_2": torch.bfloat16, "vae": torch.float32
    }  # fmt: skip
    # dropping what is kept frees nothing
    with pytest.raises(DeviceMemoryError, match=r"kept text encoder .* \+ kept low-noise .*: drop what is kept"):
        plan(**SMALL, preset="min-memory", keep=True)
    asked.clear()
    plan(**SMALL, keep=True, t5_cpu=True)
    assert "text_encoder" not in [name for name, *_ in asked]
