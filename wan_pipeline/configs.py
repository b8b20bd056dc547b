"""Configurations of the networks, from a config file or from the shapes in a checkpoint, and whether the two agree.

The native layout keeps a config for the experts only, and an incomplete one; what is missing there follows from shapes.
A checkpoint that disagrees with its config, or holds another model, is found here, from headers alone.

Pure: no file is opened, and neither torch nor diffusers is imported.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from wan_loader import CheckpointError, KeyMismatchError
from wan_pipeline.keymap import keymap

if TYPE_CHECKING:
    from collections.abc import Mapping

    from wan_pipeline.model_family import Network

__all__ = [
    "check_channels",
    "check_dit",
    "dit_config",
    "dit_config_of_shapes",
    "native_shapes",
    "text_encoder_config",
    "vae_config",
]

Shapes = dict[str, tuple[int, ...]]


def native_shapes(network: Network, shapes: Mapping[str, tuple[int, ...]], where: str) -> Shapes:
    """Return the shapes under native names, whichever layout's names they have.

    Raises:
        CheckpointError: A name is of neither layout.
    """
    table = keymap(network.map_name)
    out: Shapes = {}
    for key, shape in shapes.items():
        try:
            table.to_diffusers(key)
            out[key] = shape
        except KeyMismatchError:
            try:
                out[table.to_native(key)] = shape
            except KeyMismatchError:
                reason = f"holds {key!r}, which no WAN {network.map_name} has: it is another model"
                raise CheckpointError(f"{where} {reason}", path=where, tensor=key, reason=reason) from None
    return out


def dit_config(network: Network, config: Mapping[str, Any], shapes: Shapes, where: str) -> dict[str, Any]:
    """Make diffusers' configuration of an expert, from the config file of either layout."""
    _of_class(config, ("WanModel", "WanTransformer3DModel"), where)
    # diffusers says num_attention_heads and attention_head_dim; only the native layout has their product
    if "dim" not in config:
        return {key: value for key, value in config.items() if not key.startswith("_")}
    if (kind := config.get("model_type", "t2v")) not in ("t2v", "ti2v"):
        raise _in_config(where, f"says model_type {kind!r}: only text-to-video models run here")
    try:
        head_dim, rest = divmod(config["dim"], config["num_heads"])
        found = {
            **network.config,
            "attention_head_dim": head_dim,
            "eps": config["eps"],
            "ffn_dim": config["ffn_dim"],
            "freq_dim": config["freq_dim"],
            "in_channels": config["in_dim"],
            "num_attention_heads": config["num_heads"],
            "num_layers": config["num_layers"],
            "out_channels": config["out_dim"],
            "text_dim": _shape(shapes, "text_embedding.0.weight", where)[1],
        }
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise _in_config(where, f"lacks a number: {error}") from None
    if rest:
        raise _in_config(where, f"says dim {config['dim']}, which is no multiple of its {config['num_heads']} heads")
    return found


def dit_config_of_shapes(network: Network, head_dim: int, shapes: Shapes, where: str) -> dict[str, Any]:
    """Make diffusers' configuration of an expert of which nothing but tensors is there.

    Args:
        network: The network.
        head_dim: The numbers in a head of attention: no shape tells it, and all published models have the same.
        shapes: The shapes under native names.
        where: Its place, for messages.

    Raises:
        CheckpointError: Tensors are missing, or the heads cannot be known.
    """
    dim, channels, *patch = _shape(shapes, "patch_embedding.weight", where)
    heads, rest = divmod(dim, head_dim)
    if rest:
        reason = f"is {dim} wide, which is no multiple of {head_dim}: nothing says how many heads it has"
        raise CheckpointError.because(reason, "put the config.json of its model beside it", path=where)
    blocks = {int(name.split(".")[1]) for name in shapes if name.startswith("blocks.")}
    if gaps := sorted(set(range(max(blocks, default=0))) - blocks):
        raise CheckpointError.because(f"lacks block {gaps[0]}: the wrong checkpoint, or a damaged one", path=where)
    return {
        **network.config,
        "attention_head_dim": head_dim,
        "eps": 1e-6,
        "ffn_dim": _shape(shapes, "blocks.0.ffn.0.weight", where)[0],
        "freq_dim": _shape(shapes, "time_embedding.0.weight", where)[1],
        "in_channels": channels,
        "num_attention_heads": heads,
        "num_layers": len(blocks),
        "out_channels": _shape(shapes, "head.head.weight", where)[0] // max(math.prod(patch), 1),
        "text_dim": _shape(shapes, "text_embedding.0.weight", where)[1],
    }


def check_channels(shapes: Shapes, where: str) -> None:
    """Raise `CheckpointError` for an expert that takes more than latents: one that begins with an image or a video."""
    patch = _shape(shapes, "patch_embedding.weight", where)
    takes, gives = patch[1], _shape(shapes, "head.head.weight", where)[0] // max(math.prod(patch[2:]), 1)
    if takes != gives:
        reason = f"takes {takes} channels for {gives} of a latent: it is an image-to-video or editing model"
        raise CheckpointError.because(reason, "name one that makes videos from text alone", path=where)


def check_dit(config: Mapping[str, Any], shapes: Shapes, where: str) -> None:
    """Raise `CheckpointError` if the tensors of an expert are not those that its config describes."""
    try:
        expected = _dit_shapes(config)
        layers = int(config["num_layers"])
    except (KeyError, TypeError) as error:
        raise _in_config(where, f"lacks a number: {error}") from None
    for name, shape in expected.items():
        if (found := _shape(shapes, name, where)) != shape:
            raise _disagrees(where, f"{name} is {list(found)}, {list(shape)} by the config", tensor=name)
    blocks = {int(name.split(".")[1]) for name in shapes if name.startswith("blocks.")}
    if blocks != set(range(layers)):
        raise _disagrees(where, f"{layers} blocks by the config, {len(blocks)} in the files")
    _check_complete(shapes, layers, where)


def _check_complete(shapes: Shapes, layers: int, where: str) -> None:
    """Raise unless all tensors outside of blocks are there, and every block has those of block 0 in their shapes."""
    table = keymap("dit").native
    # every block is named: a file may hold a part of one
    names = [*table.outer, *(f"blocks.{i}.{leaf}" for i in range(layers) for leaf in table.inner)]
    if missing := [name for name in names if name not in shapes]:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        reason = f"lacks {missing[0]}{more}: the wrong checkpoint, or a damaged one"
        raise CheckpointError(f"{where} {reason}", path=where, tensor=missing[0], reason=reason)
    for leaf in table.inner:
        first = shapes[f"blocks.0.{leaf}"]
        for i in range(layers):
            if (shape := shapes[f"blocks.{i}.{leaf}"]) != first:
                reason = f"has blocks.{i}.{leaf} as {list(shape)}, {list(first)} in block 0"
                raise CheckpointError(f"{where} {reason}", path=where, tensor=f"blocks.{i}.{leaf}", reason=reason)


def _dit_shapes(config: Mapping[str, Any]) -> Shapes:
    """Return the shapes of the tensors that pin every number of the config."""
    dim = config["num_attention_heads"] * config["attention_head_dim"]
    ffn, patch = config["ffn_dim"], math.prod(config["patch_size"])
    return {
        "patch_embedding.weight": (dim, config["in_channels"], *config["patch_size"]),
        "text_embedding.0.weight": (dim, config["text_dim"]),
        "time_embedding.0.weight": (dim, config["freq_dim"]),
        "head.head.weight": (config["out_channels"] * patch, dim),
        "blocks.0.ffn.0.weight": (ffn, dim),
        "blocks.0.ffn.2.weight": (dim, ffn),
        "blocks.0.self_attn.q.weight": (dim, dim),
        "blocks.0.cross_attn.k.weight": (dim, dim),
        "blocks.0.modulation": (1, 6, dim),
    }


def text_encoder_config(
    network: Network, config: Mapping[str, Any] | None, shapes: Shapes, where: str
) -> dict[str, Any]:
    """Make transformers' configuration of the text encoder; from the shapes alone if there is no file."""
    vocab, d_model = _shape(shapes, "token_embedding.weight", where)
    buckets, heads = _shape(shapes, "blocks.0.pos_embedding.embedding.weight", where)
    found = {
        "d_ff": _shape(shapes, "blocks.0.ffn.gate.0.weight", where)[0],
        "d_kv": _shape(shapes, "blocks.0.attn.q.weight", where)[0] // heads,
        "d_model": d_model,
        "num_heads": heads,
        "num_layers": len({name.split(".")[1] for name in shapes if name.startswith("blocks.")}),
        "relative_attention_num_buckets": buckets,
        "vocab_size": vocab,
    }
    if config is None:
        return {**network.config, **found}
    if config.get("model_type", "umt5") != "umt5":
        raise _in_config(where, f"describes a {config.get('model_type')!r}, not a umT5 encoder")
    for key, value in found.items():
        if config.get(key, value) != value:
            raise _disagrees(where, f"{key} is {config[key]} there, {value} by the shapes")
    return dict(config)


def vae_config(network: Network, config: Mapping[str, Any] | None, shapes: Shapes, where: str) -> dict[str, Any]:
    """Make diffusers' configuration of the VAE; from the shapes alone if there is no file."""
    base, z = _shape(shapes, "encoder.conv1.weight", where)[0], _shape(shapes, "conv2.weight", where)[0]
    if config is not None:
        _of_class(config, ("AutoencoderKLWan",), where)
        for key, value in (("base_dim", base), ("z_dim", z)):
            if config.get(key, value) != value:
                raise _disagrees(where, f"{key} is {config[key]} there, {value} by the shapes")
        return {key: value for key, value in config.items() if not key.startswith("_")}
    found = {**network.config, "base_dim": base, "z_dim": z}
    if network.config.get("is_residual"):
        # the decoder begins with four times its base: the last of dim_mult
        found["decoder_base_dim"] = _shape(shapes, "decoder.conv1.weight", where)[0] // 4
    return found


def _of_class(config: Mapping[str, Any], classes: tuple[str, ...], where: str) -> None:
    if (found := config.get("_class_name", classes[0])) not in classes:
        raise _in_config(where, f"describes a {found!r}, not a {classes[-1]}: it is another model")


def _shape(shapes: Shapes, name: str, where: str) -> tuple[int, ...]:
    if name not in shapes:
        reason = f"lacks {name}: it is another model, or a damaged file"
        raise CheckpointError(f"{where} {reason}", path=where, tensor=name, reason=reason)
    return shapes[name]


def _in_config(where: str, reason: str, *, tensor: str | None = None) -> CheckpointError:
    # a file of weights says its configuration itself
    path = where if where.lower().endswith((".safetensors", ".gguf")) else f"{where}/config.json"
    return CheckpointError(f"{path} {reason}", path=path, tensor=tensor, reason=reason)


def _disagrees(where: str, how: str, *, tensor: str | None = None) -> CheckpointError:
    return _in_config(where, f"disagrees with the weights: {how}", tensor=tensor)
