"""Hooks that have each network of a pipeline made ready when it is about to run, and that can be taken back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from wan_pipeline.residency import ModuleResidency

__all__ = ["attach", "detach"]

_NETWORKS = ("text_encoder", "transformer", "transformer_2")
#: Where a network keeps what `attach` did to it.
_ATTACHED = "_wan_pipeline_attached"


@dataclass(frozen=True, slots=True)
class _Hook:
    """The answer to diffusers, which asks a module for it when its weights may be elsewhere."""

    execution_device: torch.device


@dataclass(slots=True)
class _Attached:
    """The changes that `attach` made to a network, to be taken back whatever others did to it since."""

    hook: _Hook
    before: Any
    """The hook of diffusers or accelerate that the network had."""
    handle: Any = None
    methods: dict[str, Any] = field(default_factory=dict)

    def detach(self, module: Any) -> None:
        """Take the changes back. What others put over them stays, and what is ours below that does nothing any more."""
        if self.handle is not None:
            self.handle.remove()
        for name, method in self.methods.items():
            # whoever has wrapped it meanwhile goes on calling it
            method.residency = None
            if module.__dict__.get(name) is method:
                delattr(module, name)
        if module.__dict__.get("_hf_hook") is self.hook:
            del module._hf_hook
            if self.before is not None:
                module._hf_hook = self.before


class _AfterReady:
    """A method of a network, called when that was made ready."""

    def __init__(self, residency: ModuleResidency, name: str, method: Any) -> None:
        self.residency: ModuleResidency | None = residency
        self._name = name
        self._method = method

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.residency is not None:
            self.residency.use(self._name)
        return self._method(*args, **kwargs)


def attach(pipe: Any, residency: ModuleResidency, device: torch.device) -> None:
    """Have each network of a pipeline made ready when it is about to run."""
    for name in (*_NETWORKS, "vae"):
        if (module := getattr(pipe, name, None)) is None:
            continue
        attached = _Attached(_Hook(device), getattr(module, "_hf_hook", None))
        module._hf_hook = attached.hook
        if name in _NETWORKS:
            attached.handle = module.register_forward_pre_hook(_ready(residency, name), with_kwargs=True)
        else:
            for method in ("encode", "decode"):
                attached.methods[method] = _AfterReady(residency, name, getattr(module, method))
                # on the object: other models of its class are not touched
                setattr(module, method, attached.methods[method])
        setattr(module, _ATTACHED, attached)


def detach(pipe: Any) -> None:
    """Undo `attach`, and nothing else: hooks that others registered stay. Does nothing where nothing is attached."""
    for name in (*_NETWORKS, "vae"):
        module = getattr(pipe, name, None)
        if (attached := getattr(module, _ATTACHED, None)) is not None:
            delattr(module, _ATTACHED)
            attached.detach(module)


def _ready(residency: ModuleResidency, name: str) -> Any:
    def hook(module: Any, args: Any, kwargs: Any) -> Any:
        residency.use(name)
        if name == "text_encoder":  # may live on the CPU, while the pipeline's tensors are on the GPU
            args = tuple(x.to(module.device) for x in args)
        return args, kwargs

    return hook
