"""Has each network of a pipeline made ready when it is about to run, and takes that back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from wan_pipeline.residency import Residency

__all__ = ["attach", "detach"]


@dataclass(frozen=True, slots=True)
class _Hook:
    """What diffusers asks a module for when its weights may be elsewhere."""

    execution_device: torch.device


def attach(pipe: Any, residency: Residency, device: torch.device) -> None:
    """Have each network of a pipeline made ready when it is about to run."""
    for name in ("text_encoder", "transformer", "transformer_2"):
        if (module := getattr(pipe, name, None)) is not None:
            module._hf_hook = _Hook(device)
            module.register_forward_pre_hook(_ready(residency, name), with_kwargs=True)
    pipe.vae._hf_hook = _Hook(device)
    for name in ("encode", "decode"):
        setattr(pipe.vae, name, _after_ready(residency, getattr(pipe.vae, name)))


def detach(pipe: Any) -> None:
    """Undo `attach`: the networks are ordinary modules again."""
    for name in ("text_encoder", "transformer", "transformer_2", "vae"):
        if (module := getattr(pipe, name, None)) is not None:
            del module._hf_hook
            module._forward_pre_hooks.clear()
            module._forward_pre_hooks_with_kwargs.clear()
    del pipe.vae.encode, pipe.vae.decode


def _ready(residency: Residency, name: str) -> Any:
    def hook(module: Any, args: Any, kwargs: Any) -> Any:
        residency.use(name)
        if name == "text_encoder":  # may live on the CPU, while the pipeline's tensors are on the GPU
            args = tuple(x.to(module.device) for x in args)
        return args, kwargs

    return hook


def _after_ready(residency: Residency, method: Any) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        residency.use("vae")
        return method(*args, **kwargs)

    return call
