"""The questions that a load asks of the system before it is planned: devices, memory, the page cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

from wan_loader.devices.resolve import check_tensors_are_real, resolve_device
from wan_loader.engine.open_files import OpenFiles
from wan_loader.formats.known_formats import is_planned
from wan_loader.plan.blocks import MAX_GAP, ByteRange
from wan_loader.plan.engine_settings import MIN_BLOCK_BYTES, block_bytes
from wan_loader.plan.facts import Facts
from wan_loader.plan.layout import storage_ranges
from wan_loader.system.machine import free_memory, memory_limit, processors
from wan_loader.system.page_cache import PageCache, Residency

if TYPE_CHECKING:
    import torch

    from wan_loader.events import Observer
    from wan_loader.formats.checkpoint_facts import Checkpoint
    from wan_loader.plan.request import LoadRequest

__all__ = ["probe"]


def probe(
    checkpoint: Checkpoint,
    request: LoadRequest,
    *,
    n_sharers: int = 1,
    residency: Residency | None = None,
    observer: Observer | None = None,
) -> Facts:
    """Ask for all that a plan depends on, beside the checkpoint. Imports torch, and makes the device's CUDA context.

    Costs some microseconds a file.

    Args:
        checkpoint: The checkpoint that is to be loaded.
        request: Everything that was asked for.
        n_sharers: The processes of this machine that load at the same time.
        residency: What is known to lie in memory; None: it is asked for.
        observer: Is told of spans.

    Raises:
        DeviceError: The device is not there.
        MissingFileError: A file is gone since its header was read.
        CheckpointError: A file was changed since its header was read.
    """
    device = resolve_device(request.device, observer)
    check_tensors_are_real()
    free, total = _device_memory(device)
    residency, refused = _page_cache(checkpoint, request) if residency is None else (residency, {})
    return Facts(
        device=str(device),
        processors=processors(),
        residency=residency,
        direct_refused=refused,
        memory_limit=memory_limit(),
        host_free=free_memory(),
        device_free=free,
        device_total=total,
        n_sharers=n_sharers,
    )


def _device_memory(device: torch.device) -> tuple[int | None, int | None]:
    """Return free and total bytes of a CUDA device; what torch's allocator keeps and does not use is free."""
    if device.type != "cuda":
        return None, None
    import torch

    free, total = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device), total


def _page_cache(checkpoint: Checkpoint, request: LoadRequest) -> tuple[Residency, dict[int, str]]:
    """Return what of the wanted bytes is in the page cache, and which other files cannot be opened with O_DIRECT."""
    if not is_planned(checkpoint):
        ranges = [ByteRange(0, number, 0, file.nbytes) for number, file in enumerate(checkpoint.files)]
    else:
        ranges = storage_ranges(checkpoint, request.select(checkpoint))
    nbytes = sum(r.end - r.start for r in ranges)
    with OpenFiles(checkpoint.files) as reader:
        # the blocks of the plan: what is known of a block as a whole is enough to choose its transport
        unit = block_bytes(nbytes, MIN_BLOCK_BYTES)
        residency = PageCache(reader.fds).residency(ranges, unit=unit, max_gap=MAX_GAP)
        cold = {file for file, start, end, there in residency.windows if request.io == "direct" or there < end - start}
        # asked now, by opening: only the file system knows, and the plan opens nothing
        if request.io in ("auto", "direct"):
            refused = {number: reader.fallbacks[-1] for number in sorted(cold) if not reader.open_direct(number)}
        else:
            refused = {}
    return residency, refused
