"""The networks as modules: built without memory, filled from a checkpoint, emptied again.

Loading needs only torch: `fetch` loads tensors under the names of the file, so that it can begin while transformers and
diffusers are still being imported. `build` makes the real module, its weights on the meta device, which costs
milliseconds and no memory; `adopt` hands it the loaded tensors; `empty` gives the memory back and leaves the module
as it was before. Weights never change, so nothing is ever copied back to the host. `stream` fills a module whose
blocks stay in the files.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from wan_loader import DtypePolicy, bind, load, match, module_slots, stream_blocks
from wan_loader.dtypes import dtype_name, torch_dtype

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from wan_loader import CancelToken, IoMode, LoadReport, Observer, StreamedBlocks
    from wan_pipeline.memory_plan import Streaming
    from wan_pipeline.wan_checkpoint import Component

__all__ = ["adopt", "build", "check", "empty", "fetch", "nbytes", "set_dtypes", "stream"]


def build(component: Component, *, decoder_only: bool = False) -> torch.nn.Module:
    """Build the module of a component: its weights on meta, in the dtypes of its class, in eval mode.

    Args:
        component: The network.
        decoder_only: Leave out a VAE's encoder, which text-to-video never uses.
    """
    from wan_loader import empty_weights

    with empty_weights():  # the rotary tables are in no checkpoint
        module: torch.nn.Module = _made(component)
    if decoder_only and component.network.kind == "vae":
        # what is not there is neither loaded nor missed
        module.register_module("encoder", None)
        module.register_module("quant_conv", None)
    return module.eval()


def _made(component: Component) -> Any:
    config = dict(component.config)
    library, name = component.network.module
    made: Any = getattr(import_module(library), name)
    return made(made.config_class(**config)) if library == "transformers" else made(**config)


def set_dtypes(module: torch.nn.Module, component: Component, dtype: torch.dtype | None) -> None:
    """Give meta parameters the dtypes that they will have once filled, which pipelines ask for before.

    Args:
        module: What `build` made of the component.
        component: The network.
        dtype: The dtype of its weights; None leaves what is in the file.
    """
    import torch

    stored = {t.name: getattr(torch, t.dtype) for t in component.facts.tensors} if dtype is None else {}
    if component.key_map is not None:
        stored = {component.key_map(name) or name: found for name, found in stored.items()}
    policy = DtypePolicy(dtype_name(dtype), component.keep_fp32)
    for name, parameter in module.named_parameters():
        found = stored.get(name, parameter.dtype)
        parameter.data = parameter.data.to(torch_dtype(policy.target(name, str(found).removeprefix("torch."))))


def check(module: torch.nn.Module, component: Component) -> None:
    """Raise `KeyMismatchError` now if the component's names or shapes are not the module's; reads nothing."""
    match(module_slots(module), component.facts, _key_map(module, component), strict=True)


def fetch(
    component: Component,
    *,
    device: torch.device | str,
    dtype: torch.dtype | None,
    decoder_only: bool = False,
    keep: bool = False,
    io: IoMode = "auto",
    cancel: CancelToken | None = None,
    observer: Observer | None = None,
) -> tuple[dict[str, torch.Tensor], LoadReport]:
    """Load the weights under their names in the file. Imports nothing but torch.

    Args:
        component: The network.
        device: The device that they go to.
        dtype: The dtype that they get; None leaves it as in the file.
        decoder_only: Leave out a VAE's encoder.
        keep: Attach to weights that are kept, where they are; they must not be written to.
        io: The transport of bytes.
        cancel: A token that stops the load.
        observer: An observer of the load's spans.

    Returns:
        The tensors, and the report of the load.
    """
    loaded = load(
        component.facts,
        device=device,
        dtype=dtype,
        names=[t.name for t in component.facts.tensors if not (decoder_only and component.is_encoder_only(t.name))],
        keep_fp32=component.keep_fp32,
        keep=keep,
        io=io,
        cancel=cancel,
        observer=observer,
    )
    return loaded.tensors, loaded.report


def adopt(module: torch.nn.Module, component: Component, tensors: Mapping[str, torch.Tensor]) -> None:
    """Give a built (or emptied) module the tensors that `fetch` loaded; tied parameters stay tied."""
    bind(module, tensors, key_map=component.key_map)


def stream(
    module: torch.nn.Module,
    component: Component,
    streaming: Streaming,
    *,
    device: torch.device | str,
    dtype: torch.dtype | None,
    cancel: CancelToken | None = None,
    observer: Observer | None = None,
) -> StreamedBlocks:
    """Fill a built (or emptied) module, and have those of its blocks that find no room come from the files as it runs.

    Args:
        module: The module.
        component: The network.
        streaming: What may stay on the device.
        device: As for `fetch`.
        dtype: As for `fetch`.
        cancel: A token that stops the load, and later every forward.
        observer: As for `fetch`.
    """
    unused = DtypePolicy(keep_fp32=component.keep_fp32).unused_parts([name for name, _ in module.named_parameters()])
    # nobody trains what is streamed, and what asks for gradients would run under torch.no_grad() alone
    module.requires_grad_(False)
    return stream_blocks(
        module,
        component.facts,
        component.network.blocks,
        device=device,
        dtype=dtype,
        buffers=streaming.buffers,
        device_memory=streaming.device_nbytes,
        host_memory=streaming.cache_nbytes,
        key_map=component.key_map,
        # in the words of the module, which a name is looked up in here
        keep_fp32=[part for part in component.keep_fp32 if part not in unused],
        cancel=cancel,
        observer=observer,
    )


def empty(module: torch.nn.Module) -> None:
    """Give the weights' memory back; tied parameters stay tied, tables that are in no checkpoint stay."""
    import torch

    emptied: dict[int, Any] = {}
    for owner in module.modules():
        for name, parameter in owner._parameters.items():
            if parameter is not None and not parameter.is_meta:
                # by shape, as what was streamed has no values; one for all that were tied, so that they are tied again
                meta = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
                new = torch.nn.Parameter(meta, parameter.requires_grad)
                owner._parameters[name] = emptied.setdefault(id(parameter), new)
        for name, buffer in owner._buffers.items():
            if buffer is not None and name not in owner._non_persistent_buffers_set:
                owner._buffers[name] = torch.empty_like(buffer, device="meta")


def nbytes(module: torch.nn.Module) -> int:
    """Return the bytes of the weights that a module has; tied ones count once."""
    return sum(p.nbytes for p in module.parameters() if not p.is_meta)


def _key_map(module: torch.nn.Module, component: Component) -> Any:
    """Return the component's key map, without the names of the VAE's encoder where the module has none."""
    if component.network.kind != "vae" or getattr(module, "encoder", None) is not None:
        return component.key_map
    rename = component.key_map or (lambda name: name)

    def decoder_names(name: str) -> str | None:
        return None if component.is_encoder_only(name) else rename(name)

    return decoder_names
