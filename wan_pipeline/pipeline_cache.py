"""A WAN checkpoint in the converted cache: one entry for the whole pipeline, in the diffusers layout.

The entry of either layout is a checkpoint directory like any other: `open_wan` opens it, and so does
`diffusers.WanPipeline.from_pretrained`. Experts have the dtype they were asked for, the text encoder and the VAE are
what they are in the source. Each network is one safetensors file, its tensors in the order of first use.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from wan_loader import CacheError, CheckpointError, DtypePolicy
from wan_loader.cache import CacheReport, CacheUse, Outline, check_entry, outline_file, read_segments
from wan_pipeline.prompt_tokenizer import SentencePiece
from wan_pipeline.wan_checkpoint import EXPERTS, open_wan

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import torch

    from wan_loader import StrPath
    from wan_loader.cache import CachedFile, Entry, EntryBuild
    from wan_pipeline.wan_checkpoint import Component, WanCheckpoint

__all__ = ["PipelineCache", "outline_wan"]

_CLASSES = {
    "text_encoder": ("transformers", "UMT5EncoderModel"),
    "transformer": ("diffusers", "WanTransformer3DModel"),
    "transformer_2": ("diffusers", "WanTransformer3DModel"),
    "vae": ("diffusers", "AutoencoderKLWan"),
}
#: What a network uses first, by the beginning of a tensor's name; blocks follow in their order, the rest comes last.
_FIRST = ("shared.", "patch_embedding.", "condition_embedder.", "post_quant_conv.", "decoder.conv_in.")
_NUMBER = re.compile(r"\d+")
_MAX_SMALL_BYTES = 100_000_000


def outline_wan(checkpoint: WanCheckpoint, dtype: str) -> Outline:
    """Describe the cache entry of a checkpoint, with its experts as `dtype`.

    Reads the tokenizer's files (about 20 MB) and no weight.
    """
    files = tuple(_outline_component(c, dtype if c.name in EXPERTS else None) for c in checkpoint.components)
    return Outline(str(checkpoint.directory), dtype, files, _small_files(checkpoint))


def _outline_component(component: Component, dtype: str | None) -> CachedFile:
    stem = "model" if component.name == "text_encoder" else "diffusion_pytorch_model"
    rename = component.key_map or (lambda name: name)
    names = sorted((rename(t.name) or t.name for t in component.facts.tensors), key=_first_use)
    return outline_file(
        f"{component.name}/{stem}.safetensors",
        component.facts,
        DtypePolicy(dtype, component.keep_fp32).target,
        rename=rename,
        order={name: rank for rank, name in enumerate(names)},
    )


def _first_use(name: str) -> tuple[int, int, str]:
    if name.startswith(_FIRST):
        return 0, 0, name
    number = _NUMBER.search(name)
    encoder_of_vae = name.startswith(("encoder.conv", "encoder.down", "encoder.mid", "encoder.norm", "quant_conv."))
    # text-to-video never uses the encoder: behind all that it does
    return (3 if encoder_of_vae else 1 if number else 2), int(number[0]) if number else 0, name


def _small_files(checkpoint: WanCheckpoint) -> dict[str, bytes]:
    files = {f"tokenizer/{name}": content for name, content in _tokenizer_files(checkpoint.tokenizer).items()}
    for component in checkpoint.components:
        files[f"{component.name}/config.json"] = _json(_config(component))
    files["scheduler/scheduler_config.json"] = _json(checkpoint.scheduler)
    files["model_index.json"] = _json(
        {
            "_class_name": "WanPipeline",
            "boundary_ratio": checkpoint.boundary_ratio,
            "expand_timesteps": checkpoint.family.expand_timesteps,
            "scheduler": ["diffusers", str(checkpoint.scheduler.get("_class_name", "UniPCMultistepScheduler"))],
            "tokenizer": ["transformers", "T5TokenizerFast"],
            **{name: list(found) if name in checkpoint.names else [None, None] for name, found in _CLASSES.items()},
        }
    )
    return files


def _tokenizer_files(tokenizer: Path | SentencePiece) -> dict[str, bytes]:
    if isinstance(tokenizer, SentencePiece):
        return tokenizer.files()
    return {path.name: _read_small(path) for path in sorted(tokenizer.iterdir()) if not path.is_dir()}


def _config(component: Component) -> dict[str, Any]:
    kind = _CLASSES[component.name][1]
    if component.name == "text_encoder":
        dtype = component.facts.tensors[0].dtype
        return {**component.config, "model_type": "umt5", "architectures": [kind], "dtype": dtype}
    return {**component.config, "_class_name": kind}


def _read_small(path: Path) -> bytes:
    try:
        if path.stat().st_size > _MAX_SMALL_BYTES:
            raise CacheError.because(f"is larger than {_MAX_SMALL_BYTES} bytes: no file of a tokenizer", path=path)
        return path.read_bytes()
    except OSError as error:
        # it is an OSError, too
        if isinstance(error, CacheError):
            raise
        raise CheckpointError.because(f"cannot be read: {error.strerror}", path=path) from error


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(dict(value), indent=2, sort_keys=True) + "\n").encode()


class PipelineCache:
    """The cache's part in one start: the directory that is loaded, and the entry that is made of what was loaded.

    Whatever is wrong with the cache, the source is loaded; `report` says why.

    Args:
        source: The checkpoint that was asked for.
        dtype: The dtype of the experts.
        directory: The cache's directory; None is the user's.
    """

    def __init__(self, source: WanCheckpoint, dtype: str, directory: StrPath | None) -> None:
        self.source = source
        self.checkpoint = source
        outline = outline_wan(source, dtype)
        self._left_out: CacheReport | None = None
        self._files = {file.path.partition("/")[0]: file.path for file in outline.files}
        self._use = CacheUse(outline, directory, read_segments)
        if (entry := self._use.entry) is not None:
            try:
                self.checkpoint = _opened(entry)
                self._use.accept()
            except (CacheError, CheckpointError) as error:
                self._use.set_aside(error)
            except BaseException:
                self._use.close()
                raise

    @property
    def report(self) -> CacheReport:
        """The cache's part in the start: state, reason, entry."""
        return self._left_out or self._use.report

    @property
    def build(self) -> EntryBuild | None:
        """The entry that is being written from what was loaded; None if there is none (yet)."""
        return self._use.build

    def leave_out(self) -> None:
        """Make no entry of this start, whose networks are streamed: they are never in memory as a whole."""
        if self._use.entry is None:
            self._use.close()
            reason = "networks are streamed, which leaves no entry: `wan-loader cache build` makes one"
            self._left_out = CacheReport("source", reason)

    def note(self, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take note of a network that was loaded. Call it before anybody else has the tensors, who may change them.

        Args:
            name: The network.
            tensors: Its tensors by their names in the source.
        """
        self._use.note(self._files[name], tensors)

    def close(self) -> None:
        """Read the entry no more, and give up one that was begun if not all of its networks were loaded."""
        self._use.close()


def _opened(entry: Entry) -> WanCheckpoint:
    checkpoint = open_wan(entry.path)
    # checksums only where a file was touched in a way that times do not show: reading all takes as long as a load
    if not entry.check_files() and (wrong := check_entry(entry.path, entry.manifest)):
        raise CacheError("; ".join(wrong))
    return checkpoint
