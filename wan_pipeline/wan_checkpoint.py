"""The facts of a WAN checkpoint: its networks with their files, names, configurations and dtypes.

Both published layouts lead to the same facts, under the names that diffusers' pipeline has for its networks:

    text_encoder      umT5 encoder
    transformer       the high-noise expert, or the only transformer
    transformer_2     the low-noise expert
    vae               the VAE

The model, and what is particular to it, is a `ModelFamily`.

Reads headers and small JSON files only, so that whatever is wrong with a checkpoint is found in milliseconds, before
any weight is read and before torch is imported. It builds no module and loads nothing.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wan_loader import CheckpointError, DtypePolicy, MissingFileError, open_checkpoint
from wan_loader.arguments import checked_path
from wan_loader.formats import find_scales, locate, with_values
from wan_pipeline import configs
from wan_pipeline.families import FAMILIES
from wan_pipeline.hub.layouts import family_of, is_native, missing_files, parts_of
from wan_pipeline.keymap import keymap
from wan_pipeline.model_family import EXPERTS, ComponentName

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from wan_loader import Checkpoint, StrPath
    from wan_pipeline.model_family import Layout, ModelFamily, Network

__all__ = ["EXPERTS", "Component", "ComponentName", "WanCheckpoint", "open_wan"]

_INDEX = "diffusion_pytorch_model.safetensors.index.json"
_MAX_JSON_BYTES = 10_000_000


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

    @property
    def name(self) -> ComponentName:
        """The name that diffusers' pipelines give it."""
        return self.network.name

    @property
    def keep_fp32(self) -> tuple[str, ...]:
        """Parts of names of tensors that stay fp32 when it is converted."""
        return self.network.keep_fp32

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


@dataclass(frozen=True, slots=True)
class WanCheckpoint:
    """A complete WAN checkpoint: its networks in the order of first use, and the small things around them."""

    directory: Path
    layout: Layout
    components: tuple[Component, ...]
    tokenizer: Path
    scheduler: Mapping[str, Any]
    """The scheduler's configuration, as diffusers keeps it."""
    boundary_ratio: float | None
    """The share of the noise schedule from which on the high-noise expert runs; None where there is one expert."""
    family: ModelFamily = field(default=FAMILIES[0], kw_only=True, repr=False)
    """The model that it is."""

    @property
    def task(self) -> str:
        """The name of the model in `--task`."""
        return self.family.task

    @property
    def experts(self) -> tuple[Component, ...]:
        """The networks that denoise, in the order in which they run."""
        return tuple(c for c in self.components if c.network.kind == "dit")

    @property
    def vae_scale(self) -> tuple[int, int]:
        """The frames, and the pixels in a row, that one latent stands for."""
        return int(self["vae"].config.get("scale_factor_temporal", 4)), int(
            self["vae"].config.get("scale_factor_spatial", 8)
        )

    def __getitem__(self, name: str) -> Component:
        return next(c for c in self.components if c.name == name)

    @property
    def names(self) -> tuple[ComponentName, ...]:
        """Names of the networks, in the order of first use."""
        return tuple(c.name for c in self.components)


def open_wan(directory: StrPath | WanCheckpoint) -> WanCheckpoint:
    """Read the facts of a WAN checkpoint in either layout. Reads headers only, and imports no torch.

    Args:
        directory: The directory, or OWNER/NAME in the hub's cache. A checkpoint that was opened is returned as it is:
            no header is read twice.

    Raises:
        MissingFileError: Files are missing; the message names all of them.
        CheckpointError: It is another model, or files are damaged.
        OptionError: It is no path.
    """
    if isinstance(directory, WanCheckpoint):
        return directory
    root = Path(checked_path(directory, "directory"))
    try:
        return _open(Path(locate(str(root))))
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError.because(f"cannot be read: {error.strerror}", path=error.filename or directory) from error


def _open(root: Path) -> WanCheckpoint:
    if not root.is_dir():
        raise MissingFileError.because("is no directory", "name the directory of a WAN2.2 checkpoint", path=root)
    if (root / "model_index.json").exists():
        return _open_diffusers(root)
    if is_native(root):
        return _open_native(root)
    usual = FAMILIES[0]
    held = ", ".join(sorted(p.name for p in root.iterdir())[:8]) or "nothing"
    raise CheckpointError.because(
        "is no WAN2.2 checkpoint: neither model_index.json (diffusers layout) nor "
        f"{usual['transformer'].native}/ and {usual['text_encoder'].native} (native layout) is there; it holds {held}",
        path=root,
    )


def _open_native(root: Path) -> WanCheckpoint:
    _require(root, "native")
    family, parts = family_of(root, "native"), parts_of(root, "native")
    return _checked(
        WanCheckpoint(
            root,
            "native",
            tuple(_component(network, root / parts[network.name], None) for network in family.networks),
            root / family.tokenizer["native"],
            family.scheduler,
            family.boundary_ratio,
            family=family,
        )
    )


def _open_diffusers(root: Path) -> WanCheckpoint:
    index = _read_json(root / "model_index.json")
    if (kind := index.get("_class_name")) != "WanPipeline":
        reason = f"describes a {kind!r}, not a WanPipeline: it is another model"
        raise CheckpointError.because(reason, path=root / "model_index.json")
    _require(root, "diffusers")
    family = family_of(root, "diffusers")
    configs = {n.name: _read_json(root / n.name / "config.json") for n in family.networks if n.kind != "dit"}
    return _checked(
        WanCheckpoint(
            root,
            "diffusers",
            tuple(_component(n, root / n.name, configs.get(n.name)) for n in family.networks),
            root / family.tokenizer["diffusers"],
            _read_json(root / "scheduler" / "scheduler_config.json"),
            index.get("boundary_ratio"),
            family=family,
        )
    )


def _require(root: Path, layout: Layout) -> None:
    if missing := missing_files(root, layout):
        reason = f"is an incomplete checkpoint ({layout} layout); missing: {', '.join(missing)}"
        raise MissingFileError.because(reason, "finish the download", path=root)


def _facts(path: Path) -> Checkpoint:
    """Read the headers of one network, with numbers in the place of what is quantised.

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
    # the first is enough
    for weight, scale in find_scales(facts.tensors).items():
        reason = f"is quantised ({weight!r} is right only with {scale!r}), which pipelines do not support"
        raise CheckpointError.because(reason, "get the published checkpoint, or one in bf16", path=facts.path)
    return facts


def _component(network: Network, path: Path, config: Mapping[str, Any] | None) -> Component:
    """Put the facts of one network together.

    Args:
        network: The network.
        path: Its file or directory.
        config: The configuration in that directory, where the layout keeps one.
    """
    if network.kind == "dit" and (path / _INDEX).exists():
        # the index decides, where other checkpoints lie beside it
        path /= _INDEX
    facts = _facts(path)
    directory = path.parent if network.kind == "dit" and not path.is_dir() else path
    shapes, where = configs.native_shapes(network, _shapes(facts), str(directory)), str(directory)
    if network.kind == "dit":
        config = configs.dit_config(network, _read_json(directory / "config.json"), shapes, where)
        configs.check_dit(config, shapes, where)
    elif network.kind == "text_encoder":
        config = configs.text_encoder_config(network, config, shapes, where)
    else:
        config = configs.vae_config(network, config, shapes, where)
    # names decide, and not the layout: files of either are saved again under names of the other
    native = keymap(network.map_name).native
    is_native = all(native.rename(tensor.name) is not None for tensor in facts.tensors)
    return Component(network, facts.path, facts, config, partial(_rename, native.rename) if is_native else None)


def _rename(table: Callable[[str], str | None], name: str) -> str:
    return table(name) or name


def _checked(checkpoint: WanCheckpoint) -> WanCheckpoint:
    """Return the checkpoint, if its networks fit each other; else raise `CheckpointError`."""
    text, expert = checkpoint["text_encoder"], checkpoint["transformer"]
    if (wants := expert.config["text_dim"]) != (gives := text.config["d_model"]):
        reason = f"takes text of width {wants}, {text.source} gives {gives}: parts of different models"
        raise CheckpointError.because(reason, path=expert.source)
    if (wants := expert.config["in_channels"]) != (gives := checkpoint["vae"].config.get("z_dim", 16)):
        reason = f"takes {wants} latent channels, the VAE has {gives}: parts of different models"
        raise CheckpointError.because(reason, path=expert.source)
    for other in checkpoint.experts[1:]:
        _check_pair(expert, other)
    return checkpoint


def _check_pair(high: Component, low: Component) -> None:
    shapes, others = _shapes(high.facts), _shapes(low.facts)
    for name in sorted({*shapes, *others}):
        if shapes.get(name) != others.get(name):
            apart = f"{name} is {others.get(name)} in one, {shapes.get(name)} in the other"
            reason = f"is an expert of another model than {high.source}: {apart}"
            raise CheckpointError(f"{low.source} {reason}", path=low.source, tensor=name, reason=reason)


def _shapes(facts: Checkpoint) -> dict[str, tuple[int, ...]]:
    return {tensor.name: tensor.shape for tensor in facts.tensors}


def _read_json(path: Path) -> dict[str, Any]:
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
