"""What a checkpoint needs and what the machine allows, asked and estimated; `memory_plan` then decides."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING

from wan_loader import DtypePolicy, HostMemoryError
from wan_loader.distributed import world_size
from wan_loader.dtypes import ITEMSIZE
from wan_loader.sizes import format_bytes
from wan_loader.system import available_memory, memory_limit
from wan_pipeline import presets
from wan_pipeline.memory_plan import HOST_PROCESS_BYTES, Blocks, Limits, MemoryPlan, Needs, choose, plan_memory

if TYPE_CHECKING:
    import torch

    from wan_pipeline.presets import Preset
    from wan_pipeline.start_options import StartOptions
    from wan_pipeline.wan_checkpoint import Component, WanCheckpoint

__all__ = ["make_memory_plan", "network_dtype"]

#: Host memory of a load to a GPU: its pinned ring.
_PINNED_RING_BYTES = 512 << 20
#: Of the host memory that is available, what streamed blocks may rely upon as page cache where no limit was asked for.
_CACHE_SHARE = 0.75
#: Of a divided network, what FSDP2 gathers at a time: two blocks; of the text encoder the embedding, too.
_GATHERED = (1 / 20, 1 / 4)
#: What a streamed network takes on the device beside its tensors, if some are converted on the way, and if numbers are
#: made of some that are quantised; the allocator rounds every tensor up to a multiple of this.
_SCRATCH_BYTES, _HALF_DONE_BYTES, _ALIGNMENT = 17 << 20, 128 << 20, 512
#: Pixels in a row of a tile of the VAE, and tokens of a prompt.
_TILE, _PROMPT = 256, 512


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


def make_memory_plan(checkpoint: WanCheckpoint, options: StartOptions, device: torch.device) -> MemoryPlan:
    """Plan with the preset that is asked for, or with the fastest that fits.

    Raises:
        DeviceMemoryError: It does not fit on the device.
        HostMemoryError: It does not fit into host memory.
        OptionError: There is no such preset.
    """
    wanted = "multi-gpu" if options.preset == "auto" and world_size() > 1 else options.preset
    # for the dtypes, which are the same in all presets: `auto` is decided below, from the sizes that they give
    some = presets.load_preset("fastest" if wanted == "auto" else wanted)
    some = some.adapted(t5_cpu=options.t5_cpu, offload_model=options.offload_model, dtype=options.dtype)
    needs = _needs(checkpoint, options, some, device)
    limits = _limits(checkpoint, options, device, needs)
    device_memory = options.device_memory
    host_memory = options.host_memory if device.type == "cpu" else None
    # weights lie on the host: the smaller limit counts
    if host_memory is not None and host_memory - HOST_PROCESS_BYTES < (device_memory or host_memory):
        device_memory, limits = host_memory, replace(limits, process_nbytes=HOST_PROCESS_BYTES)
    if wanted != "auto":
        return plan_memory(some.adapted(device_memory=device_memory), needs, limits)
    return choose(
        needs,
        limits,
        t5_cpu=options.t5_cpu,
        offload_model=options.offload_model,
        dtype=options.dtype,
        device_memory=device_memory,
    )


def _needs(checkpoint: WanCheckpoint, options: StartOptions, preset: Preset, device: torch.device) -> Needs:
    """Add up what each network takes on the device, in the dtypes of a preset."""
    sizes: dict[str, int] = {}
    blocks: dict[str, Blocks] = {}
    workspace, tiled = _workspace(checkpoint, options)
    for component in checkpoint.components:
        dtype = network_dtype(component, preset, options)
        name = None if dtype is None else str(dtype).removeprefix("torch.")
        nbytes = component.nbytes(name, decoder_only=not options.like_diffusers)
        sizes[component.name] = nbytes
        if options.degrees.shards(component.name):
            sizes[component.name] //= world_size()
            workspace[component.name] += int(nbytes * _GATHERED[component.network.kind == "text_encoder"])
        if component.network.blocks and world_size() == 1:
            blocks[component.name] = measure_blocks(component, name, cuda=device.type == "cuda")
    host_nbytes = _PINNED_RING_BYTES if device.type == "cuda" else 0
    return Needs(
        sizes=sizes,
        workspace=workspace,
        blocks=blocks,
        tiled_workspace=tiled,
        kept=_kept(checkpoint, options, preset, device),
        host_nbytes=host_nbytes,
    )


def _kept(checkpoint: WanCheckpoint, options: StartOptions, preset: Preset, device: torch.device) -> dict[str, int]:
    """Ask for the memory of the device that networks take there already, to which a start attaches."""
    if not options.keep or device.type != "cuda":  # the CPU has no memory of its own
        return {}
    from wan_loader import kept_nbytes

    found = {
        component.name: kept_nbytes(
            component.facts, device, dtype=network_dtype(component, preset, options), keep_fp32=component.keep_fp32
        )
        for component in checkpoint.components
        if not (component.network.kind == "text_encoder" and preset.text_encoder == "cpu")
    }
    return {name: nbytes for name, nbytes in found.items() if nbytes}


def measure_blocks(component: Component, dtype: str | None, *, cuda: bool = False) -> Blocks:
    """Add up what the repeated blocks of a network take, and what the rest of it does. From headers alone.

    Args:
        component: The network.
        dtype: The name of the dtype that it is loaded as; None leaves it as in the file.
        cuda: Count what conversions on the way take on a GPU.
    """
    policy = DtypePolicy(dtype, component.keep_fp32)
    block = re.compile(rf"{re.escape(component.network.blocks)}\.(\d+)\.")
    in_blocks: dict[int, tuple[int, int]] = {}
    rest, beside = 0, 0
    for tensor in component.facts.tensors:
        target = policy.target(tensor.name, tensor.dtype)
        nbytes = tensor.nbytes // ITEMSIZE[tensor.dtype] * ITEMSIZE[target]
        nbytes = -(-nbytes // _ALIGNMENT) * _ALIGNMENT
        found = block.match((component.key_map(tensor.name) if component.key_map else None) or tensor.name)
        if found is None:
            rest += nbytes
            continue
        quantised = component.facts.quantised.get(tensor.name)
        if cuda and target != tensor.dtype:
            beside = max(beside, _SCRATCH_BYTES)
        if cuda and quantised is not None:
            beside = _SCRATCH_BYTES + _HALF_DONE_BYTES
        nbytes_file = tensor.nbytes if quantised is None else quantised.raw.nbytes
        before = in_blocks.get(int(found[1]), (0, 0))
        in_blocks[int(found[1])] = before[0] + nbytes, before[1] + nbytes_file
    return Blocks(
        count=len(in_blocks),
        nbytes=max(nbytes for nbytes, _ in in_blocks.values()),
        nbytes_file=max(nbytes for _, nbytes in in_blocks.values()),
        rest_nbytes=rest + beside,
    )


def _limits(checkpoint: WanCheckpoint, options: StartOptions, device: torch.device, needs: Needs) -> Limits:
    import torch

    free, held, cache = None, 0, None
    host = available_memory()
    host = memory_limit() if host is None else host
    if options.host_memory is not None:
        host = min(host, _beside_process(options.host_memory, _PINNED_RING_BYTES if device.type == "cuda" else 0))
    if device.type == "cuda":
        held = torch.cuda.memory_allocated(device)
        free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - held
        # what is attached to is taken, and not taken again
        free += sum(needs.kept.values())
        cache = int(host * _CACHE_SHARE) if options.host_memory is None else host - _PINNED_RING_BYTES
    return Limits(
        device=str(device),
        titles={c.name: c.network.title for c in checkpoint.components},
        device_nbytes=free,
        held_nbytes=held,
        host_nbytes=host,
        cache_nbytes=cache,
        # several processes load together: no network gives way on one of them
        may_drop=not options.like_diffusers and world_size() == 1,
    )


def _beside_process(host_memory: int, least: int) -> int:
    """Return what a limit leaves for the weights; raise unless that is as much as every load takes."""
    if host_memory < HOST_PROCESS_BYTES + least:
        needed = format_bytes(HOST_PROCESS_BYTES + least)
        raise HostMemoryError.because(
            f"{format_bytes(host_memory)} of host memory are too little: libraries and loads take {needed}",
            f"allow {needed} or more",
        )
    return host_memory - HOST_PROCESS_BYTES


def _workspace(checkpoint: WanCheckpoint, options: StartOptions) -> tuple[dict[str, int], dict[str, int]]:
    """Estimate the bytes that running each network takes beside the weights, on the safe side.

    From the tensors that are alive at the peak, by tracing each network on meta at several sizes (an expert 113 kB a
    token, the VAE 19 to 20 kB a pixel), and 20 % for the libraries' own. By tiles, the VAE holds its pictures 4.7 times
    while it puts them together.

    Returns:
        The bytes of each network, and those of the networks that can work by tiles if they do.
    """
    width, height = options.size
    frames_per, pixels_per = checkpoint.vae_scale
    tokens = ((options.frame_num - 1) // frames_per + 1) * (width // pixels_per // 2) * (height // pixels_per // 2)
    text = checkpoint["text_encoder"].config
    layer = 40 * text["d_model"] + 12 * text["d_ff"] + 20 * text["num_heads"] * _PROMPT
    out = {"text_encoder": _PROMPT * layer}
    for expert in checkpoint.experts:
        dim = expert.config["num_attention_heads"] * expert.config["attention_head_dim"]
        out[expert.name] = tokens * (10 * dim + expert.config["ffn_dim"]) * 2
    vae = checkpoint["vae"].config
    base = (vae.get("decoder_base_dim") or vae.get("base_dim", 96)) // (vae.get("patch_size") or 1)
    pictures = width * height * options.frame_num * 3 * 4
    a_pixel = base * frames_per * 60
    out["vae"] = width * height * a_pixel + pictures * 3
    tile = min(width, _TILE) * min(height, _TILE) * a_pixel
    return out, {"vae": max(tile + pictures * 2, pictures * 6)}
