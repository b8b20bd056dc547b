"""Whole runs from ComfyUI's folders, and from files that are named one by one."""

import json

import comfy_folders
import numpy as np
import pytest

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import torch

import wan_pipeline
from wan_pipeline.commands.app import main
from wan_pipeline.wan_checkpoint import open_wan

PROMPT = "two cats boxing on a stage"
SMALL = {"size": (32, 32), "frame_num": 5, "steps": 2, "seed": 3, "shift": 5.0}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Networks this small are slower with several."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


def frames(*args, device="cpu", **settings):
    with wan_pipeline.WanT2V.from_checkpoint(*args, device=device, **settings) as pipe:
        return pipe(PROMPT, **SMALL).frames_THWC


@pytest.fixture(scope="module")
def expected(tiny_comfy, tiny_wan, tmp_path_factory):
    """form -> the video of the native layout with the same numbers as plain tensors."""
    made = {}

    def get(form):
        if form not in made:
            target = tmp_path_factory.mktemp("plain") / form
            made[form] = frames(
                comfy_folders.plain_copy(comfy_folders.files(tiny_comfy(form), form), tiny_wan(), target)
            )
            assert np.isfinite(made[form]).all()
        return made[form]

    return get


@pytest.mark.parametrize("form", comfy_folders.FORMS)
def test_a_video_is_that_of_the_plain_numbers(tiny_comfy, expected, form):
    np.testing.assert_array_equal(frames(tiny_comfy(form)), expected(form))


def test_forms_differ(expected):
    """So that the test above compares what it should."""
    assert not np.array_equal(expected("gguf"), expected("fp8-scaled"))


def test_files_without_a_directory(tiny_comfy, expected):
    named = comfy_folders.files(tiny_comfy(), "fp8-scaled")
    np.testing.assert_array_equal(frames(**named), expected("fp8-scaled"))


def test_files_in_the_place_of_a_directorys(tiny_comfy, tiny_wan, tmp_path):
    """GGUF experts in a native directory, one of them under a prefix: the others come from there."""
    gguf = comfy_folders.files(tiny_comfy("gguf"), "gguf")
    comfy = comfy_folders.files(tiny_comfy("comfy"), "comfy")
    mixed = {"high_noise": gguf["high_noise"], "low_noise": comfy["low_noise"]}
    target = comfy_folders.plain_copy(comfy | mixed, tiny_wan(), tmp_path / "plain")
    text, vae = target / "models_t5_umt5-xxl-enc-bf16.safetensors", target / "Wan2.1_VAE.pth"
    expected = frames(target)
    np.testing.assert_array_equal(frames(tiny_wan(), text_encoder=text, vae=vae, **mixed), expected)
    opened = open_wan(tiny_wan(), **mixed)
    assert opened["text_encoder"].source == open_wan(tiny_wan())["text_encoder"].source
    assert (opened.layout, opened.directory) == ("native", tiny_wan())
    # a checkpoint that was opened starts as its directory does
    assert not np.array_equal(frames(opened), expected)


@pytest.mark.filterwarnings("ignore:`torch_dtype` is deprecated:FutureWarning")
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_load_diffusers(tiny_comfy, dtype):
    pipe = wan_pipeline.load_diffusers(tiny_comfy(), device="cpu", dtype=dtype, preset="fastest")
    dtypes = {name: {p.dtype for p in getattr(pipe, name).parameters()} for name in ("text_encoder", "vae")}
    assert dtypes == {"text_encoder": {torch.bfloat16}, "vae": {dtype or torch.float32}}
    values = comfy_folders.plain_values(comfy_folders.files(tiny_comfy(), "fp8-scaled")["high_noise"])
    assert torch.equal(pipe.transformer.blocks[0].attn1.to_q.weight, values["blocks.0.self_attn.q.weight"].to(dtype))


def test_the_cache_keeps_what_is_plain(tiny_comfy, expected, tmp_path):
    """The second start reads the entry, the tokenizer among it; quantised files are no entry."""
    for state in ("building", "hit"):
        with wan_pipeline.WanT2V.from_checkpoint(
            tiny_comfy("comfy"), device="cpu", cache=True, cache_dir=tmp_path / "cache"
        ) as pipe:
            np.testing.assert_array_equal(pipe(PROMPT, **SMALL).frames_THWC, expected("comfy"))
            assert pipe.report()["cache"]["state"] == state
            if pipe.build is not None:
                pipe.build.wait()
    with wan_pipeline.WanT2V.from_checkpoint(tiny_comfy(), device="cpu", cache=True, cache_dir=tmp_path / "b") as pipe:
        pipe.wait()
        assert "quantised" in pipe.report()["cache"]["reason"]


def test_the_commands(tiny_comfy, tmp_path, call_main, capfd):
    named = comfy_folders.files(tiny_comfy("gguf"), "gguf")
    flags = [word for name, path in named.items() for word in (f"--{name.replace('_', '-')}", path)]
    small = ["--prompt", PROMPT, "--size", "32*32", "--frame_num", "5", "--sample_steps", "2", "--base_seed", "3"]
    for target, words in (("a.mp4", flags), ("b.mp4", ["--ckpt_dir", tiny_comfy("gguf")])):
        done = call_main(
            main, "generate", *words, *small, "--device", "cpu", "--save_file", tmp_path / target, "--json"
        )
        told = capfd.readouterr()
        assert done == 0, told.err
        assert json.loads(told.out)["target"] == str(tiny_comfy("gguf"))
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
    assert call_main(main, "load", *flags, "--device", "cpu") == 0
    assert call_main(main, "load", "--device", "cpu") == 2
    assert "--ckpt_dir" in capfd.readouterr().err
    assert call_main(main, "load", *flags[:2], "--device", "cpu") == 1
    assert "give --text_encoder FILE, --low_noise FILE, --vae FILE or --ckpt_dir DIR" in capfd.readouterr().err


@pytest.mark.gpu
@pytest.mark.parametrize("form", comfy_folders.FORMS)
def test_on_cuda_a_video_is_that_of_the_plain_numbers(tiny_comfy, tiny_wan, tmp_path, form):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    small = {"device": "cuda", "size": SMALL["size"], "frame_num": SMALL["frame_num"]}
    plain = comfy_folders.plain_copy(comfy_folders.files(tiny_comfy(form), form), tiny_wan(), tmp_path / "plain")
    expected = frames(plain, **small)
    for preset in ("fastest", "balanced", "min-memory"):
        np.testing.assert_array_equal(frames(tiny_comfy(form), preset=preset, **small), expected)
