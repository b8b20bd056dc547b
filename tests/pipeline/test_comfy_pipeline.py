"""Whole runs from ComfyUI's folders and from files that are named one by one, and what is wrong with such files."""

import functools
import json
import os
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import wan_loader
import wan_pipeline
from wan_loader.errors import CheckpointError, MissingFileError, OptionError
from wan_loader.formats.gguf_types import GGUF_TYPES
from wan_pipeline.hub.comfy_layout import comfy_root
from wan_pipeline.hub.recognise import recognise
from wan_pipeline.prompt_tokenizer import SentencePiece
from wan_pipeline.synth import synth
from wan_pipeline.wan_checkpoint import open_wan

FORMS = ("comfy", "fp8-scaled", "gguf")
END = {"comfy": "_fp16.safetensors", "fp8-scaled": "_fp8_scaled.safetensors", "gguf": "-Q8_0.gguf"}
EXPERTS = ("high_noise", "low_noise")
TEXT = {form: f"text_encoders/umt5_xxl_{'fp8_e4m3fn_scaled' if '8' in form else 'fp16'}.safetensors" for form in FORMS}
VAE = "vae/wan_2.1_vae.safetensors"
PROMPT = "two cats boxing on a stage"
SMALL = {"size": (32, 32), "frame_num": 5, "steps": 3, "seed": 3, "shift": 5.0}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """form -> tiny folders of ComfyUI's; tests must not change them."""
    root = tmp_path_factory.mktemp("comfy")
    return functools.cache(lambda form: synth(root / form, form=form).directory)


@pytest.fixture
def copy(folders, tmp_path):
    """Tiny folders that a test may change."""
    return lambda form="fp8-scaled": shutil.copytree(folders(form), tmp_path / form)


def expert(form, name):
    return f"diffusion_models/wan2.2_t2v_{name}_14B{END[form]}"


def files_of(root, form):
    """All networks as arguments."""
    return {name: root / expert(form, name) for name in EXPERTS} | {
        "text_encoder": root / TEXT[form],
        "vae": root / VAE,
    }


def plain_values(path):
    """The numbers of a file, in float32: by arithmetic that owes nothing to the loader's."""
    if str(path).endswith(".gguf"):
        return q8_0_values(path)
    held = load_file(path)
    values = {}
    for name, tensor in held.items():
        if name in ("scaled_fp8", "spiece_model") or name.endswith("scale_weight"):
            continue
        scale = held.get(name.removesuffix("weight") + "scale_weight")
        values[name.removeprefix("model.diffusion_model.")] = (
            tensor.float() if scale is None else tensor.float() * scale
        )
    return values


def q8_0_values(path):
    facts = wan_loader.open_checkpoint(path)
    content = np.fromfile(path, np.uint8)
    values = {}
    for tensor in facts.tensors:
        _, start, nbytes = facts.storages[tensor.storage]
        raw = content[start : start + nbytes]
        if tensor.name not in facts.quantised:
            dtype = {"float32": np.float32, "float16": np.float16}[tensor.dtype]
            value = raw.view(dtype).astype(np.float32)
        else:
            blocks = raw.reshape(-1, 34)
            value = blocks[:, :2].copy().view(np.float16).astype(np.float32) * blocks[:, 2:].view(np.int8)
        shape = facts.quantised[tensor.name].value.shape if tensor.name in facts.quantised else tensor.shape
        values[tensor.name] = torch.from_numpy(value.reshape(shape).copy())
    return values


def plain_copy(root, form, published, target):
    """The native layout with the numbers of ComfyUI's files as plain tensors."""
    shutil.copytree(published, target, ignore=shutil.ignore_patterns("*.safetensors*", "*.pth"))
    for name in EXPERTS:
        values = plain_values(root / expert(form, name))
        save_file(values, target / f"{name}_model" / "diffusion_pytorch_model.safetensors")
    text = plain_values(root / TEXT[form])
    save_file({n: t.bfloat16() for n, t in text.items()}, target / "models_t5_umt5-xxl-enc-bf16.safetensors")
    torch.save(plain_values(root / VAE), target / "Wan2.1_VAE.pth")
    return target


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


def frames(*args, **settings):
    with wan_pipeline.WanT2V.from_checkpoint(*args, device="cpu", **settings) as pipe:
        return pipe(PROMPT, **SMALL).frames_THWC


@pytest.mark.parametrize("form", FORMS)
def test_a_video_is_that_of_the_plain_numbers(folders, tiny_wan, tmp_path, form):
    expected = frames(plain_copy(folders(form), form, tiny_wan(), tmp_path / "plain"))
    assert np.isfinite(expected).all()
    np.testing.assert_array_equal(frames(folders(form)), expected)
