"""Whole videos within a limit of memory: the same bits as with everything resident, whatever is streamed.

The CPU stands in for a device: there, a limit is of weights and work. Where `no_work` is asked for, of weights alone,
so that the experts of a tiny checkpoint are what does not fit.
"""

import json
import re
import subprocess
import sys
import threading
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import torch
from networks import built

import wan_pipeline
from wan_loader.errors import DeviceMemoryError, HostMemoryError, OptionError
from wan_loader.sizes import parse_size
from wan_pipeline import fitting
from wan_pipeline.fitting import make_memory_plan, measure_blocks
from wan_pipeline.memory_plan import (
    CONTEXT_BYTES,
    HOST_PROCESS_BYTES,
    LIBRARY_BYTES,
    WORKSPACE_BYTES,
    allocator_nbytes,
)
from wan_pipeline.start_options import StartOptions
from wan_pipeline.synth import arch, synth
from wan_pipeline.wan_checkpoint import open_wan

PROMPT = "two cats boxing on a stage"
SMALL = {"size": (32, 32), "frame_num": 5, "steps": 4, "seed": 3}
ROOM = {"size": SMALL["size"], "frame_num": SMALL["frame_num"]}
LAYOUTS = ("native", "diffusers")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


@pytest.fixture(scope="module")
def six_blocks(tmp_path_factory):
    """layout -> a tiny checkpoint whose experts have six blocks each."""
    return {layout: make(tmp_path_factory.mktemp("six") / layout, layout, layers=6) for layout in LAYOUTS}


def make(path, layout, **dit):
    """Make a tiny checkpoint with other experts."""
    tiny = arch.ARCHS["t2v-A14B", "tiny"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(arch.ARCHS, ("t2v-A14B", "tiny"), replace(tiny, dit=replace(tiny.dit, **dit)))
        return synth(path, layout=layout).directory


@pytest.fixture
def no_work(monkeypatch):
    """Running a network takes nothing, but the VAE as a whole."""
    names = ("text_encoder", "transformer", "transformer_2")
    monkeypatch.setattr(fitting, "_workspace", lambda *a: (dict.fromkeys(names, 0) | {"vae": 10**9}, {"vae": 0}))


def video(root, **settings):
    """(frames, the streams of the report, the reason of the preset)"""
    with wan_pipeline.WanT2V.from_checkpoint(root, device="cpu", **ROOM, **settings) as pipe:
        first, second = (pipe(PROMPT, **SMALL).frames_THWC for _ in range(2))
        assert np.array_equal(first, second)  # networks that were let go come back
        report = json.loads(json.dumps(pipe.report()))
        if settings.get("device_memory"):
            assert report["settings"]["device_memory"] == settings["device_memory"]
        return first, {x["name"]: x for x in report["pipeline"].get("streams", [])}, pipe.preset_reason


@pytest.fixture(scope="module")
def resident(six_blocks):
    """layout -> the video of everything resident. Each its own: kernels go by where views of files are."""
    return {layout: video(six_blocks[layout], preset="fastest")[0] for layout in LAYOUTS}


def least(root, **settings):
    """The smallest limit that will do, as the error of one that is too small names it."""
    with pytest.raises(DeviceMemoryError) as error:
        wan_pipeline.WanT2V.from_checkpoint(root, device="cpu", device_memory=1000, **ROOM, **settings)
    return parse_size(re.search(r"allow (\S+) or more", error.value.remedy)[1])


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("share", [0, 0.5])
def test_experts_that_are_streamed_give_the_same_video(six_blocks, resident, layout, share):
    root = six_blocks[layout]
    expert = measure_blocks(open_wan(root)["transformer"], "bfloat16")
    low = least(root)
    limit = low + int(share * (expert.needed(0, 3) - low))
    frames, streams, reason = video(root, device_memory=limit)
    assert np.array_equal(frames, resident[layout])
    assert "streamed: " in reason
    for name in ("transformer", "transformer_2"):
        one = streams[name]
        assert one["n_blocks"] == 6
        assert 0 < one["n_streamed"] == next(n for k in (3, 2, 1) if (n := expert.fewest(limit, k)) is not None)
        assert one["device_nbytes"] <= limit
        assert one["n_late"] == 0
    assert f"{streams['transformer']['n_streamed']} of 6 blocks of the high-noise expert and of" in reason


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_text_encoder_that_is_streamed_gives_the_same_video(six_blocks, resident, layout):
    frames, streams, reason = video(six_blocks[layout], device_memory=least(six_blocks[layout]))
    assert np.array_equal(frames, resident[layout])
    assert list(streams) == ["text_encoder"]
    assert "2 of 2 blocks of the text encoder are streamed" in reason


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("form", ["fp8-scaled", "gguf"])
def test_quantised_experts_that_are_streamed_give_the_same_video(tiny_comfy, form):
    expected, _, _ = video(tiny_comfy(form), preset="fastest")
    frames, streams, _ = video(tiny_comfy(form), device_memory=least(tiny_comfy(form)))
    assert np.array_equal(frames, expected)
    assert {"transformer", "transformer_2"} <= streams.keys()


def test_a_named_preset_gets_the_limit_as_its_number(six_blocks, resident):
    limit = least(six_blocks["native"], preset="streamed")
    frames, streams, reason = video(six_blocks["native"], preset="streamed", device_memory=limit)
    assert np.array_equal(frames, resident["native"])
    assert list(streams) == ["text_encoder"]
    assert reason.startswith("streamed: ")
    with pytest.raises(DeviceMemoryError, match="preset balanced needs"):
        video(six_blocks["native"], preset="balanced", device_memory=limit)


def test_a_limit_with_room_takes_the_usual_ways(six_blocks, resident):
    for limit, name in ((10**9, "fastest"), (24_200_000, "balanced")):
        frames, streams, reason = video(six_blocks["native"], device_memory=limit)
        assert np.array_equal(frames, resident["native"])
        assert not streams
        assert reason.startswith(f"{name}: ")
    frames, _, reason = video(six_blocks["native"], preset="streamed")
    assert np.array_equal(frames, resident["native"])
    assert "12.0 GB allowed on cpu" in reason


def test_load_diffusers_within_a_limit(six_blocks, monkeypatch):
    """A plain pipeline of diffusers, whose text encoder may be called outside of it, and with gradients on."""
    root = six_blocks["diffusers"]
    videos = []
    work = {"text_encoder": 950_000, "transformer": 0, "transformer_2": 0, "vae": 0}
    monkeypatch.setattr(fitting, "_workspace", lambda *a: (dict(work), {}))
    for settings in ({"preset": "fastest"}, {"device_memory": 1_010_000}):
        pipe = wan_pipeline.load_diffusers(root, device="cpu", dtype="bf16", **settings)
        pipe.set_progress_bar_config(disable=True)
        pipe.encode_prompt(PROMPT, do_classifier_free_guidance=False)  # with gradients on, kernels are others
        with torch.no_grad():
            embeds, _ = pipe.encode_prompt(PROMPT, do_classifier_free_guidance=False)
        made = pipe(
            prompt_embeds=embeds,
            negative_prompt_embeds=embeds,
            width=32,
            height=32,
            num_frames=5,
            num_inference_steps=4,
            generator=torch.Generator("cpu").manual_seed(3),
        )
        videos.append(made.frames[0])
    assert np.array_equal(*videos)


def test_tiles_are_switched_on_where_the_plan_says_so(tiny_wan, monkeypatch):
    work = dict.fromkeys(("text_encoder", "transformer", "transformer_2"), 0) | {"vae": 10**9}
    monkeypatch.setattr(fitting, "_workspace", lambda *a: (dict(work), {"vae": 10**6}))
    for limit, tiled in ((10**8, True), (3 * 10**9, False)):
        with wan_pipeline.WanT2V.from_checkpoint(tiny_wan(), device="cpu", device_memory=limit, **ROOM) as pipe:
            assert pipe.pipe.vae.use_tiling is tiled
            assert ("works by tiles" in pipe.preset_reason) is tiled
            assert pipe.report()["settings"].get("tiled") == (["vae"] if tiled else None)


class Published(dict):
    """What the estimates ask of A14B's checkpoint: the networks by their names."""

    vae_scale = (4, 8)
    experts = ()


@pytest.mark.parametrize(
    ("frames", "size", "whole", "tiled"),
    [
        (17, (832, 480), 7_855_875_072, 1_385_733_120),
        (81, (832, 480), 8_175_363_072, 1_821_874_176),
        (33, (1280, 720), None, 1_774_826_496),
        (81, (1280, 720), None, 4_199_731_200),
    ],
)
def test_the_work_of_the_vae_is_on_the_safe_side_of_what_was_traced(frames, size, whole, tiled):
    text = SimpleNamespace(config={"d_model": 4096, "d_ff": 10240, "num_heads": 64})
    checkpoint = Published(text_encoder=text, vae=SimpleNamespace(config={"base_dim": 96}))
    work, by_tiles = fitting._workspace(checkpoint, StartOptions(size=size, frame_num=frames))
    assert 1.18 * tiled < by_tiles["vae"] < 1.32 * tiled
    assert whole is None or 1.18 * whole < work["vae"] < 1.32 * whole
    assert work["text_encoder"] == pytest.approx(500e6, rel=0.05)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["text_encoder", "transformer"])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_blocks_are_measured_as_streaming_does(six_blocks, layout, name, dtype):
    """What the plan allows is enough, and as little as can be: one byte less is refused."""
    from wan_pipeline import modules
    from wan_pipeline.memory_plan import Streaming

    component = open_wan(six_blocks[layout])[name]
    wanted = None if dtype is None else getattr(torch, dtype)
    blocks = measure_blocks(component, dtype)
    for buffers in range(1, blocks.count):
        budget = blocks.needed(blocks.count, buffers)
        one = Streaming(
            blocks=blocks, n_streamed=blocks.count, buffers=buffers, device_nbytes=budget, cache_nbytes=None
        )
        module = built(component, wanted)
        with modules.stream(module, component, one, device="cpu", dtype=wanted) as streamed:
            assert len(streamed.report.streamed) == blocks.count
            assert streamed.report.device_nbytes == budget
        modules.empty(module)
        assert all(p.is_meta for p in module.parameters())
        with pytest.raises(DeviceMemoryError):
            modules.stream(module, component, replace(one, device_nbytes=budget - 1), device="cpu", dtype=wanted)


def test_limits_that_make_no_sense(tiny_wan):
    for settings, match in (
        ({"device_memory": "twelve"}, "'twelve' is not understood"),
        ({"device_memory": 0}, "device_memory"),
        ({"device_memory": 1.5}, "device_memory"),
        ({"host_memory": "-3GB"}, "is not understood"),
        ({"host_memory": True}, "host_memory"),
    ):
        with pytest.raises(OptionError, match=match):
            wan_pipeline.WanT2V.from_checkpoint(tiny_wan(), device="cpu", **settings)
    with pytest.raises(HostMemoryError, match=r"libraries and loads take 3 GB: allow 3 GB or more"):
        wan_pipeline.WanT2V.from_checkpoint(tiny_wan(), device="cpu", host_memory="2GB")


def test_on_the_cpu_weights_are_in_host_memory(tiny_wan):
    limits = {"host_memory": HOST_PROCESS_BYTES + 22_500_000}
    options = StartOptions(device="cpu", **ROOM, **limits)
    plan = make_memory_plan(open_wan(tiny_wan()), options, torch.device("cpu"))
    assert plan.preset.name == "min-memory"
    assert "22.5 MB allowed on cpu of 3.0 GB, as 3.0 GB are left to libraries and loads" in plan.reason
    # what would be enough is told as a limit of the same memory
    options = StartOptions(device="cpu", **ROOM, host_memory=HOST_PROCESS_BYTES + 1_000_000)
    with pytest.raises(DeviceMemoryError, match=r"allow 3\.1GB or more"):
        make_memory_plan(open_wan(tiny_wan()), options, torch.device("cpu"))
    options = StartOptions(device="cpu", **ROOM, **limits, device_memory=1_000_000)
    with pytest.raises(DeviceMemoryError, match=r"allow 22\d+B or more"):
        make_memory_plan(open_wan(tiny_wan()), options, torch.device("cpu"))


def test_kept_weights_are_not_for_what_is_streamed(six_blocks):
    root = six_blocks["native"]
    with pytest.raises(OptionError, match=r"networks are streamed here: .* blocks of the .*leave out keep"):
        wan_pipeline.WanT2V.from_checkpoint(root, device="cpu", device_memory=least(root), keep=True, **ROOM)


def test_a_converted_cache_gets_no_entry_of_what_is_streamed(six_blocks, resident, tmp_path):
    root = six_blocks["native"]
    settings = {"cache": True, "cache_dir": tmp_path}
    limit = least(root)
    with wan_pipeline.WanT2V.from_checkpoint(root, device="cpu", device_memory=limit, **ROOM, **settings) as pipe:
        assert np.array_equal(pipe(PROMPT, **SMALL).frames_THWC, resident["native"])
        assert pipe.build is None
        report = pipe.report()["cache"]
    assert (report["state"], report["entry"]) == ("source", None)
    assert "cache build" in report["reason"]
    with wan_pipeline.WanT2V.from_checkpoint(root, device="cpu", **ROOM, **settings) as pipe:
        pipe.wait()
        pipe.build.wait()
    # an entry that is there is streamed from
    with wan_pipeline.WanT2V.from_checkpoint(root, device="cpu", **ROOM, **settings) as pipe:
        expected = pipe(PROMPT, **SMALL).frames_THWC
    with wan_pipeline.WanT2V.from_checkpoint(root, device="cpu", device_memory=limit, **ROOM, **settings) as pipe:
        assert np.array_equal(pipe(PROMPT, **SMALL).frames_THWC, expected)
        assert pipe.report()["cache"]["state"] == "hit"


# --- with a GPU


class Watch:
    """The bytes that the driver counts on a device beyond those at the beginning, polled by a thread."""

    def __init__(self):
        self._before = self._used()
        self.peak = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    @staticmethod
    def _used():
        free, total = torch.cuda.mem_get_info()
        return total - free

    def _run(self):
        while not self._stop.wait(0.001):
            self.peak = max(self.peak, self._used() - self._before)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *error):
        self._stop.set()
        self._thread.join()


def command(*words):
    return subprocess.run([sys.executable, "-m", "wan_pipeline", *map(str, words)], capture_output=True, text=True)


@pytest.fixture
def gpu():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    torch.zeros(1, device="cuda")
    torch.cuda.empty_cache()


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu", "no_work")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_on_cuda_streamed_networks_give_the_same_video(tmp_path, layout):
    # blocks of some size: beside smaller ones, what conversions take is most
    root, settings = make(tmp_path / "wide", layout, layers=6, ffn_dim=1 << 16), {"device": "cuda", **ROOM}
    with wan_pipeline.WanT2V.from_checkpoint(root, preset="fastest", **settings) as pipe:
        expected = pipe(PROMPT, **SMALL).frames_THWC
    expert = measure_blocks(open_wan(root)["transformer"], "bfloat16", cuda=True)
    for limit in (expert.needed(6, 3), expert.needed(6, 1), expert.needed(4, 3)):
        # what libraries have taken until now is theirs, and counts
        beside = CONTEXT_BYTES + LIBRARY_BYTES + WORKSPACE_BYTES + torch.cuda.memory_allocated()
        with wan_pipeline.WanT2V.from_checkpoint(root, device_memory=limit + beside, **settings) as pipe:
            assert pipe.preset == "streamed"
            # nothing was estimated of the work: no bound keeps it
            torch.cuda.set_per_process_memory_fraction(1.0)
            for _ in range(2):
                np.testing.assert_array_equal(pipe(PROMPT, **SMALL).frames_THWC, expected)
            streams = {x["name"]: x["n_streamed"] for x in pipe.report()["pipeline"]["streams"]}
        assert streams["transformer"] == streams["transformer_2"] > 0


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("limit", ["3GB", "least"])
def test_on_cuda_the_driver_counts_no_more_than_the_limit(tmp_path, limit):
    """A process of its own, context and libraries included, watched from this one; a real size of video."""
    # heads of 16, which every kernel of attention takes
    root = make(tmp_path / "tiny", "native", layers=4, heads=6, head_dim=16)
    words = ["generate", "--ckpt_dir", root, "--prompt", PROMPT, "--size", "832*480", "--frame_num", "17"]
    words += ["--sample_steps", "2", "--base_seed", "1", "--device", "cuda", "--save_file", tmp_path / "v.mp4"]
    words += ["--profile_out", tmp_path / "run.json", "--vram_limit"]
    if limit == "least":
        refused = command(*words, "1GB")
        limit = re.search(r"allow (\S+) or more", refused.stderr)[1]
    with Watch() as watch:
        done = command(*words, limit)
    assert done.returncode == 0, done.stderr
    memory = json.loads((tmp_path / "run.json").read_text())["memory"]
    beyond = watch.peak - memory["device_reserved_peak_bytes"]
    print(f"limit {limit}, the driver counts {watch.peak}, {beyond} of it beside the allocator")
    assert memory["device_reserved_peak_bytes"] < watch.peak <= parse_size(limit)


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
def test_on_cuda_all_of_the_device_is_there_again_after_a_limit(tiny_wan):
    with wan_pipeline.WanT2V.from_checkpoint(tiny_wan(), device="cuda", device_memory="2GB", **ROOM) as pipe:
        pipe(PROMPT, **SMALL)
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(2 * allocator_nbytes(pipe._started.preset), dtype=torch.uint8, device="cuda")
    torch.empty(2 * 10**9, dtype=torch.uint8, device="cuda")
