"""Models as values: each is recognised in both layouts, complete or not, and one that has one transformer runs."""

import json
from typing import get_args

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import numpy as np
import torch
from versions import as_dtype

import wan_pipeline
from wan_loader import KeyMismatchError, OptionError
from wan_pipeline.families import FAMILIES, TITLES, Task, family_called
from wan_pipeline.hub.layouts import family_of, is_native, layout_of, layouts_in, missing_files, parts_of, wanted_files
from wan_pipeline.keymap import keymap
from wan_pipeline.model_family import ComponentName
from wan_pipeline.synth import plan_synth
from wan_pipeline.video_request import VideoRequest

LAYOUTS = ("native", "diffusers")
TASKS = get_args(Task)
SMALL = {"size": (32, 32), "frame_num": 5, "steps": 2, "seed": 3}
WAN_21 = "t2v-1.3B"


def names_only(root, plan):
    """The files of a checkpoint as far as their names go, and its configurations."""
    for file in plan.files:
        path = root / file.path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(getattr(file, "content", b""))
    return root


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.task)
def test_a_family_says_all_there_is_to_say(family):
    names = [network.name for network in family.networks]
    assert (names[0], names[-1]) == ("text_encoder", "vae")
    assert set(names) <= set(get_args(ComponentName))
    assert set(names) <= set(TITLES)
    assert len(family.experts) == (1 if family.boundary_ratio is None else 2)
    for network in family.networks:
        assert keymap(network.map_name).name == network.map_name
        assert family[network.name] is network
    assert set(family.repositories) == set(family.tokenizer) == set(LAYOUTS)
    request = VideoRequest.make(family.task, "cats")
    request.check_task(family.task, 32 if family.sizes.channels == 48 else 16)
    assert request.size == family.defaults.size


def test_families_by_their_names():
    assert [family_called(task).task for task in TASKS] == [family.task for family in FAMILIES] == list(TASKS)
    with pytest.raises(OptionError) as error:
        family_called("i2v-A14B")
    assert error.value.reason == "no model is called 'i2v-A14B'"
    assert error.value.remedy == f"use {', '.join(TASKS)}"
    with pytest.raises(OptionError, match="no model is called 'cats'"):
        VideoRequest.make("cats", "cats")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("task", TASKS)
def test_the_published_files_tell_which_model_it_is(tmp_path, task, layout):
    plan = plan_synth(layout=layout, size="full", task=task)
    root = names_only(tmp_path, plan)
    assert layout_of(root) == layout
    assert is_native(root) == (layout == "native")
    family = family_of(root, layout)
    assert family is family_called(task)
    assert list(parts_of(root, layout)) == [network.name for network in family.networks]
    assert missing_files(root, layout) == []
    paths = [file.path for file in plan.files]
    assert layouts_in(paths) == (layout,)
    assert sorted(wanted_files(paths, layout)) == sorted(paths)


def test_sizes_of_a_third_model_are_the_published_ones():
    plan = plan_synth(layout="native", size="full", task=WAN_21)
    (transformer,) = (file for file in plan.weights if file.path.endswith(".safetensors"))
    assert transformer.path == "diffusion_pytorch_model.safetensors"
    assert len(transformer.tensors) == 825
    assert sum(tensor.numel for tensor in transformer.tensors) == 1_418_996_800
    shards = [file.path for file in plan_synth(layout="native", size="full", task="t2v-14B").weights]
    assert "diffusion_pytorch_model-00006-of-00006.safetensors" in shards


@pytest.mark.parametrize(
    ("names", "task"),
    [
        ([], "t2v-A14B"),
        (["Wan2.1_VAE.pth"], "t2v-A14B"),
        (["high_noise_model/config.json"], "t2v-A14B"),
        (["low_noise_model/config.json", "Wan2.1_VAE.pth", "lora.safetensors"], "t2v-A14B"),
        (["Wan2.2_VAE.pth"], "ti2v-5B"),
        (["diffusion_pytorch_model.safetensors.index.json"], "ti2v-5B"),
        (["diffusion_pytorch_model.safetensors", "Wan2.1_VAE.pth"], WAN_21),
        (["wan2.1_t2v_1.3B.safetensors", "Wan2_1_VAE_fp32.safetensors"], WAN_21),
        (["wan2.2_ti2v_5B.safetensors", "Wan2_2_VAE.safetensors"], "ti2v-5B"),
    ],
    ids=str,
)
def test_half_a_download(tmp_path, names, task):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert family_of(tmp_path, "native").task == task


@pytest.mark.parametrize(("changes", "task"), [({"in_dim": 48}, "ti2v-5B"), ({"num_layers": 40}, "t2v-14B")], ids=str)
def test_a_configuration_tells_more_than_names(tmp_path, changes, task):
    (tmp_path / "diffusion_pytorch_model.safetensors.index.json").write_bytes(b"")
    (tmp_path / "config.json").write_text(json.dumps({"in_dim": 16, "num_layers": 30} | changes))
    assert family_of(tmp_path, "native").task == task


@pytest.mark.filterwarnings("ignore:`torch_dtype` is deprecated:FutureWarning")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_third_model_starts_and_makes_the_frames_that_diffusers_makes(tiny_wan, layout):
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline

    root = tiny_wan("diffusers", WAN_21)
    vae = AutoencoderKLWan.from_pretrained(root / "vae")
    plain = WanPipeline.from_pretrained(root, vae=vae, **as_dtype(torch.bfloat16))
    plain.set_progress_bar_config(disable=True)
    plain.scheduler = UniPCMultistepScheduler.from_config(plain.scheduler.config, flow_shift=5.0)
    with wan_pipeline.WanT2V.from_checkpoint(tiny_wan(layout, WAN_21), device="cpu", preset="balanced") as pipe:
        video = pipe("cats", grid="diffusers", **SMALL)
        assert pipe.task == WAN_21
        assert pipe.report()["pipeline"]["time_to_first_step_s"] > 0
    expected = plain(
        "cats",
        negative_prompt=video.request.negative_prompt,
        width=32,
        height=32,
        num_frames=5,
        num_inference_steps=2,
        guidance_scale=5.0,
        generator=torch.Generator("cpu").manual_seed(3),
    ).frames[0]
    assert video.frames_THWC.shape == (5, 32, 32, 3)
    assert video.fps == 16
    assert np.array_equal(video.frames_THWC, expected)


def test_an_unknown_tensor_of_a_third_model_is_named(tiny_wan):
    checkpoint = wan_pipeline.open_wan(tiny_wan("native", WAN_21))
    (expert,) = checkpoint.experts
    assert expert.network.title == "transformer"
    with pytest.raises(KeyMismatchError, match="no tensor of a native dit"):
        keymap(expert.network.map_name).to_diffusers("img_emb.proj.0.weight")
