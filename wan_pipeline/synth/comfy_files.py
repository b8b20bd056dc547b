"""The files that ComfyUI's repackaged models consist of: one a network, in the folders of its models.

    diffusion_models/wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors     native names; plain ones under a prefix
    text_encoders/umt5_xxl_fp8_e4m3fn_scaled.safetensors                  the names of transformers, and the tokenizer
    vae/wan_2.1_vae.safetensors                                           native names

In quantised files, the matrices of blocks are quantised, and everything else is as in plain ones: that is what the
published ones do, whose exact choice differs from maker to maker. Of published shapes, the shapes alone tell the
configuration of an expert; those of tiny ones do not, so their files say it in their metadata.
"""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from typing import TYPE_CHECKING

from wan_pipeline.synth.fill import fp8_scale
from wan_pipeline.synth.synth_tensors import Q8_0, SynthTensor, component_tensors, native_tensors
from wan_pipeline.synth.tokenizer import sentencepiece_model

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from wan_pipeline.synth.arch import Arch, DType, Form, SynthName

__all__ = ["PREFIX", "comfy_files"]

#: What names begin with in files that hold, or once held, more than the diffusion model.
PREFIX = "model.diffusion_model."
_FOLDERS = {"dit": "diffusion_models", "text_encoder": "text_encoders", "vae": "vae"}


def comfy_files(
    arch: Arch, form: Form, components: Sequence[SynthName], dtypes: Mapping[SynthName, DType]
) -> Iterator[tuple[str, tuple[SynthTensor, ...], tuple[tuple[str, str], ...]]]:
    """Yield the path, the tensors and the metadata of each file."""
    for component in components:
        kind, dtype = arch.network(component).kind, dtypes[component]
        tensors = component_tensors(arch, component, dtype)
        if kind != "text_encoder":
            tensors = native_tensors(arch, component, tensors)
        stem, end = arch.family.comfy[component], ".safetensors"
        if kind == "dit" and form == "gguf":
            end, tensors = "-Q8_0.gguf", tuple(map(_as_blocks, tensors))
        elif kind != "vae" and form == "fp8-scaled":
            end = f"_{'fp8_scaled' if kind == 'dit' else 'fp8_e4m3fn_scaled'}{end}"
            tensors = tuple(_scaled(arch, component, tensors))
        elif kind != "vae":
            end = f"_{dtype}{end}"
            if kind == "dit":
                tensors = tuple(replace(tensor, name=PREFIX + tensor.name) for tensor in tensors)
        if kind == "text_encoder":
            model = sentencepiece_model()
            tensors += (SynthTensor("spiece_model", (len(model),), "uint8", f"{component}.spiece_model", model),)
        says = kind == "dit" and arch.dit.head_dim != arch.family.sizes.head_dim
        config = json.dumps(arch.dit.native_config(arch.model_type)) if says else None
        yield f"{_FOLDERS[kind]}/{stem}{end}", tensors, () if config is None else (("config", config),)


def _is_quantised(tensor: SynthTensor) -> bool:
    """Return True for the matrix of a linear layer in a block."""
    is_embedding = "bias" in tensor.name or "embedding" in tensor.name
    in_block = tensor.name.startswith(("blocks.", "encoder.block."))
    return in_block and tensor.name.endswith(".weight") and len(tensor.shape) == 2 and not is_embedding


def _as_blocks(tensor: SynthTensor) -> SynthTensor:
    """Return a tensor as GGUF has it: matrices in blocks, vectors in float32 and what else there is in float16."""
    if _is_quantised(tensor) and tensor.shape[-1] % Q8_0[0] == 0:
        return replace(tensor, dtype="q8_0")
    return replace(tensor, dtype="fp32" if len(tensor.shape) < 2 else "fp16")


def _scaled(arch: Arch, component: SynthName, tensors: Sequence[SynthTensor]) -> Iterator[SynthTensor]:
    """Yield tensors with matrices in eight bits, the scale of each, and the mark of such a file."""
    scale = struct.pack("<f", fp8_scale(arch))
    for tensor in tensors:
        if not _is_quantised(tensor):
            yield tensor
            continue
        yield replace(tensor, dtype="fp8")
        name = f"{tensor.name.removesuffix('weight')}scale_weight"
        yield SynthTensor(name, (), "fp32", f"{component}.{name}", scale)
    yield SynthTensor("scaled_fp8", (2,), "fp8", f"{component}.scaled_fp8", bytes(2))
