"""One network of a checkpoint: its file or files, the names in them, its configuration and its dtypes.

Names of tensors decide what a file holds, not what it is called; so files of either published layout, of ComfyUI and
of llama.cpp may lie in each other's places. Where nothing but tensors is there, their shapes give the configuration.

Reads headers and small JSON files only, and imports no torch.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wan_loader import CheckpointError, DtypePolicy, open_checkpoint
from wan_loader.formats import find_scales, parse_object, with_values
from wan_pipeline import configs
from wan_pipeline.keymap import networks_of, spelling
from wan_pipeline.prompt_tokenizer import SentencePiece

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from wan_loader import Checkpoint
    from wan_pipeline.keymap import MapName
    from wan_pipeline.model_family import ComponentName, ModelFamily, Network

__all__ = ["Component", "open_component", "read_json"]

_INDEX = "diffusion_pytorch_model.safetensors.index.json"
_MAX_JSON_BYTES = 10_000_000
#: ComfyUI's tensor of bytes in the file of a text encoder: the tokenizer.
_SENTENCE_PIECE = "spiece_model"
#: The key of the metadata under which a file may say its configuration.
_CONFIG_KEY = "config"
_KINDS: dict[MapName, str] = {
    "dit": "an expert (--high_noise, --low_noise, --transformer)",
    "text_encoder": "a text encoder (--text_encoder)",
    "vae2.1": "a VAE of WAN 2.1 (--vae)",
    "vae2.2": "a VAE of WAN 2.2 (--vae)",
}


@dataclass(frozen=True, slots=True)
class Component:
    """One network of a checkpoint."""

    network: Network
    """The network as its family describes it."""
    source: str
    """The path that `wan_loader` opens: a file, an index, or a directory."""
    facts: Checkpoint = field(repr=False)
    config: Mapping[str, Any] = field(repr=False)
    """Arguments of diffusers' or transformers' class."""
    key_map: Callable[[str], str | None] | None = field(default=None, repr=False)
    """Name in the file -> name in the module; None where they are the same."""
    tokenizer: SentencePiece | None = field(default=None, repr=False)
    """The tokenizer that lies in the same file."""

    @property
    def name(self) -> ComponentName:
        """The name that diffusers' pipelines give it."""
        return self.network.name

    @property
    def keep_fp32(self) -> tuple[str, ...]:
        """Parts of names of tensors that stay fp32 when it is converted."""
        return self.network.keep_fp32

    @property
    def needs_dtype(self) -> bool:
        """True if its file holds what no module computes with: blocks that stand for numbers, or eight-bit floats."""
        return bool(self.facts.quantised) or any(t.dtype.startswith("float8") for t in self.facts.tensors)

    @property
    def is_half(self) -> bool:
        """True if its file is in float16."""
        return any(tensor.dtype == "float16" for tensor in self.facts.tensors)

    def nbytes(self, dtype: str | None, *, decoder_only: bool = False) -> int:
        """Add up the bytes that it takes once it is loaded.

        Args:
            dtype: The dtype that it is loaded as, "bfloat16", "float16" or "float32"; None leaves it as in the file.
            decoder_only: Leave out the half of a VAE that only encodes.
        """
        sizes = {"bfloat16": 2, "float16": 2, "float32": 4}
        policy = DtypePolicy(dtype, self.keep_fp32)
        total = 0
        for tensor in self.facts.tensors:
            if decoder_only and self.is_encoder_only(tensor.name):
                continue
            target = policy.target(tensor.name, tensor.dtype)
            total += tensor.nbytes // sizes.get(tensor.dtype, 1) * sizes.get(target, 1)
        return total

    def is_encoder_only(self, name: str) -> bool:
        """Return True if a tensor, by its name in the file, belongs to the half of a VAE that only encodes."""
        return name.startswith(self.network.encodes_only)

    @property
    def kept_parts(self) -> list[str]:
        """The items of `keep_fp32` that names in the file have: the others are the other layout's."""
        unused = DtypePolicy(keep_fp32=self.keep_fp32).unused_parts(self.facts.names)
        return [part for part in self.keep_fp32 if part not in unused]

    @property
    def files(self) -> tuple[str, ...]:
        """Paths of all files."""
        return tuple(file.path for file in self.facts.files)


def open_component(family: ModelFamily, network: Network, path: Path) -> Component:
    """Put the facts of one network together.

    Args:
        family: The model.
        network: The network.
        path: Its file, index or directory. A configuration in the same directory counts, that beside a file only for
            an expert.

    Raises:
        CheckpointError: It is another network, or damaged, or quantised in a way that is not known.
    """
    if network.kind == "dit" and (path / _INDEX).exists():
        # the index decides, where other checkpoints lie beside it
        path /= _INDEX
    facts, tokenizer = _facts(path)
    config = _config_file(path, network)
    # where a configuration lies beside it, both are meant
    where = str(path.parent if config is not None and not path.is_dir() else path)
    _check_kind(network, facts)
    rename = spelling(network.map_name, facts.names)
    # in native names, which configurations are checked by
    shapes = configs.native_shapes(
        network, {rename(t.name) if rename else t.name: t.shape for t in facts.tensors}, where
    )
    if network.kind == "dit":
        configs.check_channels(shapes, where)
        config = config or _config_in(facts)
        if config is None:
            config = configs.dit_config_of_shapes(network, family.sizes.head_dim, shapes, str(path))
        else:
            config = configs.dit_config(network, config, shapes, where)
        configs.check_dit(config, shapes, where)
    elif network.kind == "text_encoder":
        config = configs.text_encoder_config(network, config, shapes, where)
    else:
        config = configs.vae_config(network, config, shapes, where)
    return Component(network, facts.path, facts, config, rename, tokenizer)


def read_json(path: Path) -> dict[str, Any]:
    """Read a configuration; `CheckpointError` for what is none."""
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise CheckpointError.because(f"is larger than {_MAX_JSON_BYTES} bytes: not a configuration", path=path)
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError.because(f"cannot be read: {error.strerror}", path=path) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError.because(f"is not JSON ({error}): damaged, or still being downloaded", path=path) from None
    if not isinstance(value, dict):
        raise CheckpointError.because("holds no JSON object: damaged, or another file", path=path)
    return value


def _config_file(path: Path, network: Network) -> dict[str, Any] | None:
    """Read the configuration that lies in a network's directory, or beside an expert's file; None if there is none."""
    directory = path if path.is_dir() else path.parent if network.kind == "dit" else None
    if directory is None or not (directory / "config.json").exists():
        return None
    return read_json(directory / "config.json")


def _config_in(facts: Checkpoint) -> dict[str, Any] | None:
    """Return the configuration of an expert that its file's metadata has; None if it has none."""
    try:
        value = parse_object(facts.metadata.get(_CONFIG_KEY, "").encode(), path=facts.path, what="its configuration")
    except CheckpointError:  # whatever it is, somebody else's
        return None
    return value if {"num_heads", "num_attention_heads"} & value.keys() else None


def _facts(path: Path) -> tuple[Checkpoint, SentencePiece | None]:
    """Read the headers of one network, with numbers in the place of what is quantised, and without a tokenizer.

    Raises:
        CheckpointError: Some of it is quantised in a way in which its numbers are not made: the networks multiply by no
            scales.
    """
    facts = with_values(open_checkpoint(path))
    for name, one in facts.quantised.items():
        if one.problem is not None:
            remedy = "get the published checkpoint, or one in bf16"
            message = f"{facts.path}: tensor {name!r} {one.problem}: {remedy}"
            raise CheckpointError(message, path=facts.path, tensor=name, reason=one.problem, remedy=remedy)
    tokenizer = None
    tensors = {tensor.name: tensor for tensor in facts.tensors}
    if (piece := tensors.pop(_SENTENCE_PIECE, None)) is not None and piece.dtype == "uint8":
        file, start, nbytes = facts.storages[piece.storage]
        tokenizer = SentencePiece(Path(facts.files[file].path), start, nbytes)
        facts = replace(facts, tensors=tuple(tensors.values()))
    # the first is enough
    for weight, scale in find_scales(facts.tensors).items():
        reason = f"is quantised ({weight!r} is right only with {scale!r}), which pipelines do not support"
        raise CheckpointError.because(reason, "get the published checkpoint, or one in bf16", path=facts.path)
    return facts, tokenizer


def _check_kind(network: Network, facts: Checkpoint) -> None:
    """Raise `CheckpointError` for a file that is another network of some model, by the names in it."""
    fitting = networks_of(facts.names)
    if fitting and network.map_name not in fitting:
        reason = f"is no {network.title}: by the names in it, it is {_KINDS[fitting[0]]}"
        raise CheckpointError.because(reason, f"name another file with --{network.synth_name}", path=facts.path)
