"""What tiny folders of ComfyUI's hold: the files' names, and their numbers by arithmetic that is not the loader's."""

import shutil

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from wan_loader import open_checkpoint

FORMS = ("comfy", "fp8-scaled", "gguf")
EXPERTS = ("high_noise", "low_noise")
_END = {"comfy": "_fp16.safetensors", "fp8-scaled": "_fp8_scaled.safetensors", "gguf": "-Q8_0.gguf"}


def expert(form, name):
    return f"diffusion_models/wan2.2_t2v_{name}_14B{_END[form]}"


def files(root, form):
    """All networks by the names of arguments."""
    end = "fp8_e4m3fn_scaled" if form == "fp8-scaled" else "fp16"
    return {name: root / expert(form, name) for name in EXPERTS} | {
        "text_encoder": root / f"text_encoders/umt5_xxl_{end}.safetensors",
        "vae": root / "vae/wan_2.1_vae.safetensors",
    }


def plain_values(path):
    """The numbers of a file in float32, under bare names."""
    if path.suffix == ".gguf":
        return _q8_0_values(path)
    held, values = load_file(path), {}
    for name, tensor in held.items():
        if name in ("scaled_fp8", "spiece_model") or name.endswith("scale_weight"):
            continue
        scale = held.get(name.removesuffix("weight") + "scale_weight")
        value = tensor.float() if scale is None else tensor.float() * scale
        values[name.removeprefix("model.diffusion_model.")] = value
    return values


def _q8_0_values(path):
    facts, content, values = open_checkpoint(path), np.fromfile(path, np.uint8), {}
    for tensor in facts.tensors:
        _, start, nbytes = facts.storages[tensor.storage]
        raw, shape = content[start : start + nbytes], tensor.shape
        if tensor.name in facts.quantised:
            blocks, shape = raw.reshape(-1, 34), facts.quantised[tensor.name].value.shape
            value = blocks[:, :2].copy().view(np.float16).astype(np.float32) * blocks[:, 2:].view(np.int8)
        else:
            value = raw.view({"float32": np.float32, "float16": np.float16}[tensor.dtype]).astype(np.float32)
        values[tensor.name] = torch.from_numpy(value.reshape(shape).copy())
    return values


def plain_copy(named, published, target):
    """The native layout with the numbers of ComfyUI's files as plain tensors."""
    shutil.copytree(published, target, ignore=shutil.ignore_patterns("*.safetensors*", "*.pth"))
    for name in EXPERTS:
        save_file(plain_values(named[name]), target / f"{name}_model" / "diffusion_pytorch_model.safetensors")
    text = {name: tensor.bfloat16() for name, tensor in plain_values(named["text_encoder"]).items()}
    save_file(text, target / "models_t5_umt5-xxl-enc-bf16.safetensors")
    torch.save(plain_values(named["vae"]), target / "Wan2.1_VAE.pth")
    return target


def rewrite(path, edit):
    """Write a safetensors file again after `edit` has changed its tensors; its metadata stays."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    edit(tensors)
    path.unlink()
    save_file(tensors, path, metadata=metadata)
