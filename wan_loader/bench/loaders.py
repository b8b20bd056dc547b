"""All loaders, ours and its rivals, each called as its own documentation tells a user, with its own defaults.

Every function here runs in the process that takes one sample. `modules`, and what `prepare` imports, come before the
clock; `load` is what is timed. Nothing of a loader is imported before it is wanted, and diffusers and transformers are
only ever measured here, not used. A loader that cannot do a case raises `NotApplicableError` with the reason.
"""

from __future__ import annotations

import inspect
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from wan_loader.bench.components import (
    diffusers_class,
    flashpack_class,
    load_diffusers,
    load_diffusers_flashpack,
    load_diffusers_parallel,
    load_transformers,
    transformers_class,
)
from wan_loader.bench.contract import Loader, LoadTask, NotApplicableError, Outcome
from wan_loader.dtypes import torch_dtype
from wan_loader.errors import OptionError
from wan_loader.events import Recorder

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from wan_loader.types import IoMode

__all__ = ["LOADERS", "find_loaders"]


def find_loaders(names: Sequence[str]) -> list[Loader]:
    """Return loaders by name, each once; nothing asked for means all.

    Raises:
        OptionError: There is no loader of a name.
    """
    words = [word.strip() for name in names for word in name.split(",") if word.strip()]
    if unknown := [word for word in words if word not in LOADERS and word != "all"]:
        raise OptionError.because(f"unknown loader {unknown[0]!r}", f"use {', '.join(LOADERS)}, or all")
    if not words or "all" in words:
        return list(LOADERS.values())
    return [LOADERS[word] for word in dict.fromkeys(words)]


def _kept(pairs: Iterable[tuple[str, Any]], task: LoadTask) -> dict[str, Any]:
    """Keep all tensors, each converted on the device after its copy: the fast order, which not every user finds."""
    if task.dtype is None:
        return dict(pairs)
    dtype = torch_dtype(task.dtype)
    return {name: t.to(dtype) if t.is_floating_point() else t for name, t in pairs}


def _drained(tensors: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the items of a dict that is emptied on the way, so that what was converted can be freed."""
    while tensors:
        yield tensors.popitem()


def _ours(task: LoadTask) -> Outcome:
    from wan_loader.api import load

    files, io = list(task.files), cast("IoMode", task.io)
    # observed, since the picture shows its phases
    loaded = load(files, device=task.device, dtype=task.dtype, io=io, threads=task.threads, observer=Recorder())
    return Outcome(loaded.tensors, report=lambda: loaded.report.to_json(), spans=loaded.spans)


def _safetensors(task: LoadTask) -> Outcome:
    from safetensors.torch import load_file

    tensors: dict[str, Any] = {}
    for path in task.files:
        on_target = ((name, t.to(task.device)) for name, t in load_file(path, device="cpu").items())
        tensors |= _kept(on_target, task)
    return Outcome(tensors)


def _safetensors_cuda(task: LoadTask) -> Outcome:
    from safetensors.torch import load_file

    tensors: dict[str, Any] = {}
    for path in task.files:
        tensors |= _kept(_drained(load_file(path, device=task.device)), task)
    return Outcome(tensors)


def _safetensors_prefetch(task: LoadTask) -> Outcome:
    from safetensors import safe_open

    tensors: dict[str, Any] = {}
    for path in task.files:
        with safe_open(path, framework="pt") as opened, opened.prefetch(device=task.device) as loader:
            tensors |= _kept(iter(loader), task)
    return Outcome(tensors)


def _has_prefetch(task: LoadTask) -> None:
    import safetensors

    if not hasattr(safetensors.safe_open, "prefetch"):
        raise NotApplicableError(f"needs safetensors >= 0.9, and this is {safetensors.__version__}")


def _torch(task: LoadTask) -> Outcome:
    import torch

    tensors: dict[str, Any] = {}
    for path in task.files:
        if task.format == "safetensors":
            tensors |= _kept(_copy_into_empty(path, task.device), task)
        else:
            tensors |= _kept(_drained(dict(torch.load(path, map_location=task.device, weights_only=True))), task)
    return Outcome(tensors)


def _copy_into_empty(path: str, device: str) -> Iterator[tuple[str, Any]]:
    """Copy tensors as load_state_dict fills a module on the device from a state dict on the CPU."""
    import torch
    from safetensors import safe_open

    with safe_open(path, framework="pt", device="cpu") as opened:
        for name in opened.keys():  # noqa: SIM118 - not a dict
            source = opened.get_tensor(name)
            yield name, torch.empty_like(source, device=device).copy_(source)


def _fastsafetensors(task: LoadTask) -> Outcome:
    from fastsafetensors import fastsafe_open

    nogds = not os.path.exists("/proc/driver/nvidia-fs")  # without the driver GPUDirect Storage only falls back
    with fastsafe_open(list(task.files), framework="pt", device=task.device, nogds=nogds) as opened:
        tensors = _kept(((name, opened.get_tensor(name)) for name in opened.keys()), task)  # noqa: SIM118 - not a dict
    return Outcome(tensors, keep=opened)


def _instanttensor(task: LoadTask) -> Outcome:
    from instanttensor import safe_open

    with safe_open(list(task.files), framework="pt", device=task.device) as opened:
        return Outcome(_kept(opened.tensors(), task))


def _runai(task: LoadTask) -> Outcome:
    from runai_model_streamer import SafetensorsStreamer

    with SafetensorsStreamer() as streamer:
        streamer.stream_files(list(task.files), device=task.device)
        # before 0.17 tensors on the CPU are views of a buffer that is filled again: a user has to copy what is to stay
        owned = task.device != "cpu" or "owned" in inspect.signature(streamer.stream_files).parameters
        pairs = ((n, t if owned else t.clone()) for n, t in streamer.get_tensors())
        return Outcome(_kept(pairs, task))


def _flashpack(task: LoadTask) -> Outcome:
    from flashpack.deserialization import iterate_from_flash_tensor, read_flashpack_file

    storage, metadata = read_flashpack_file(task.packed, device=task.device)
    return Outcome(dict(iterate_from_flash_tensor(storage, metadata)), keep=storage)


def _pack(task: LoadTask) -> None:
    from flashpack import pack_to_file
    from safetensors.torch import load_file

    tensors: dict[str, Any] = {}
    for path in task.files:
        tensors |= load_file(path)
    pack_to_file(tensors, task.packed, torch_dtype(task.dtype) if task.dtype else None)
    if task.directory and (config := Path(task.directory, "config.json")).is_file():
        shutil.copyfile(config, Path(task.packed).parent / config.name)  # diffusers looks for it there


_ALL = (
    Loader(
        "ours",
        (),
        ("wan_loader.api",),
        "wan_loader.load(files, device=..., dtype=...); pages are unregistered after the clock, in the background",
        _ours,
        ("safetensors", "torch-zip", "torch-pickle"),
    ),
    Loader(
        "safetensors",
        ("safetensors",),
        ("safetensors.torch",),
        "safetensors.torch.load_file(file) on the CPU, then .to(device), then .to(dtype)",
        _safetensors,
    ),
    Loader(
        "safetensors-cuda",
        ("safetensors",),
        ("safetensors.torch",),
        "safetensors.torch.load_file(file, device='cuda'), then .to(dtype)",
        _safetensors_cuda,
        cuda_only=True,
    ),
    Loader(
        "safetensors-prefetch",
        ("safetensors",),
        ("safetensors.torch",),
        "file by file: safe_open(file, framework='pt').prefetch(device=...), all tensors kept, then .to(dtype)",
        _safetensors_prefetch,
        cuda_only=True,
        prepare=_has_prefetch,
    ),
    Loader(
        "torch",
        ("torch",),
        ("safetensors",),
        "torch.load(file, map_location=device, weights_only=True); safetensors files: each tensor of safe_open is "
        "copied into an empty one on the target, as load_state_dict does; then .to(dtype)",
        _torch,
        ("safetensors", "torch-zip", "torch-pickle"),
    ),
    Loader(
        "diffusers",
        ("diffusers",),
        ("diffusers",),
        "the component's class of diffusers: from_pretrained(directory, torch_dtype=...), then .to(device)",
        load_diffusers,
        prepare=diffusers_class,
    ),
    Loader(
        "diffusers-parallel",
        ("diffusers", "accelerate"),
        ("diffusers", "accelerate"),
        "HF_ENABLE_PARALLEL_LOADING=yes; from_pretrained(directory, torch_dtype=..., device_map=device)",
        load_diffusers_parallel,
        environment={"HF_ENABLE_PARALLEL_LOADING": "yes"},
        prepare=diffusers_class,
    ),
    Loader(
        "diffusers-flashpack",
        ("diffusers", "flashpack", "accelerate"),
        ("diffusers", "flashpack", "accelerate"),
        "from_pretrained(directory, use_flashpack=True, device_map=device) of a file packed beforehand",
        load_diffusers_flashpack,
        prepare=flashpack_class,
        convert=_pack,
        packed_name="model.flashpack",
    ),
    Loader(
        "transformers",
        ("transformers", "accelerate"),
        ("transformers", "accelerate"),
        "the component's class of transformers: from_pretrained(directory, dtype=..., device_map=device)",
        load_transformers,
        prepare=transformers_class,
    ),
    Loader(
        "fastsafetensors",
        ("fastsafetensors",),
        ("fastsafetensors",),
        "fastsafe_open(files, device=...), nogds where there is no nvidia-fs driver, then .to(dtype)",
        _fastsafetensors,
    ),
    Loader(
        "instanttensor",
        ("instanttensor",),
        ("instanttensor",),
        "instanttensor.safe_open(files, device=...), all tensors kept, then .to(dtype)",
        _instanttensor,
        cuda_only=True,
    ),
    Loader(
        "runai",
        ("runai-model-streamer",),
        ("runai_model_streamer",),
        "SafetensorsStreamer().stream_files(files, device=...), all tensors kept, then .to(dtype)",
        _runai,
    ),
    Loader(
        "flashpack",
        ("flashpack",),
        ("flashpack",),
        "read_flashpack_file(file, device=...) of a file packed beforehand, in the dtype asked for",
        _flashpack,
        convert=_pack,
        packed_name="model.flashpack",
    ),
)

LOADERS: dict[str, Loader] = {loader.name: loader for loader in _ALL}
