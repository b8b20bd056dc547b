"""The files that a checkpoint consists of: pure facts about both layouts, nothing is written.

The layouts are those of the published repositories; shards are filled in the order of the module up to a limit, as
the Hugging Face libraries do. In size "tiny" each sharded component has two shards.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, get_args

from wan_pipeline.model_family import ComponentName
from wan_pipeline.synth.comfy_files import comfy_files
from wan_pipeline.synth.formats import no_data, pth_stream, safetensors_stream, stream_nbytes
from wan_pipeline.synth.gguf_stream import gguf_stream
from wan_pipeline.synth.synth_tensors import component_tensors, meta_module, native_tensors
from wan_pipeline.synth.tokenizer import tokenizer_files

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from wan_pipeline.synth.arch import Arch, DType, Form, Layout, SynthName
    from wan_pipeline.synth.formats import Buffer, Data
    from wan_pipeline.synth.synth_tensors import SynthTensor

__all__ = ["SynthPlan", "TextFile", "WeightFile", "plan_files"]

_SHARD_NBYTES: dict[Layout, int] = {"native": 10_000_000_000, "diffusers": 5_000_000_000}
_TINY_SHARDS = 2
_FLOW_SHIFT = 3.0


@dataclass(frozen=True, slots=True)
class WeightFile:
    """A file of tensors: a zip checkpoint if it ends in .pth, GGUF if it ends so, safetensors otherwise."""

    path: str
    """The path relative to the checkpoint's directory."""
    tensors: tuple[SynthTensor, ...]
    metadata: tuple[tuple[str, str], ...] = ()
    """What a safetensors or GGUF file says beside its tensors."""

    def stream(self, data: Data) -> Iterator[Buffer]:
        """Yield the file's bytes in order."""
        if self.path.endswith(".pth"):
            return pth_stream(self.tensors, PurePosixPath(self.path).stem, data)
        if self.path.endswith(".gguf"):
            return gguf_stream(self.tensors, data, dict(self.metadata))
        return safetensors_stream(self.tensors, data, dict(self.metadata))

    @property
    def nbytes(self) -> int:
        """The exact length of the file."""
        return stream_nbytes(self.stream(no_data)) + sum(tensor.nbytes for tensor in self.tensors)


@dataclass(frozen=True, slots=True)
class TextFile:
    """A small file whose content is known."""

    path: str
    content: bytes

    @property
    def nbytes(self) -> int:
        """The length of the file."""
        return len(self.content)


@dataclass(frozen=True, slots=True)
class SynthPlan:
    """The plan of a checkpoint: all its files."""

    weights: tuple[WeightFile, ...]
    texts: tuple[TextFile, ...]

    @property
    def files(self) -> tuple[WeightFile | TextFile, ...]:
        """All files, the large ones first."""
        return *self.weights, *self.texts

    @property
    def nbytes(self) -> int:
        """The exact length of all files together."""
        return sum(file.nbytes for file in self.files)


def plan_files(
    arch: Arch, layout: Layout, components: Sequence[SynthName], dtypes: dict[SynthName, DType], form: Form
) -> SynthPlan:
    """Plan the files of the given components, and the small files that every checkpoint has."""
    found: tuple[WeightFile | TextFile, ...]
    if form != "published":
        found = tuple(WeightFile(*file) for file in comfy_files(arch, form, components, dtypes))
    elif layout == "native":
        found = tuple(_native(arch, components, dtypes))
    else:
        found = tuple(_diffusers(arch, components, dtypes))
    return SynthPlan(
        tuple(file for file in found if isinstance(file, WeightFile)),
        tuple(file for file in found if isinstance(file, TextFile)),
    )


def _native(
    arch: Arch, components: Sequence[SynthName], dtypes: dict[SynthName, DType]
) -> Iterator[WeightFile | TextFile]:
    for component in components:
        tensors = native_tensors(arch, component, component_tensors(arch, component, dtypes[component]))
        network = arch.network(component)
        if network.kind != "dit":
            yield WeightFile(network.native, tensors)
        else:
            prefix = f"{network.native}/" if network.native else ""
            yield TextFile(f"{prefix}config.json", _json(arch.dit.native_config(arch.model_type)))
            yield from _sharded(f"{prefix}diffusion_pytorch_model", tensors, _shard_limit(arch, "native", tensors))
    for name, content in tokenizer_files().items():
        yield TextFile(f"{arch.family.tokenizer['native']}/{name}", content)


def _diffusers(
    arch: Arch, components: Sequence[SynthName], dtypes: dict[SynthName, DType]
) -> Iterator[WeightFile | TextFile]:
    for component in components:
        folder = arch.network(component).name
        tensors = component_tensors(arch, component, dtypes[component])
        yield TextFile(f"{folder}/config.json", _module_config(arch, component).encode())
        if component == "vae":
            yield WeightFile(f"{folder}/diffusion_pytorch_model.safetensors", tensors)
        else:
            stem = "model" if component == "text_encoder" else "diffusion_pytorch_model"
            yield from _sharded(f"{folder}/{stem}", tensors, _shard_limit(arch, "diffusers", tensors))
    for name, content in tokenizer_files().items():
        yield TextFile(f"{arch.family.tokenizer['diffusers']}/{name}", content)
    yield TextFile("scheduler/scheduler_config.json", _scheduler_config().encode())
    yield TextFile("model_index.json", _json(_model_index(arch, components)))


def _sharded(stem: str, tensors: Sequence[SynthTensor], limit_nbytes: int) -> Iterator[WeightFile | TextFile]:
    """Yield shards and their index; a single file needs no index."""
    shards = _split(tensors, limit_nbytes)
    if len(shards) == 1:
        yield WeightFile(f"{stem}.safetensors", shards[0])
        return
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards, 1):
        path = f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= {tensor.name: PurePosixPath(path).name for tensor in shard}
        yield WeightFile(path, shard)
    total = sum(tensor.nbytes for tensor in tensors)
    yield TextFile(
        f"{stem}.safetensors.index.json", _json({"metadata": {"total_size": total}, "weight_map": weight_map})
    )


def _shard_limit(arch: Arch, layout: Layout, tensors: Sequence[SynthTensor]) -> int:
    if arch.size == "full":
        return _SHARD_NBYTES[layout]
    nbytes = [tensor.nbytes for tensor in tensors]
    return sum(nbytes) // _TINY_SHARDS + max(nbytes)


def _split(tensors: Sequence[SynthTensor], limit_nbytes: int) -> list[tuple[SynthTensor, ...]]:
    shards: list[list[SynthTensor]] = [[]]
    filled = 0
    for tensor in tensors:
        if shards[-1] and filled + tensor.nbytes > limit_nbytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.nbytes
    return [tuple(shard) for shard in shards]


def _module_config(arch: Arch, component: SynthName) -> str:
    if component == "text_encoder":
        config = meta_module(arch, "text_encoder").config
        config.architectures, config.dtype = ["UMT5EncoderModel"], "bfloat16"
        return str(config.to_json_string())
    return str(meta_module(arch, arch.network(component).map_name).to_json_string())


def _scheduler_config() -> str:
    import diffusers

    cls: Any = diffusers.UniPCMultistepScheduler
    scheduler = cls(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=_FLOW_SHIFT)
    return str(scheduler.to_json_string())


def _model_index(arch: Arch, components: Sequence[SynthName]) -> dict[str, Any]:
    """Return the index of the parts; those that are not written are null, which diffusers takes as "given later"."""
    import diffusers

    written = {arch.network(component).name: list(arch.network(component).module) for component in components}
    return {
        "_class_name": "WanPipeline",
        "_diffusers_version": diffusers.__version__,
        "boundary_ratio": arch.family.boundary_ratio,
        "expand_timesteps": arch.family.expand_timesteps,
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
        "tokenizer": ["transformers", "T5TokenizerFast"],
        **{name: written.get(name, [None, None]) for name in get_args(ComponentName)},
    }


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()
