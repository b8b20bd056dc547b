"""Whole videos on the CPU: from both layouts, with every preset, equal to plain diffusers bit for bit."""

import functools
import json
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import torch
from versions import DIFFUSERS, as_dtype

import wan_pipeline
from wan_loader.errors import CheckpointError, DeviceError, OptionError
from wan_pipeline.presets import PRESETS
from wan_pipeline.video_request import NEGATIVE_PROMPT, VideoRequest, parse_guide_scale, parse_size

PROMPT = "two cats boxing on a stage"
SMALL = {"size": (32, 32), "frame_num": 5, "steps": 4, "seed": 3}
LAYOUTS = ("native", "diffusers")


def run_diffusers(pipe, *, shift=12.0, **settings):
    from diffusers import UniPCMultistepScheduler

    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = UniPCMultistepScheduler.from_config(pipe.scheduler.config, flow_shift=shift)
    return pipe(
        PROMPT,
        negative_prompt=NEGATIVE_PROMPT,
        width=32,
        height=32,
        num_frames=5,
        num_inference_steps=4,
        generator=torch.Generator("cpu").manual_seed(3),
        **{"guidance_scale": 4.0, "guidance_scale_2": 3.0, **settings},
    ).frames[0]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Networks this small are slower with several, above all on a busy machine."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


@pytest.fixture(scope="module")
def expected(tiny_wan):
    """Plain diffusers' videos: experts in bf16 with the VAE in fp32, and everything as `from_pretrained` does alone."""
    from diffusers import AutoencoderKLWan, WanPipeline

    root = tiny_wan("diffusers")
    vae = AutoencoderKLWan.from_pretrained(root / "vae")
    return {
        "bf16": run_diffusers(WanPipeline.from_pretrained(root, vae=vae, **as_dtype(torch.bfloat16))),
        "fp32": run_diffusers(WanPipeline.from_pretrained(root, **as_dtype(None))),
    }


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("preset", "dtype"), [*((p, "bf16") for p in PRESETS), ("auto", "fp32")])
def test_equal_to_diffusers(tiny_wan, expected, layout, dtype, preset):
    with wan_pipeline.WanT2V.from_checkpoint(tiny_wan(layout), preset=preset, device="cpu", dtype=dtype) as pipe:
        for _ in range(2):  # networks that were dropped are fetched again
            video = pipe(PROMPT, grid="diffusers", **SMALL)
            assert np.array_equal(video.frames_THWC, expected[dtype])
        assert pipe.pipe.tokenizer._whole is None  # nothing has asked for transformers' own, which takes long to make
    assert video.fps == 16


@pytest.mark.parametrize(
    "flags",
    [{"t5_cpu": True}, {"offload_model": True}, {"offload_model": False}, {"t5_cpu": True, "offload_model": True}],
)
def test_flags_change_no_bit(tiny_wan, expected, flags):
    with wan_pipeline.WanT2V.from_checkpoint(tiny_wan(), device="cpu", **flags) as pipe:
        assert np.array_equal(pipe(PROMPT, grid="diffusers", **SMALL).frames_THWC, expected["bf16"])


OTHER_SETTINGS = {"shift": 3.0, "guidance_scale": 5.0, "guidance_scale_2": None}


@pytest.fixture(scope="module")
def plain(tiny_wan):
    """(dtype) -> the video of plain diffusers with all networks in it."""
    from diffusers import WanPipeline

    @functools.cache
    def plain(dtype):
        return run_diffusers(WanPipeline.from_pretrained(tiny_wan("diffusers"), **as_dtype(dtype)), **OTHER_SETTINGS)

    return plain


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("preset", ["fastest", "balanced", "min-memory"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_load_diffusers(tiny_wan, plain, layout, preset, dtype):
    from diffusers import WanPipeline

    source = wan_pipeline.open_wan(tiny_wan(layout)) if preset == "balanced" else tiny_wan(layout)
    pipe = wan_pipeline.load_diffusers(source, device="cpu", dtype=dtype, preset=preset)
    assert type(pipe) is WanPipeline
    assert np.array_equal(run_diffusers(pipe, **OTHER_SETTINGS), plain(dtype))
    if preset == "fastest":
        assert not any(p.is_meta for m in (pipe.vae, pipe.transformer, pipe.text_encoder) for p in m.parameters())
        assert not hasattr(pipe.vae, "_hf_hook")
        pipe.to("cpu")


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # inside diffusers' DPM++
def test_official_grid_and_solvers(tiny_wan):
    from wan_pipeline.solvers import make_scheduler

    for solver in ("unipc", "dpm++"):
        scheduler = make_scheduler({"num_train_timesteps": 1000, **UNIPC}, solver=solver, shift=12.0)
        scheduler.set_timesteps(40, device="cpu")
        plain = np.linspace(0.999, 0, 41)[:-1]
        shifted = 12 * plain / (1 + 11 * plain)
        np.testing.assert_allclose(scheduler.sigmas[:-1].numpy(), shifted, rtol=1e-6)
        assert int((scheduler.timesteps >= 875).sum()) == 26
    with pytest.raises(OptionError, match="euler"):
        make_scheduler(UNIPC, solver="euler", shift=1.0)
    with wan_pipeline.WanT2V.from_checkpoint(tiny_wan(), device="cpu") as pipe:
        videos = [pipe(PROMPT, **{**SMALL, **s}).frames_THWC for s in ({}, {"solver": "dpm++"}, {"grid": "diffusers"})]
        assert np.array_equal(pipe(PROMPT, **SMALL).frames_THWC, videos[0])  # the same seed, the same video
        assert not np.array_equal(pipe(PROMPT, **{**SMALL, "seed": 4}).frames_THWC, videos[0])
    assert all(np.isfinite(v).all() for v in videos)
    assert not np.array_equal(videos[0], videos[1])
    # an old diffusers has the official grid itself
    assert np.array_equal(videos[0], videos[2]) == (DIFFUSERS < (0, 37))


UNIPC = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ti2v_5b(tiny_wan, layout):
    with wan_pipeline.WanT2V.from_checkpoint(tiny_wan(layout, "ti2v-5B"), device="cpu", preset="balanced") as pipe:
        video = pipe(PROMPT, **SMALL)
        assert video.frames_THWC.shape == (5, 32, 32, 3)
        assert video.fps == 24
        with pytest.raises(OptionError, match="multiples of 32 for ti2v-5B"):
            pipe(PROMPT, **{**SMALL, "size": (48, 48)})


def test_report(tiny_wan):
    told = []
    with wan_pipeline.WanT2V.from_checkpoint(tiny_wan(), device="cpu", preset="min-memory") as pipe:
        assert pipe.report()["pipeline"]["time_to_first_step_s"] is None
        pipe(PROMPT, progress=lambda *event: told.append(event), **SMALL)
        report = json.loads(json.dumps(pipe.report()))
    assert [s["name"] for s in report["pipeline"]["stages"]] == ["encode", "denoise", "decode"]
    assert [x["name"] for x in report["pipeline"]["waits"]] == ["text_encoder", "transformer", "transformer_2", "vae"]
    assert report["pipeline"]["time_to_first_step_s"] > 0
    assert len(report["pipeline"]["steps_s"]) == 4
    assert report["nbytes_file"] == sum(x["nbytes"] for x in report["pipeline"]["loads"])
    assert report["settings"]["preset"] == "min-memory"
    assert told[:3] == [("encode", 0, 1), ("encode", 1, 1), ("denoise", 0, 4)]
    assert told[-1] == ("decode", 1, 1)


def test_errors_come_before_anything_is_loaded(tiny_wan, tmp_path, monkeypatch):
    from wan_pipeline import modules

    monkeypatch.setattr(modules, "fetch", lambda *a, **k: pytest.fail("a weight was loaded"))
    for settings, error in (
        ({"preset": "slow"}, OptionError),
        ({"dtype": "int3"}, OptionError),
        ({"device": "cuda:99"}, DeviceError),
        ({"device": "tpu"}, DeviceError),
    ):
        with pytest.raises(error):
            wan_pipeline.WanT2V.from_checkpoint(tiny_wan(), **{"device": "cpu", **settings})
    with pytest.raises(CheckpointError):
        wan_pipeline.WanT2V.from_checkpoint(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(OptionError, match="torchrun"):
        wan_pipeline.WanT2V.from_checkpoint(tiny_wan())


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"prompt": "  "}, "prompt is empty"),
        ({"size": (100, 64)}, "multiples of 16"),
        ({"size": (0, 0)}, "multiples of 16"),
        ({"frame_num": 80}, r"4n\+1"),
        ({"frame_num": -3}, r"4n\+1"),
        ({"steps": 0}, "sample_steps"),
        ({"shift": 0.0}, "sample_shift"),
        ({"shift": "x"}, "sample_shift"),
        ({"shift": float("inf")}, "sample_shift"),
        ({"guide_scale": 3.0}, "guide_scale=3.0: use two numbers"),
        ({"guide_scale": (1.0, 2.0, 3.0)}, "guide_scale"),
        ({"guide_scale": ("3", "4")}, "guide_scale"),
        ({"guide_scale": (3.0, float("nan"))}, "guide_scale"),
        ({"solver": "euler"}, "sample_solver"),
        ({"grid": "mine"}, "grid"),
        ({"seed": -1}, "seed"),
    ],
)
def test_requests_that_make_no_sense(settings, match):
    with pytest.raises(OptionError, match=match):
        VideoRequest.make("t2v-A14B", **{"prompt": "a cat", **settings})


def test_official_defaults():
    request = VideoRequest.make("t2v-A14B", "a cat")
    assert (request.size, request.frame_num, request.steps) == ((1280, 720), 81, 40)
    assert (request.shift, request.guide_scale, request.solver) == (12.0, (3.0, 4.0), "unipc")
    assert parse_size("832*480") == parse_size("832x480") == (832, 480)
    assert parse_guide_scale("3,4") == (3.0, 4.0)
    assert parse_guide_scale("5") == (5.0, 5.0)
    for parse in (parse_size, parse_guide_scale):
        with pytest.raises(OptionError):
            parse("1*2*3")


def test_public_names():
    assert wan_pipeline.__all__ == sorted(wan_pipeline.__all__)
    for name in wan_pipeline.__all__:
        assert getattr(wan_pipeline, name) is not None
    code = (
        "import sys, wan_pipeline, wan_pipeline.pipeline, wan_pipeline.commands.app; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", LAYOUTS)
def test_on_cuda_every_preset_gives_what_diffusers_gives(tiny_wan, layout):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    from diffusers import AutoencoderKLWan, WanPipeline

    root = tiny_wan("diffusers")
    vae = AutoencoderKLWan.from_pretrained(root / "vae")
    plain = run_diffusers(WanPipeline.from_pretrained(root, vae=vae, **as_dtype(torch.bfloat16)).to("cuda"))
    for preset in PRESETS:
        with wan_pipeline.WanT2V.from_checkpoint(
            tiny_wan(layout), preset=preset, device="cuda", **SMALL_LIMITS
        ) as pipe:
            for _ in range(3):
                np.testing.assert_array_equal(pipe(PROMPT, grid="diffusers", **SMALL).frames_THWC, plain)
            assert 0 < pipe.report()["memory"]["device_peak_bytes"] < 10**9
    with wan_pipeline.WanT2V.from_checkpoint(tiny_wan(layout), device="cuda", t5_cpu=True, **SMALL_LIMITS) as pipe:
        assert np.isfinite(pipe(PROMPT, **SMALL).frames_THWC).all()


SMALL_LIMITS = {"size": SMALL["size"], "frame_num": SMALL["frame_num"]}
