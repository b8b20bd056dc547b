"""The networks as modules: built without memory, filled from a checkpoint, emptied again.

`build` makes diffusers' or transformers' module on the meta device, which costs milliseconds and no memory; `fill`
binds the weights; `empty` gives the memory back and leaves the module as `build` made it, ready to be filled again.
Weights never change, so nothing is ever copied back to the host.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from wan_loader import load_into
from wan_loader.loader.binding import match

if TYPE_CHECKING:
    import torch

    from wan_loader.events import Observer
    from wan_loader.report import LoadReport
    from wan_pipeline.checkpoint import Component

__all__ = ["build", "check", "empty", "fill"]


def build(component: Component, dtype: torch.dtype | None, *, decoder_only: bool = False) -> torch.nn.Module:
    """The module of a component on the meta device, in the dtypes that it will have once filled, in eval mode.

    dtype: None leaves what is in the file. decoder_only: a VAE without its encoder, which text-to-video never uses.
    """
    import torch

    with torch.device("meta"):
        module = _construct(component)
    if decoder_only and component.name == "vae":
        module.encoder = module.quant_conv = None
    if component.name in ("transformer", "transformer_2"):
        module.rope = _rope(module)
    _set_dtypes(module, component, dtype)
    return module.eval()


def _construct(component: Component) -> Any:
    config = dict(component.config)
    if component.name == "text_encoder":
        from transformers import UMT5Config, UMT5EncoderModel
        from transformers.initialization import no_init_weights

        with no_init_weights():
            encoder = UMT5EncoderModel(UMT5Config(**config))
        encoder.tie_weights()
        return encoder
    from diffusers import AutoencoderKLWan, WanTransformer3DModel

    return (AutoencoderKLWan if component.name == "vae" else WanTransformer3DModel)(**config)


def _rope(module: Any) -> torch.nn.Module:
    """The rotary tables, which are in no checkpoint: computed on the CPU, as an ordinary construction does."""
    import torch

    old = module.rope
    with torch.device("cpu"):
        rope: torch.nn.Module = type(old)(old.attention_head_dim, old.patch_size, old.max_seq_len)
    return rope


def _set_dtypes(module: torch.nn.Module, component: Component, dtype: torch.dtype | None) -> None:
    """Give meta parameters their final dtypes: pipelines ask for a module's dtype before it is filled."""
    import torch

    stored = {t.name: getattr(torch, t.dtype) for t in component.facts.tensors} if dtype is None else {}
    if component.key_map is not None:
        stored = {component.key_map(name): found for name, found in stored.items()}
    for name, parameter in module.named_parameters():
        kept = any(f".{part}." in f".{name}." for part in component.keep_fp32)
        wanted = stored.get(name, parameter.dtype) if dtype is None else torch.float32 if kept else dtype
        parameter.data = parameter.data.to(wanted)


def check(module: torch.nn.Module, component: Component) -> None:
    """Raise `KeyMismatchError` now if the component's names or shapes are not the module's; reads nothing."""
    match(module, component.facts, _key_map(module, component), strict=True)


def fill(
    module: torch.nn.Module,
    component: Component,
    *,
    device: torch.device | str,
    dtype: torch.dtype | None,
    observer: Observer | None = None,
) -> LoadReport:
    """Load the weights into a module that `build` or `empty` made, in place."""
    report = load_into(
        module,
        component.source,
        device=device,
        dtype=dtype,
        key_map=_key_map(module, component),
        keep_fp32=component.keep_fp32,
        observer=observer,
    )
    for owner in module.modules():
        for name in owner._non_persistent_buffers_set:
            if (buffer := owner._buffers[name]) is not None:
                owner._buffers[name] = buffer.to(device)
    return report


def empty(module: torch.nn.Module) -> None:
    """Give the weights' memory back; tied parameters stay tied, tables that are in no checkpoint stay."""
    import torch

    emptied: dict[int, Any] = {}
    for owner in module.modules():
        for name, parameter in owner._parameters.items():
            if parameter is not None and not parameter.is_meta:
                new = torch.nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
                owner._parameters[name] = emptied.setdefault(id(parameter), new)
        for name, buffer in owner._buffers.items():
            if buffer is not None and name not in owner._non_persistent_buffers_set:
                owner._buffers[name] = torch.empty_like(buffer, device="meta")


def _key_map(module: torch.nn.Module, component: Component) -> Any:
    """The component's names, without those of the VAE's encoder where the module has none."""
    if component.name != "vae" or getattr(module, "encoder", None) is not None:
        return component.key_map
    rename = component.key_map or (lambda name: name)

    def decoder_names(name: str) -> str | None:
        renamed = rename(name)
        return None if renamed is None or renamed.startswith(("encoder.", "quant_conv.")) else renamed

    return decoder_names
