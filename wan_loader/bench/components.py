"""Loaders that make a module from a component's directory: diffusers and transformers, as their users call them."""

from __future__ import annotations

import inspect
import json
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wan_loader.bench.contract import LoadTask, NotApplicableError, Outcome
from wan_loader.dtypes import torch_dtype

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "diffusers_class",
    "flashpack_class",
    "load_diffusers",
    "load_diffusers_flashpack",
    "load_diffusers_parallel",
    "load_transformers",
    "transformers_class",
]

_MAX_CONFIG_BYTES = 1_000_000


def load_diffusers(task: LoadTask) -> Outcome:
    """Load as most users do: onto the CPU, then to the device."""
    module = diffusers_class(task).from_pretrained(task.directory, local_files_only=True, torch_dtype=_dtype(task))
    return _outcome(module.to(task.device))


def load_diffusers_parallel(task: LoadTask) -> Outcome:
    """Load straight onto the device, the files side by side: the loader's variable asks for that."""
    cls = diffusers_class(task)
    return _outcome(
        cls.from_pretrained(
            task.directory, local_files_only=True, torch_dtype=_dtype(task), device_map=_device(task.device)
        )
    )


def load_diffusers_flashpack(task: LoadTask) -> Outcome:
    """Load a packed file through diffusers; the component's config.json lies beside it."""
    directory, options = Path(task.packed).parent, {"use_flashpack": True, "device_map": _device(task.device)}
    return _outcome(
        flashpack_class(task).from_pretrained(directory, local_files_only=True, torch_dtype=_dtype(task), **options)
    )


def load_transformers(task: LoadTask) -> Outcome:
    """Load straight onto the device; transformers reads in several threads by itself."""
    cls, options = transformers_class(task), {"dtype": _dtype(task), "device_map": _device(task.device)}
    return _outcome(cls.from_pretrained(task.directory, local_files_only=True, **options))


def _outcome(module: Any) -> Outcome:
    return Outcome(dict(module.state_dict()), is_module=True, keep=module)


def _dtype(task: LoadTask) -> Any:
    return torch_dtype(task.dtype or task.file_dtype)


def _device(name: str) -> Any:
    import torch

    return torch.device(name)


def diffusers_class(task: LoadTask) -> Any:
    """Return the class of diffusers that config.json names, a model; the first call imports it.

    Raises:
        NotApplicableError: There is none.
    """
    return _model_class(task, "diffusers", "ModelMixin", lambda facts: facts.get("_class_name"))


def transformers_class(task: LoadTask) -> Any:
    """Return the class of transformers that config.json names, a model; the first call imports it.

    Raises:
        NotApplicableError: There is none.
    """
    return _model_class(task, "transformers", "PreTrainedModel", lambda facts: _first(facts.get("architectures")))


def flashpack_class(task: LoadTask) -> Any:
    """Return the class of diffusers that config.json names, if its diffusers reads packed files.

    Raises:
        NotApplicableError: There is none, or diffusers is too old.
    """
    cls = diffusers_class(task)
    if "use_flashpack" not in inspect.signature(cls.save_pretrained).parameters:
        raise NotApplicableError("needs a diffusers whose from_pretrained has use_flashpack")
    return cls


def _first(values: Any) -> Any:
    return values[0] if isinstance(values, list) and values else None


def _model_class(task: LoadTask, library: str, base: str, name_in: Callable[[dict[str, Any]], Any]) -> Any:
    """Return the model class of a library that a component's config names, of the library itself."""
    directory = Path(task.directory)
    config = directory / "config.json"
    if not directory.name or not config.is_file() or config.stat().st_size > _MAX_CONFIG_BYTES:
        raise NotApplicableError("no component directory: it has no config.json beside the weights")
    try:
        facts = json.loads(config.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        facts = None
    if not isinstance(facts, dict):
        raise NotApplicableError("config.json is not a component's")
    name = name_in(facts)
    if not isinstance(name, str):
        raise NotApplicableError(f"config.json names no class of {library}")
    try:
        module = import_module(library)
    except ImportError as error:
        raise NotApplicableError(f"{library} is not installed") from error
    cls = getattr(module, name, None)
    if not isinstance(cls, type) or not issubclass(cls, getattr(module, base)):
        raise NotApplicableError(f"{library} has no model class {name}: not its layout")
    return cls
