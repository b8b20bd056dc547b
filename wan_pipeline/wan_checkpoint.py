"""The facts of a WAN checkpoint: its networks with their files, names, configurations and dtypes.

Whatever it comes in leads to the same facts, under the names that diffusers' pipeline has for its networks:

    text_encoder      umT5 encoder
    transformer       the high-noise expert, or the only transformer
    transformer_2     the low-noise expert
    vae               the VAE

It comes in one of the two published layouts, in ComfyUI's folders, or as files that were named one by one, which take
the place of what a directory holds. The model, and what is particular to it, is a `ModelFamily`.

Reads headers and small JSON files only, so that whatever is wrong with a checkpoint is found in milliseconds, before
any weight is read and before torch is imported. It builds no module and loads nothing.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wan_loader import CheckpointError, MissingFileError, OptionError, open_checkpoint
from wan_loader.arguments import checked_path
from wan_loader.formats import locate
from wan_pipeline.component import Component, open_component, read_json
from wan_pipeline.families import FAMILIES
from wan_pipeline.hub.comfy_layout import comfy_family, comfy_file, comfy_root
from wan_pipeline.hub.layouts import family_of, is_native, missing_files, parts_of
from wan_pipeline.model_family import EXPERTS, ComponentName
from wan_pipeline.network_files import NetworkFiles
from wan_pipeline.prompt_tokenizer import SPIECE_FILE, TOKENIZER_FILES, SentencePiece

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from wan_loader import StrPath
    from wan_pipeline.model_family import Arrangement, Layout, ModelFamily, Network

__all__ = ["EXPERTS", "Component", "ComponentName", "WanCheckpoint", "open_wan"]

_BLOCK = re.compile(r"\bblocks\.(\d+)\.")
#: Where a tokenizer may lie beside files that have none.
_TOKENIZERS = ("google/umt5-xxl", "umt5-xxl", "tokenizer")


@dataclass(frozen=True, slots=True, repr=False)
class WanCheckpoint:
    """A complete WAN checkpoint: its networks in the order of first use, and the small things around them."""

    directory: Path
    """The directory; of files that were named one by one, that of all of them."""
    layout: Arrangement
    components: tuple[Component, ...]
    tokenizer: Path | SentencePiece
    scheduler: Mapping[str, Any]
    """The scheduler's configuration, as diffusers keeps it."""
    boundary_ratio: float | None
    """The share of the noise schedule from which on the high-noise expert runs; None where there is one expert."""
    family: ModelFamily = field(default=FAMILIES[0], kw_only=True, repr=False)
    """The model that it is."""

    def __repr__(self) -> str:
        names = ", ".join(component.name for component in self.components)
        return f"WanCheckpoint({str(self.directory)!r}, {self.task}, {self.layout} layout: {names})"

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


def open_wan(
    directory: StrPath | WanCheckpoint | None = None,
    *,
    high_noise: StrPath | None = None,
    low_noise: StrPath | None = None,
    transformer: StrPath | None = None,
    text_encoder: StrPath | None = None,
    vae: StrPath | None = None,
    tokenizer: StrPath | None = None,
) -> WanCheckpoint:
    """Read the facts of a WAN checkpoint. Reads headers only, and imports no torch.

    Args:
        directory: The directory, in the native or the diffusers layout or with ComfyUI's folders; or OWNER/NAME in the
            hub's cache. A checkpoint that was opened is returned as it is: no header is read twice. None if all
            networks are named.
        high_noise: A file in the place of the directory's high-noise expert: safetensors, GGUF or a torch file, also
            quantised ones, in native names, diffusers' or ComfyUI's; or an index or a directory.
        low_noise: The same for the low-noise expert.
        transformer: The same for the one expert of a model that has no two.
        text_encoder: The same for the text encoder.
        vae: The same for the VAE.
        tokenizer: A directory with umT5's tokenizer, OWNER/NAME in the hub's cache, or its `spiece.model`; None takes
            that of the directory, that in the text encoder's file, or one that lies beside it.

    Raises:
        MissingFileError: Files are missing; the message names all of them.
        CheckpointError: It is another model, or files are damaged, or no networks of one model.
        OptionError: It is no path, or the files can be no model together.
    """
    files = NetworkFiles(
        high_noise=high_noise,
        low_noise=low_noise,
        transformer=transformer,
        text_encoder=text_encoder,
        vae=vae,
        tokenizer=tokenizer,
    )
    if isinstance(directory, WanCheckpoint):
        if files:
            raise OptionError.because("files are named for a checkpoint that was opened", "name them when it is opened")
        return directory
    root = None if directory is None and files.networks else checked_path(directory, "directory")
    try:
        return _checked(_open(None if root is None else Path(locate(root)), files))
    except CheckpointError:
        raise
    except OSError as error:
        path = error.filename or directory or ""
        raise CheckpointError.because(f"cannot be read: {error.strerror}", path=path) from error


def _open(root: Path | None, files: NetworkFiles) -> WanCheckpoint:
    if root is None:
        return _open_files(None, files)
    if not root.is_dir():
        remedy = "name the directory of a WAN2.2 checkpoint, and a network's file with --high_noise and its like"
        raise MissingFileError.because("is no directory", remedy, path=root)
    if (root / "model_index.json").exists():
        return _open_diffusers(root, files)
    if is_native(root):
        return _open_native(root, files)
    if comfy_root(root) is not None or _names_all(files):
        return _open_files(root, files)
    usual = FAMILIES[0]
    held = ", ".join(sorted(p.name for p in root.iterdir())[:8]) or "nothing"
    raise CheckpointError.because(
        "is no WAN2.2 checkpoint: neither model_index.json (diffusers layout) nor "
        f"{usual['transformer'].native}/ and {usual['text_encoder'].native} (native layout) nor diffusion_models/ "
        f"(ComfyUI) is there; it holds {held}",
        path=root,
    )


def _open_native(root: Path, files: NetworkFiles) -> WanCheckpoint:
    family = family_of(root, "native", _families(files))
    _require(root, "native", family, files)
    parts = parts_of(root, "native", family)
    components = _components(family, files, lambda network: root / parts[network.name])
    return WanCheckpoint(
        root,
        "native",
        components,
        _tokenizer(files, components, root, root / family.tokenizer["native"]),
        family.scheduler,
        family.boundary_ratio,
        family=family,
    )


def _open_diffusers(root: Path, files: NetworkFiles) -> WanCheckpoint:
    index = read_json(root / "model_index.json")
    if (kind := index.get("_class_name")) != "WanPipeline":
        reason = f"describes a {kind!r}, not a WanPipeline: it is another model"
        raise CheckpointError.because(reason, path=root / "model_index.json")
    family = family_of(root, "diffusers", _families(files))
    _require(root, "diffusers", family, files)
    components = _components(family, files, lambda network: root / network.name)
    return WanCheckpoint(
        root,
        "diffusers",
        components,
        _tokenizer(files, components, root, root / family.tokenizer["diffusers"]),
        read_json(root / "scheduler" / "scheduler_config.json"),
        index.get("boundary_ratio"),
        family=family,
    )


def _open_files(root: Path | None, files: NetworkFiles) -> WanCheckpoint:
    """Open files that were named one by one, and what is not named out of ComfyUI's folders in `root`."""
    families, held = _families(files), None if root is None else comfy_root(root)
    family = families[0] if held is None else comfy_family(held, families, files.networks)
    if held is None and (lacking := [n for n in family.networks if files.path(n) is None]):
        flags = ", ".join(f"--{network.synth_name} FILE" for network in lacking)
        raise OptionError.because(
            f"there is no {_listed(lacking)} of {family.title}", f"give {flags} or --ckpt_dir DIR"
        )
    components = _components(family, files, lambda network: comfy_file(held or Path(), family, network))
    return WanCheckpoint(
        root or Path(os.path.commonpath([Path(c.source).absolute().parent for c in components])),
        "files" if held is None else "comfy",
        components,
        _tokenizer(files, components, held or root, None),
        family.scheduler,
        family.boundary_ratio,
        family=family,
    )


def _names_all(files: NetworkFiles) -> bool:
    return any(all(files.path(network) for network in family.networks) for family in files.families)


def _families(files: NetworkFiles) -> Sequence[ModelFamily]:
    """Return the models that may have the files that were named, the likeliest first, by what an expert is like."""
    families = files.families
    if len(families) == 1 or files.transformer is None:
        return families
    # the headers are read once more when it is opened: milliseconds, for models whose files go by the same flags
    tensors = open_checkpoint(locate(str(files.transformer))).tensors
    layers = len({found[1] for tensor in tensors if (found := _BLOCK.search(tensor.name))})
    channels = {t.shape[1] for t in tensors if t.name.endswith("patch_embedding.weight") and len(t.shape) > 1}
    return sorted(families, key=lambda f: (f.sizes.channels in channels, f.sizes.layers == layers), reverse=True)


def _components(family: ModelFamily, files: NetworkFiles, usual: Callable[[Network], Path]) -> tuple[Component, ...]:
    """Open all networks: the files that were named, and where none was, what is in the usual place."""
    named = {network.name: files.path(network) for network in family.networks}
    return tuple(
        open_component(family, network, usual(network) if (path := named[network.name]) is None else Path(locate(path)))
        for network in family.networks
    )


def _tokenizer(
    files: NetworkFiles, components: Sequence[Component], root: Path | None, usual: Path | None
) -> Path | SentencePiece:
    """Find the tokenizer: the one that was named, the usual one, that in the text encoder's file, or one beside it."""
    if files.tokenizer is not None:
        return _named_tokenizer(Path(locate(str(files.tokenizer))))
    text = next(component for component in components if component.network.kind == "text_encoder")
    if usual is not None and _is_tokenizer(usual):
        return usual
    if text.tokenizer is not None:
        return text.tokenizer
    source = Path(text.source).absolute()
    places = [*([] if root is None else [root, root.absolute().parent]), source.parent, source.parent.parent]
    found = (place / name for place in places for name in _TOKENIZERS)
    if (one := next(filter(_is_tokenizer, found), None)) is not None:
        return one
    reason = f"comes without a tokenizer: neither {text.source} holds one nor is {_TOKENIZERS[0]}/ beside it"
    repository = f"{_TOKENIZERS[0]}/ of {FAMILIES[0].repositories['native']}"
    raise MissingFileError.because(
        reason, f"download {repository}, and name it with --tokenizer DIR", path=root or source
    )


def _named_tokenizer(path: Path) -> Path | SentencePiece:
    if _is_tokenizer(path):
        return path
    model = path / SPIECE_FILE if path.is_dir() else path
    if not model.is_file():
        reason = "holds no tokenizer" if path.is_dir() else "does not exist"
        remedy = f"name a directory with {TOKENIZER_FILES[0]}, or a {SPIECE_FILE}"
        raise MissingFileError.because(reason, remedy, path=path)
    return SentencePiece(model, 0, model.stat().st_size)


def _is_tokenizer(path: Path) -> bool:
    return all((path / name).exists() for name in TOKENIZER_FILES)


def _require(root: Path, layout: Layout, family: ModelFamily, files: NetworkFiles) -> None:
    given = [network.name for network in family.networks if files.path(network) is not None]
    # a text encoder's file may hold one
    tokenizer = ["tokenizer"] if files.tokenizer is not None or files.text_encoder is not None else []
    if missing := missing_files(root, layout, family, [*given, *tokenizer]):
        reason = f"is an incomplete checkpoint ({layout} layout); missing: {', '.join(missing)}"
        raise MissingFileError.because(reason, "finish the download", path=root)


def _listed(networks: Sequence[Network]) -> str:
    return " and no ".join(network.title for network in networks)


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
    shapes, others = _shapes(high), _shapes(low)
    for name in sorted({*shapes, *others}):
        if shapes.get(name) != others.get(name):
            apart = f"{name} is {others.get(name)} in one, {shapes.get(name)} in the other"
            reason = f"is an expert of another model than {high.source}: {apart}"
            raise CheckpointError(f"{low.source} {reason}", path=low.source, tensor=name, reason=reason)


def _shapes(component: Component) -> dict[str, tuple[int, ...]]:
    """Return all shapes by the names in the module: the two may be spelled differently."""
    rename = component.key_map or (lambda name: name)
    return {rename(tensor.name) or tensor.name: tensor.shape for tensor in component.facts.tensors}
