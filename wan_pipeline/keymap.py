"""Names of tensors: those of the native checkpoint, and those of diffusers and transformers.

Every difference between the two layouts is a rename: no tensor is reshaped, transposed, split or merged. So native
bytes can go straight into the modules of diffusers, and this file is all that lies between the layouts. The tables
are one to one and read in both directions.

It knows names only: nothing of shapes, files or modules, and it imports neither torch nor diffusers.

    name         native                              module
    dit          expert shards, TI2V-5B shards       diffusers.WanTransformer3DModel
    text_encoder models_t5_umt5-xxl-enc-bf16.pth     transformers.UMT5EncoderModel
    vae2.1       Wan2.1_VAE.pth                      diffusers.AutoencoderKLWan
    vae2.2       Wan2.2_VAE.pth                      diffusers.AutoencoderKLWan(is_residual=True)

Files that others have made of these have further spellings: names of either kind under a prefix, and those that
llama.cpp's converter gives a text encoder in GGUF. `spelling` finds the one that a file has.

In the tables `@` stands for both `weight` and `bias`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from wan_loader import KeyMismatchError, OptionError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping

__all__ = [
    "KEYMAP_VERSION",
    "KeyMap",
    "MapName",
    "key_map",
    "keymap",
    "networks_of",
    "spelling",
    "to_diffusers",
    "to_native",
]

#: Part of the key of whatever is cached under mapped names; raise it with any change of a table.
KEYMAP_VERSION = 1

MapName = Literal["dit", "text_encoder", "vae2.1", "vae2.2"]

#: What all names of a network begin with in files that hold, or once held, more than it; the longest first.
_PREFIXES = ("model.diffusion_model.", "diffusion_model.")


@dataclass(frozen=True, slots=True)
class _Table:
    """One direction: `outer` holds whole names, `inner` what follows `<prefix><block number>.`."""

    prefix: str
    new_prefix: str
    outer: Mapping[str, str]
    inner: Mapping[str, str]

    def rename(self, name: str) -> str | None:
        """Return the other name of a tensor; None if the table has none."""
        if (found := self.outer.get(name)) is not None:
            return found
        number, _, rest = name.removeprefix(self.prefix).partition(".")
        if not name.startswith(self.prefix) or not _is_index(number) or rest not in self.inner:
            return None
        return f"{self.new_prefix}{number}.{self.inner[rest]}"


@dataclass(frozen=True, slots=True)
class KeyMap:
    """The names of one network in both layouts; its methods serve wherever a function `name -> name` is wanted."""

    name: MapName
    native: _Table = field(repr=False)
    diffusers: _Table = field(repr=False)
    aliases: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Further diffusers names of tied tensors, to the name under which the tensor is stored."""
    llama: _Table | None = field(default=None, repr=False)
    """From the names of llama.cpp to those of diffusers, where it knows the network."""

    def to_diffusers(self, name: str) -> str:
        """Return the diffusers (or transformers) name of a native tensor; `KeyMismatchError` if there is none."""
        return self.native.rename(name) or self._unknown(name, "native", self.diffusers)

    def to_native(self, name: str) -> str:
        """Return the native name of a diffusers (or transformers) tensor or alias; `KeyMismatchError` if none."""
        stored = self.aliases.get(name, name)
        return self.diffusers.rename(stored) or self._unknown(name, "diffusers", self.native)

    def _unknown(self, name: str, layout: str, other: _Table) -> str:
        hint = "" if other.rename(name) is None else "; it is a name of the other layout"
        reason = f"no tensor of a {layout} {self.name} is called {name!r}{hint}"
        raise KeyMismatchError(reason, tensor=name, reason=reason)


def keymap(name: MapName) -> KeyMap:
    """Return the key map of one network, which is made once."""
    if not isinstance(name, str) or name not in _BUILDERS:
        raise OptionError.because(f"no key map is called {name!r:.60}", f"use one of {', '.join(_BUILDERS)}")
    return _keymap(name)


def key_map(name: MapName) -> Callable[[str], str]:
    """Return the `key_map` with which `wan_loader.load_into` fills a module from a native file.

    Args:
        name: "dit" (all experts and transformers), "text_encoder", "vae2.1" or "vae2.2".

    Returns:
        A function from native names to those of diffusers or transformers. It raises `KeyMismatchError` for a name that
        the native checkpoint of that network does not have.

    Raises:
        OptionError: There is no such key map.
    """
    return keymap(name).to_diffusers


def to_diffusers(name: MapName, key: str) -> str:
    """Translate as `keymap(name).to_diffusers(key)` does."""
    return keymap(name).to_diffusers(key)


def to_native(name: MapName, key: str) -> str:
    """Translate as `keymap(name).to_native(key)` does."""
    return keymap(name).to_native(key)


def spelling(name: MapName, names: Collection[str]) -> Callable[[str], str] | None:
    """Find out how a file spells the names of a network: names decide, whatever the file is called.

    Args:
        name: The network's key map.
        names: All names in the file.

    Returns:
        The function from these names to those of diffusers or transformers; None where they are the same already, or
        are no names of that network.
    """
    prefix = _prefix(names)
    bare = [n.removeprefix(prefix) for n in names]
    found = keymap(name)
    for table in (found.native, found.llama):
        if table is not None and all(table.rename(n) is not None for n in bare):
            return functools.partial(_respelled, prefix, table.rename)
    return functools.partial(_respelled, prefix, _same) if prefix else None


def networks_of(names: Collection[str]) -> list[MapName]:
    """Return the key maps of the networks that tensors of all these names, in one spelling, may belong to."""
    prefix = _prefix(names)
    bare = [n.removeprefix(prefix) for n in names]
    fitting: list[MapName] = []
    for name in _BUILDERS:
        found = keymap(name)
        tables = [table for table in (found.native, found.diffusers, found.llama) if table is not None]
        if any(all(table.rename(n) is not None for n in bare) for table in tables):
            fitting.append(name)
    return fitting


def _prefix(names: Collection[str]) -> str:
    return next((p for p in _PREFIXES if names and all(n.startswith(p) for n in names)), "")


def _respelled(prefix: str, rename: Callable[[str], str | None], name: str) -> str:
    return rename(name.removeprefix(prefix)) or name


def _same(name: str) -> str:
    return name


@functools.cache
def _keymap(name: MapName) -> KeyMap:
    prefixes, outer, inner, aliases = _BUILDERS[name]()
    outer, inner = _expand(outer), _expand(inner)
    native, diffusers = prefixes
    return KeyMap(
        name,
        _Table(native, diffusers, outer, inner),
        _Table(diffusers, native, _inverse(outer), _inverse(inner)),
        aliases,
        _LLAMA.get(name),
    )


def _is_index(text: str) -> bool:
    """Return True for a decimal as PyTorch writes it in names: ASCII, no leading zero."""
    return text.isascii() and text.isdecimal() and (text == "0" or text[0] != "0")


def _expand(table: Mapping[str, str]) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for old, new in table.items():
        for leaf in ("weight", "bias") if old.endswith("@") else ("",):
            pairs[old.replace("@", leaf)] = new.replace("@", leaf)
    return pairs


def _inverse(table: Mapping[str, str]) -> dict[str, str]:
    inverse = {new: old for old, new in table.items()}
    assert len(inverse) == len(table), "a key map must be one to one"
    return inverse


_Tables = tuple[tuple[str, str], dict[str, str], dict[str, str], dict[str, str]]

_NO_BLOCKS = ("\0", "\0")  # no name begins like this


def _dit() -> _Tables:
    outer = {
        "patch_embedding.@": "patch_embedding.@",
        "text_embedding.0.@": "condition_embedder.text_embedder.linear_1.@",
        "text_embedding.2.@": "condition_embedder.text_embedder.linear_2.@",
        "time_embedding.0.@": "condition_embedder.time_embedder.linear_1.@",
        "time_embedding.2.@": "condition_embedder.time_embedder.linear_2.@",
        "time_projection.1.@": "condition_embedder.time_proj.@",
        "head.modulation": "scale_shift_table",
        "head.head.@": "proj_out.@",
    }
    inner = {
        "modulation": "scale_shift_table",
        # native counts its norms 1, 3, 2 in the order of use, diffusers 1, 2, 3; only the middle one has parameters
        "norm3.@": "norm2.@",
        "ffn.0.@": "ffn.net.0.proj.@",
        "ffn.2.@": "ffn.net.2.@",
    }
    for old, new in (("self_attn", "attn1"), ("cross_attn", "attn2")):
        inner |= {f"{old}.{x}.@": f"{new}.to_{x}.@" for x in "qkv"}
        inner |= {f"{old}.norm_{x}.weight": f"{new}.norm_{x}.weight" for x in "qk"}
        inner[f"{old}.o.@"] = f"{new}.to_out.0.@"
    return ("blocks.", "blocks."), outer, inner, {}


def _text_encoder() -> _Tables:
    outer = {"token_embedding.weight": "shared.weight", "norm.weight": "encoder.final_layer_norm.weight"}
    attention, ffn = "layer.0.SelfAttention", "layer.1.DenseReluDense"
    inner = {
        "norm1.weight": "layer.0.layer_norm.weight",
        "norm2.weight": "layer.1.layer_norm.weight",
        "pos_embedding.embedding.weight": f"{attention}.relative_attention_bias.weight",
        "ffn.gate.0.weight": f"{ffn}.wi_0.weight",
        "ffn.fc1.weight": f"{ffn}.wi_1.weight",
        "ffn.fc2.weight": f"{ffn}.wo.weight",
    } | {f"attn.{x}.weight": f"{attention}.{x}.weight" for x in "qkvo"}
    return ("blocks.", "encoder.block."), outer, inner, {"encoder.embed_tokens.weight": "shared.weight"}


def _llama_text_encoder() -> _Table:
    attention, ffn = "layer.0.SelfAttention", "layer.1.DenseReluDense"
    outer = {"token_embd.weight": "shared.weight", "enc.output_norm.weight": "encoder.final_layer_norm.weight"}
    inner = {
        "attn_norm.weight": "layer.0.layer_norm.weight",
        "ffn_norm.weight": "layer.1.layer_norm.weight",
        "attn_rel_b.weight": f"{attention}.relative_attention_bias.weight",
        "ffn_gate.weight": f"{ffn}.wi_0.weight",
        "ffn_up.weight": f"{ffn}.wi_1.weight",
        "ffn_down.weight": f"{ffn}.wo.weight",
    } | {f"attn_{x}.weight": f"{attention}.{x}.weight" for x in "qkvo"}
    return _Table("enc.blk.", "encoder.block.", outer, inner)


_RESNET = {
    "residual.0.gamma": "norm1.gamma",
    "residual.2.@": "conv1.@",
    "residual.3.gamma": "norm2.gamma",
    "residual.6.@": "conv2.@",
    "shortcut.@": "conv_shortcut.@",
}
_ATTENTION = {leaf: leaf for leaf in ("norm.gamma", "to_qkv.@", "proj.@")}
_SAMPLER = {leaf: leaf for leaf in ("resample.1.@", "time_conv.@")}
_VAE_LEVELS, _DOWN_RESNETS, _UP_RESNETS = 4, 2, 3


def _vae(levels: Iterator[tuple[str, str, dict[str, str]]]) -> _Tables:
    outer = {"conv1.@": "quant_conv.@", "conv2.@": "post_quant_conv.@"}
    for side in ("encoder", "decoder"):
        outer |= {
            f"{side}.conv1.@": f"{side}.conv_in.@",
            f"{side}.head.0.gamma": f"{side}.norm_out.gamma",
            f"{side}.head.2.@": f"{side}.conv_out.@",
        }
        middle = (("0", "resnets.0", _RESNET), ("1", "attentions.0", _ATTENTION), ("2", "resnets.1", _RESNET))
        for old, new, leaves in middle:
            outer |= {f"{side}.middle.{old}.{a}": f"{side}.mid_block.{new}.{b}" for a, b in leaves.items()}
    for old, new, leaves in levels:
        outer |= {f"{old}.{a}": f"{new}.{b}" for a, b in leaves.items()}
    return _NO_BLOCKS, outer, {}, {}


def _levels(resnets: int) -> Iterator[tuple[int, int, bool]]:
    """Yield (level, place in it, is a resnet) of one side of a VAE, in native order; the last level has no sampler."""
    for level in range(_VAE_LEVELS):
        for j in range(resnets + (level < _VAE_LEVELS - 1)):
            yield level, j, j < resnets


def _vae21_levels() -> Iterator[tuple[str, str, dict[str, str]]]:
    """Yield names of levels: native numbers all of a side in one flat list, diffusers only those of the encoder."""
    for i, (_, _, is_resnet) in enumerate(_levels(_DOWN_RESNETS)):
        yield f"encoder.downsamples.{i}", f"encoder.down_blocks.{i}", _RESNET if is_resnet else _SAMPLER
    for i, (level, j, is_resnet) in enumerate(_levels(_UP_RESNETS)):
        part = f"resnets.{j}" if is_resnet else "upsamplers.0"
        yield f"decoder.upsamples.{i}", f"decoder.up_blocks.{level}.{part}", _RESNET if is_resnet else _SAMPLER


def _vae22_levels() -> Iterator[tuple[str, str, dict[str, str]]]:
    for side, word, resnets in (("encoder", "down", _DOWN_RESNETS), ("decoder", "up", _UP_RESNETS)):
        for level, j, is_resnet in _levels(resnets):
            old = f"{side}.{word}samples.{level}.{word}samples.{j}"
            part = f"resnets.{j}" if is_resnet else f"{word}sampler"
            yield old, f"{side}.{word}_blocks.{level}.{part}", _RESNET if is_resnet else _SAMPLER


def _vae21() -> _Tables:
    return _vae(_vae21_levels())


def _vae22() -> _Tables:
    return _vae(_vae22_levels())


_BUILDERS: dict[MapName, Callable[[], _Tables]] = {
    "dit": _dit,
    "text_encoder": _text_encoder,
    "vae2.1": _vae21,
    "vae2.2": _vae22,
}
_LLAMA: dict[MapName, _Table] = {"text_encoder": _llama_text_encoder()}
