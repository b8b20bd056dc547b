"""The choice of a preset: the sizes of the networks and of their work, against what the device and the host allow."""

from __future__ import annotations

from typing import TYPE_CHECKING

from wan_loader.distributed import world_size
from wan_loader.system import available_memory, memory_limit
from wan_pipeline import presets

if TYPE_CHECKING:
    import torch

    from wan_pipeline.presets import Limits, Preset, ResidencyStep
    from wan_pipeline.start_options import StartOptions
    from wan_pipeline.wan_checkpoint import Component, WanCheckpoint

__all__ = ["choose_preset", "network_dtype"]

#: Host memory of a load to a GPU: its pinned ring.
_PINNED_RING_BYTES = 512 << 20
#: Of a divided network, what FSDP2 gathers at a time: two blocks; of the text encoder the embedding, too.
_GATHERED = (1 / 20, 1 / 4)


def network_dtype(component: Component, preset: Preset, options: StartOptions) -> torch.dtype | None:
    """Return the dtype of a network once it is loaded; None leaves it as in the file."""
    from wan_loader.dtypes import dtype_name, torch_dtype

    if options.like_diffusers:
        wanted = options.dtype or (None if component.network.kind == "text_encoder" else "fp32")
    else:
        wanted = {"vae": preset.vae_dtype, "text_encoder": None, "dit": preset.dtype}[component.network.kind]
    # the dtype that it was published in; float16 is too small for what umT5 computes
    if wanted is None and (component.needs_dtype or (component.is_half and not options.like_diffusers)):
        wanted = "bf16"
    name = dtype_name(wanted)
    return None if name is None else torch_dtype(name)


def choose_preset(
    checkpoint: WanCheckpoint, options: StartOptions, device: torch.device
) -> tuple[Preset, str, tuple[ResidencyStep, ...]]:
    """Find the preset that is asked for, or the fastest that fits.

    Returns:
        The preset, one sentence on why, with the numbers, and the steps that it then has.

    Raises:
        DeviceMemoryError: It does not fit on the device.
        HostMemoryError: It does not fit into host memory.
        OptionError: There is no such preset.
    """
    # several processes load together: no network gives way on one of them
    limits = _limits(checkpoint, device, may_drop=not options.like_diffusers and world_size() == 1)
    wanted = "multi-gpu" if options.preset == "auto" and world_size() > 1 else options.preset
    adapt = {"t5_cpu": options.t5_cpu, "offload_model": options.offload_model, "dtype": options.dtype}
    # for the dtypes, which are the same in all presets: `auto` is decided below, from the sizes that they give
    some = presets.load_preset("fastest" if wanted == "auto" else wanted).adapted(**adapt)  # type: ignore[arg-type]
    sizes: dict[str, int] = {}
    gathered: dict[str, int] = {}
    for component in checkpoint.components:
        dtype = network_dtype(component, some, options)
        name = None if dtype is None else str(dtype).removeprefix("torch.")
        nbytes = component.nbytes(name, decoder_only=not options.like_diffusers)
        sizes[component.name] = nbytes // (world_size() if options.degrees.shards(component.name) else 1)
        gathered[component.name] = int(nbytes * _GATHERED[component.network.kind == "text_encoder"])
    workspace = _workspace(checkpoint, options)
    for name, extra in gathered.items():
        workspace[name] += extra if options.degrees.shards(name) else 0
    host_nbytes = _PINNED_RING_BYTES if device.type == "cuda" else 0
    if wanted == "auto":
        preset, reason = presets.choose(sizes, workspace, host_nbytes, limits, **adapt)  # type: ignore[arg-type]
    else:
        preset, reason = some, presets.check_fit(some, sizes, workspace, host_nbytes, limits)
    return preset, reason, presets.fitted_steps(preset, sizes, workspace, limits)


def _limits(checkpoint: WanCheckpoint, device: torch.device, *, may_drop: bool) -> Limits:
    import torch

    free = None
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    host = available_memory()
    host = memory_limit() if host is None else host
    titles: dict[str, str] = {c.name: c.network.title for c in checkpoint.components}
    return presets.Limits(device=str(device), titles=titles, device_nbytes=free, host_nbytes=host, may_drop=may_drop)


def _workspace(checkpoint: WanCheckpoint, options: StartOptions) -> dict[str, int]:
    """Estimate the bytes that running each network takes beside the weights, on the safe side.

    From the tensors that are alive at the peak, by tracing each network on meta at several sizes (an expert 113 kB a
    token, the VAE 19 to 20 kB a pixel), and 20 % for the libraries' own.
    """
    width, height = options.size
    frames_per, pixels_per = checkpoint.vae_scale
    tokens = ((options.frame_num - 1) // frames_per + 1) * (width // pixels_per // 2) * (height // pixels_per // 2)
    out = {"text_encoder": 500_000_000}
    for expert in checkpoint.experts:
        dim = expert.config["num_attention_heads"] * expert.config["attention_head_dim"]
        out[expert.name] = tokens * (10 * dim + expert.config["ffn_dim"]) * 2
    vae = checkpoint["vae"].config
    base = (vae.get("decoder_base_dim") or vae.get("base_dim", 96)) // (vae.get("patch_size") or 1)
    out["vae"] = width * height * (base * frames_per * 60 + options.frame_num * 3 * 4 * 3)
    return out
