"""The names of both layouts: one to one, and the same as those of diffusers' own conversion."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import torch
from hypothesis import given
from hypothesis import strategies as st

import wan_loader
from wan_loader.errors import KeyMismatchError, OptionError
from wan_pipeline.keymap import KEYMAP_VERSION, key_map, keymap, to_diffusers, to_native
from wan_pipeline.synth.arch import ARCHS
from wan_pipeline.synth.synth_tensors import component_tensors, map_name

COUNTS = [
    ("t2v-A14B", "high_noise", 1095),
    ("t2v-A14B", "low_noise", 1095),
    ("t2v-A14B", "text_encoder", 242),
    ("t2v-A14B", "vae", 194),
    ("ti2v-5B", "transformer", 825),
    ("ti2v-5B", "text_encoder", 242),
    ("ti2v-5B", "vae", 196),
]

# read off the official modules, independently of the tables
PAIRS = [
    ("dit", "blocks.39.norm3.bias", "blocks.39.norm2.bias"),
    ("dit", "blocks.7.modulation", "blocks.7.scale_shift_table"),
    ("dit", "head.modulation", "scale_shift_table"),
    ("dit", "blocks.0.cross_attn.o.weight", "blocks.0.attn2.to_out.0.weight"),
    ("text_encoder", "token_embedding.weight", "shared.weight"),
    ("text_encoder", "blocks.23.norm2.weight", "encoder.block.23.layer.1.layer_norm.weight"),
    ("text_encoder", "blocks.3.ffn.gate.0.weight", "encoder.block.3.layer.1.DenseReluDense.wi_0.weight"),
    (
        "text_encoder",
        "blocks.0.pos_embedding.embedding.weight",
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
    ),
    ("vae2.1", "decoder.upsamples.7.time_conv.bias", "decoder.up_blocks.1.upsamplers.0.time_conv.bias"),
    ("vae2.1", "encoder.downsamples.8.resample.1.weight", "encoder.down_blocks.8.resample.1.weight"),
    (
        "vae2.2",
        "encoder.downsamples.2.downsamples.2.time_conv.weight",
        "encoder.down_blocks.2.downsampler.time_conv.weight",
    ),
    (
        "vae2.2",
        "encoder.downsamples.1.downsamples.0.shortcut.bias",
        "encoder.down_blocks.1.resnets.0.conv_shortcut.bias",
    ),
    ("vae2.2", "decoder.upsamples.0.upsamples.3.resample.1.bias", "decoder.up_blocks.0.upsampler.resample.1.bias"),
    ("vae2.2", "decoder.upsamples.3.upsamples.2.residual.6.weight", "decoder.up_blocks.3.resnets.2.conv2.weight"),
    ("vae2.2", "decoder.middle.1.to_qkv.weight", "decoder.mid_block.attentions.0.to_qkv.weight"),
]


def full_names(task: str, component: str) -> tuple[str, list[str]]:
    arch = ARCHS[task, "full"]
    return map_name(arch, component), [t.name for t in component_tensors(arch, component, "fp32")]


@pytest.mark.parametrize(("task", "component", "count"), COUNTS)
def test_one_to_one_over_all_names(task, component, count):
    name, diffusers = full_names(task, component)
    native = [to_native(name, key) for key in diffusers]
    assert len(set(diffusers)) == len(set(native)) == count
    assert [to_diffusers(name, key) for key in native] == diffusers


@pytest.mark.parametrize(
    ("task", "component", "converter"),
    [
        ("t2v-A14B", "high_noise", "convert_wan_transformer_to_diffusers"),
        ("ti2v-5B", "transformer", "convert_wan_transformer_to_diffusers"),
        ("t2v-A14B", "vae", "convert_wan_vae_to_diffusers"),
    ],
)
def test_agrees_with_diffusers(task, component, converter):
    import torch
    from diffusers.loaders import single_file_utils

    name, diffusers = full_names(task, component)
    native = {to_native(name, key): torch.tensor(i) for i, key in enumerate(diffusers)}
    converted = getattr(single_file_utils, converter)(dict(native))
    assert {key: int(value) for key, value in converted.items()} == {key: i for i, key in enumerate(diffusers)}


@pytest.mark.parametrize(("name", "native", "diffusers"), PAIRS)
def test_known_pairs(name, native, diffusers):
    assert to_diffusers(name, native) == diffusers
    assert to_native(name, diffusers) == native


def test_tied_embedding_has_two_diffusers_names():
    names = keymap("text_encoder")
    assert (
        names.to_native("encoder.embed_tokens.weight") == names.to_native("shared.weight") == "token_embedding.weight"
    )
    assert names.aliases == {"encoder.embed_tokens.weight": "shared.weight"}


@given(st.integers(0, 10**6))
def test_any_number_of_blocks(index):
    names = keymap("dit")
    assert names.to_diffusers(f"blocks.{index}.ffn.2.bias") == f"blocks.{index}.ffn.net.2.bias"
    assert names.to_native(names.to_diffusers(f"blocks.{index}.norm3.weight")) == f"blocks.{index}.norm3.weight"


@pytest.mark.parametrize(
    "name",
    [
        "",
        "blocks",
        "blocks.",
        "blocks.0",
        "blocks.0.",
        "blocks.01.norm3.weight",
        "blocks.-1.norm3.weight",
        "blocks.x.norm3.weight",
        "blocks.0.norm2.weight",
        "blocks.0.norm3.gamma",
        "blocks.0.norm3.weight.",
        "xblocks.0.norm3.weight",
        "patch_embedding",
        "patch_embedding.@",
    ],
)
def test_unknown_names_are_errors(name):
    with pytest.raises(KeyMismatchError, match="no tensor of a native dit") as error:
        to_diffusers("dit", name)
    assert error.value.tensor == name


def test_the_error_names_the_likely_mistake():
    with pytest.raises(KeyMismatchError) as mismatch:
        to_diffusers("dit", "proj_out.weight")
    assert mismatch.value.tensor == "proj_out.weight"
    assert mismatch.value.reason.endswith("; it is a name of the other layout")
    with pytest.raises(KeyMismatchError, match=r"no tensor of a diffusers vae2\.1 is called 'conv1\.weight'"):
        to_native("vae2.1", "conv1.weight")
    for name in ("vae", ["dit"]):
        with pytest.raises(OptionError) as error:
            keymap(name)
        assert error.value.reason == f"no key map is called {name!r}"
        assert error.value.remedy == "use one of dit, text_encoder, vae2.1, vae2.2"


def test_needs_nothing_heavy():
    code = "import sys, wan_pipeline.keymap as k; k.to_native('dit', 'proj_out.bias'); print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "diffusers", "transformers", "numpy", "safetensors"} & set(modules)
    assert KEYMAP_VERSION == 1


def refused(tmp_path, module, names):
    """What is said where a file has other names for the tensors of a module."""
    torch.save({names(name): tensor for name, tensor in module.state_dict().items()}, tmp_path / "x.pth")
    with pytest.raises(KeyMismatchError) as caught:
        wan_loader.load_into(module, tmp_path / "x.pth", device="cpu")
    return str(caught.value)


def test_an_error_about_names_says_which_key_map_fits(tmp_path):
    module = torch.nn.Module()
    module.proj_out = torch.nn.Linear(2, 3)
    module.scale_shift_table = torch.nn.Parameter(torch.ones(4))
    text = refused(tmp_path, module, lambda name: to_native("dit", name))
    assert 'key_map=wan_pipeline.key_map("dit")' in text
    wan_loader.load_into(module, tmp_path / "x.pth", device="cpu", key_map=key_map("dit"))
    text = refused(tmp_path, module, str.upper)
    assert "another library's names" in text
    assert "wan_pipeline" not in text
