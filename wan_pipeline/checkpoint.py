"""From a directory to the parts of a WAN checkpoint: which files, which names, which configuration, which dtypes.

Both published layouts lead to the same facts, under the names that diffusers' pipeline has for its parts:

    text_encoder      umT5 encoder
    transformer       the high-noise expert (of TI2V-5B: the only transformer)
    transformer_2     the low-noise expert
    vae               the VAE

Reads headers and small JSON files only, so that whatever is wrong with a checkpoint is found in milliseconds, before
any weight is read and before torch is imported. It builds no module and loads nothing.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from wan_loader import CheckpointError, DtypePolicy, MissingFileError, open_checkpoint
from wan_loader.arguments import checked_path
from wan_loader.formats import find_scales, locate
from wan_pipeline import configs
from wan_pipeline.hub.layouts import missing_files, parts_of
from wan_pipeline.keymap import keymap

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from wan_loader import Checkpoint, StrPath
    from wan_pipeline.hub.layouts import Layout
    from wan_pipeline.keymap import MapName

__all__ = ["EXPERTS", "TITLES", "Component", "ComponentName", "WanCheckpoint", "open_wan"]

ComponentName = Literal["text_encoder", "transformer", "transformer_2", "vae"]

#: What messages call the parts.
TITLES: dict[str, str] = {
    "text_encoder": "text encoder",
    "transformer": "high-noise expert",
    "transformer_2": "low-noise expert",
    "vae": "VAE",
}
#: Parts of names that stay fp32 when an expert is converted, in either layout's words: as diffusers keeps them.
_KEEP_FP32 = ("time_embedder", "scale_shift_table", "norm2", "time_embedding", "modulation", "norm3")
#: The networks that denoise.
EXPERTS = ("transformer", "transformer_2")
_EXPERT_DIRS = {"transformer": "high_noise_model", "transformer_2": "low_noise_model"}
_TEXT_FILE = "models_t5_umt5-xxl-enc-bf16.pth"
_TOKENIZER_DIR = "google/umt5-xxl"
_VAE_FILES = ("Wan2.1_VAE.pth", "Wan2.2_VAE.pth")
_INDEX = "diffusion_pytorch_model.safetensors.index.json"
_BOUNDARY = 0.875
_MAX_JSON_BYTES = 10_000_000
#: The scheduler as both repositories publish it for diffusers.
_SCHEDULER = {
    "_class_name": "UniPCMultistepScheduler",
    "flow_shift": 3.0,
    "num_train_timesteps": 1000,
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
}


@dataclass(frozen=True, slots=True)
class Component:
    """One network of a checkpoint."""

    name: ComponentName
    source: str
    """What `wan_loader` opens: a file, an index, or a directory."""
    facts: Checkpoint = field(repr=False)
    config: Mapping[str, Any] = field(repr=False)
    """Arguments of diffusers' or transformers' class."""
    key_map: Callable[[str], str | None] | None = field(default=None, repr=False)
    """Name in the file -> name in the module; None where they are the same."""
    keep_fp32: tuple[str, ...] = ()

    def nbytes(self, dtype: str | None, *, decoder_only: bool = False) -> int:
        """Bytes once loaded as `dtype` ("bfloat16", "float32"; None: as in the file)."""
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
        """Whether a tensor, by its name in the file, belongs to the half of a VAE that only encodes."""
        return self.name == "vae" and name.startswith(("encoder.", "conv1.", "quant_conv."))

    @property
    def kept_parts(self) -> list[str]:
        """Those of `keep_fp32` that names in the file have: the others are the other layout's."""
        unused = DtypePolicy(keep_fp32=self.keep_fp32).unused_parts(self.facts.names)
        return [part for part in self.keep_fp32 if part not in unused]

    @property
    def files(self) -> tuple[str, ...]:
        """Paths of all files."""
        return tuple(file.path for file in self.facts.files)


@dataclass(frozen=True, slots=True)
class WanCheckpoint:
    """A complete WAN checkpoint: its parts in the order of first use, and the small things around them."""

    directory: Path
    layout: Literal["native", "diffusers"]
    components: tuple[Component, ...]
    tokenizer: Path
    scheduler: Mapping[str, Any]
    """diffusers' scheduler configuration."""
    boundary_ratio: float | None
    """From which share of the noise schedule on the high-noise expert runs; None where there is one expert."""

    @property
    def task(self) -> Literal["t2v-A14B", "ti2v-5B"]:
        """Which model this is."""
        return "ti2v-5B" if self.boundary_ratio is None else "t2v-A14B"

    @property
    def vae_scale(self) -> tuple[int, int]:
        """How many frames, and how many pixels in a row, one latent stands for."""
        return int(self["vae"].config.get("scale_factor_temporal", 4)), int(
            self["vae"].config.get("scale_factor_spatial", 8)
        )

    def __getitem__(self, name: str) -> Component:
        return next(c for c in self.components if c.name == name)

    @property
    def names(self) -> tuple[ComponentName, ...]:
        """Names of the parts, in the order of first use."""
        return tuple(c.name for c in self.components)


def open_wan(directory: StrPath) -> WanCheckpoint:
    """The facts of a WAN2.2 checkpoint in either layout. Reads headers only and imports no torch.

    Raises `MissingFileError` naming everything that is missing, `CheckpointError` for another model or damaged files,
    `OptionError` for what is no path.
    """
    root = Path(checked_path(directory, "directory"))
    try:
        return _open(Path(locate(str(root))))
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{error.filename or directory} cannot be read: {error.strerror}") from error


def _open(root: Path) -> WanCheckpoint:
    if not root.is_dir():
        raise MissingFileError(f"{root} is no directory: name the directory of a WAN2.2 checkpoint")
    if (root / "model_index.json").exists():
        return _open_diffusers(root)
    if any((root / name).exists() for name in (*_EXPERT_DIRS.values(), _TEXT_FILE, *_VAE_FILES)):
        return _open_native(root)
    held = ", ".join(sorted(p.name for p in root.iterdir())[:8]) or "nothing"
    raise CheckpointError(
        f"{root} is no WAN2.2 checkpoint: neither model_index.json (diffusers layout) nor high_noise_model/ and "
        f"{_TEXT_FILE} (native layout) is there; it holds {held}"
    )


def _open_native(root: Path) -> WanCheckpoint:
    _require(root, "native")
    parts = {name: root / below for name, below in parts_of(root, "native").items()}
    components = [_text_encoder(parts["text_encoder"], None, str(parts["text_encoder"]))]
    components += [_expert(name, parts[name]) for name in EXPERTS if name in parts]
    components.append(_vae(parts["vae"], None))
    boundary = _BOUNDARY if "transformer_2" in parts else None
    return _checked(WanCheckpoint(root, "native", tuple(components), root / _TOKENIZER_DIR, _SCHEDULER, boundary))


def _open_diffusers(root: Path) -> WanCheckpoint:
    index = _read_json(root / "model_index.json")
    if (kind := index.get("_class_name")) != "WanPipeline":
        raise CheckpointError(f"{root}/model_index.json describes a {kind!r}, not a WanPipeline: it is another model")
    boundary = index.get("boundary_ratio")
    experts = ["transformer"] if boundary is None else list(_EXPERT_DIRS)
    _require(root, "diffusers")
    scheduler = root / "scheduler" / "scheduler_config.json"
    text = root / "text_encoder"
    components = [_text_encoder(text, _read_json(text / "config.json"), str(text))]
    components += [_expert(name, root / name) for name in experts]
    components.append(_vae(root / "vae", _read_json(root / "vae" / "config.json")))
    return _checked(
        WanCheckpoint(root, "diffusers", tuple(components), root / "tokenizer", _read_json(scheduler), boundary)
    )


def _require(root: Path, layout: Layout) -> None:
    if missing := missing_files(root, layout):
        raise MissingFileError(
            f"{root} is an incomplete checkpoint ({layout} layout); missing: {', '.join(missing)}: finish the download"
        )


def _facts(path: Path) -> Checkpoint:
    """Of one part; `CheckpointError` for quantised ones: the networks multiply by no scales."""
    facts = open_checkpoint(path)
    for weight, scale in find_scales(facts.tensors).items():
        raise CheckpointError(
            f"{facts.path} is quantised ({weight!r} is right only with {scale!r}), which pipelines do not support: get "
            "the published checkpoint, or one in bf16"
        )
    return facts


def _expert(name: str, path: Path) -> Component:
    facts = _facts(path / _INDEX if (path / _INDEX).exists() else path)
    directory = path if path.is_dir() else path.parent
    shapes = configs.native_shapes("dit", _shapes(facts), str(directory))
    config = configs.dit_config(_read_json(directory / "config.json"), shapes, str(directory))
    configs.check_dit(config, shapes, str(directory))
    return _component(name, facts, config, "dit", keep_fp32=_KEEP_FP32)


def _text_encoder(path: Path, config: Mapping[str, Any] | None, where: str) -> Component:
    facts = _facts(path)
    shapes = configs.native_shapes("text_encoder", _shapes(facts), where)
    return _component("text_encoder", facts, configs.text_encoder_config(config, shapes, where), "text_encoder")


def _vae(path: Path, config: Mapping[str, Any] | None) -> Component:
    facts = _facts(path)
    new = bool(config.get("is_residual")) if config is not None else configs.is_vae22(_shapes(facts))
    map_name: MapName = "vae2.2" if new else "vae2.1"
    shapes = configs.native_shapes(map_name, _shapes(facts), str(path))
    return _component("vae", facts, configs.vae_config(config, shapes, str(path)), map_name)


def _component(
    name: str, facts: Checkpoint, config: Mapping[str, Any], map_name: MapName, keep_fp32: tuple[str, ...] = ()
) -> Component:
    mapped = keymap(map_name)
    native = all(mapped.native.rename(tensor.name) is not None for tensor in facts.tensors)
    key_map = partial(_rename, mapped.native.rename) if native else None
    return Component(name, facts.path, facts, config, key_map, keep_fp32)  # type: ignore[arg-type]


def _rename(table: Callable[[str], str | None], name: str) -> str:
    return table(name) or name


def _checked(checkpoint: WanCheckpoint) -> WanCheckpoint:
    """The parts must fit each other, too."""
    text, expert = checkpoint["text_encoder"], checkpoint["transformer"]
    if (wants := expert.config["text_dim"]) != (gives := text.config["d_model"]):
        raise CheckpointError(
            f"{expert.source} takes text of width {wants}, {text.source} gives {gives}: parts of different models"
        )
    if (wants := expert.config["in_channels"]) != (gives := checkpoint["vae"].config.get("z_dim", 16)):
        raise CheckpointError(
            f"{expert.source} takes {wants} latent channels, the VAE has {gives}: parts of different models"
        )
    if checkpoint.boundary_ratio is not None:
        _check_pair(expert, checkpoint["transformer_2"])
    return checkpoint


def _check_pair(high: Component, low: Component) -> None:
    shapes, others = _shapes(high.facts), _shapes(low.facts)
    for name in sorted({*shapes, *others}):
        if shapes.get(name) != others.get(name):
            raise CheckpointError(
                f"{low.source} is an expert of another model than {high.source}: {name} is {others.get(name)} in one, "
                f"{shapes.get(name)} in the other"
            )


def _shapes(facts: Checkpoint) -> dict[str, tuple[int, ...]]:
    return {tensor.name: tensor.shape for tensor in facts.tensors}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise CheckpointError(f"{path} is larger than {_MAX_JSON_BYTES} bytes: not a configuration")
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON ({error}): damaged, or still being downloaded") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds no JSON object: damaged, or another file")
    return value
