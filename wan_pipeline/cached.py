"""A WAN checkpoint in the converted cache: one entry for the whole pipeline, in the diffusers layout.

The entry of either layout is a checkpoint directory like any other: `open_wan` opens it, and so does
`diffusers.WanPipeline.from_pretrained`. Experts have the dtype they were asked for, the text encoder and the VAE are
what they are in the source. Each network is one safetensors file, its tensors in the order of first use.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from wan_loader.cache.build import Build
from wan_loader.cache.cached_load import find_or_begin, read_parts
from wan_loader.cache.check import check_entry
from wan_loader.cache.content import LoadedTensors
from wan_loader.cache.outline import Outline, outline_file, why_source
from wan_loader.cache.store import Store
from wan_loader.errors import CacheError, CheckpointError
from wan_loader.loading.report import CacheReport
from wan_loader.plan.dtype_policy import DtypePolicy
from wan_pipeline.checkpoint import EXPERTS, open_wan

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import torch

    from wan_loader.cache.entry import Building, Entry
    from wan_loader.cache.outline import CachedFile, SourceFile
    from wan_loader.types import StrPath
    from wan_pipeline.checkpoint import Component, WanCheckpoint

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
    """What the entry of a checkpoint holds, with its experts as `dtype`. Reads the tokenizer's files (about 20 MB)."""
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
    return (3 if encoder_of_vae else 1 if number else 2), int(number[0]) if number else 0, name


def _small_files(checkpoint: WanCheckpoint) -> dict[str, bytes]:
    found = sorted(path for path in checkpoint.tokenizer.iterdir() if not path.is_dir())
    files = {f"tokenizer/{path.name}": _read_small(path) for path in found}
    for component in checkpoint.components:
        files[f"{component.name}/config.json"] = _json(_config(component))
    files["scheduler/scheduler_config.json"] = _json(checkpoint.scheduler)
    files["model_index.json"] = _json(
        {
            "_class_name": "WanPipeline",
            "boundary_ratio": checkpoint.boundary_ratio,
            "expand_timesteps": checkpoint.task == "ti2v-5B",
            "scheduler": ["diffusers", str(checkpoint.scheduler.get("_class_name", "UniPCMultistepScheduler"))],
            "tokenizer": ["transformers", "T5TokenizerFast"],
            **{name: list(found) if name in checkpoint.names else [None, None] for name, found in _CLASSES.items()},
        }
    )
    return files


def _config(component: Component) -> dict[str, Any]:
    kind = _CLASSES[component.name][1]
    if component.name == "text_encoder":
        dtype = component.facts.tensors[0].dtype
        return {**component.config, "model_type": "umt5", "architectures": [kind], "dtype": dtype}
    return {**component.config, "_class_name": kind}


def _read_small(path: Path) -> bytes:
    try:
        if path.stat().st_size > _MAX_SMALL_BYTES:
            raise CacheError(f"{path} is larger than {_MAX_SMALL_BYTES} bytes: no file of a tokenizer")
        return path.read_bytes()
    except OSError as error:
        if isinstance(error, CacheError):
            raise
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(dict(value), indent=2, sort_keys=True) + "\n").encode()


class PipelineCache:
    """The cache's part in one start: which directory is loaded, and the entry that is made of what was loaded."""

    def __init__(self, source: WanCheckpoint, dtype: str, directory: StrPath | None) -> None:
        """dtype: of the experts. Whatever is wrong with the cache, the source is loaded; `report` says why."""
        self.source = source
        self.checkpoint = source
        self.report: CacheReport
        self.build: Build | None = None
        self._entry: Entry | None = None
        self._building: Building | None = None
        self._loaded = LoadedTensors()
        self._missing = set(source.names)
        try:
            self._choose(source, dtype, directory)
        except OSError as error:  # a CacheError is one, too
            self.report = CacheReport("source", f"the cache cannot be used: {error}")

    def _choose(self, source: WanCheckpoint, dtype: str, directory: StrPath | None) -> None:
        self._outline = outline_wan(source, dtype)
        if (reason := why_source(self._outline)) is not None:
            self.report = CacheReport("source", reason)
            return
        self._sources: tuple[SourceFile, ...] = self._outline.sources
        warnings: list[str] = []
        self._entry, self._building = find_or_begin(
            Store(directory), self._outline, self._sources, self._opened, warnings.append
        )
        if self._entry is not None:
            self.report = CacheReport("hit", "the source is unchanged", str(self._entry.path))
        elif self._building is not None:
            why = "; ".join(warnings) or "no entry yet"
            self.report = CacheReport("building", f"{why}: one is written once everything was loaded")
        else:
            self.report = CacheReport("source", "; ".join([*warnings, "another process is writing the entry"]))

    def _opened(self, entry: Entry) -> Entry:
        try:
            self.checkpoint = open_wan(entry.path)
            if not entry.check_files() and (wrong := check_entry(entry.path, entry.manifest)):
                raise CacheError("; ".join(wrong))
        except BaseException:
            entry.close()
            raise
        return entry

    def note(self, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """A network was loaded: `tensors` by their names in the source. Call before anybody else has them."""
        if self._building is None or name not in self._missing:
            return
        file = next(f for f in self._outline.files if f.path.startswith(f"{name}/"))
        self._loaded.note(file, tensors)
        self._missing.discard(name)
        if not self._missing:
            self.build = Build(self._building, self._outline, self._sources, self._loaded, read_parts).start()
            self._building = None

    def close(self) -> None:
        """The entry is not read any more; one whose networks were not all loaded is not written."""
        if self._entry is not None:
            self._entry.close()
        if self._building is not None:
            self._building.abandon()
            self._building = None
