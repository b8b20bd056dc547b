"""What a load is going to do: what is read, on which ways, with how much memory. Decided before a weight is read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from wan_loader.loading.allocate import check_memory, lay_out
from wan_loader.plan.blocks import MAX_GAP, plan_blocks
from wan_loader.plan.limits import MIN_BLOCK_BYTES, block_bytes, engine_settings, prefers_mapping
from wan_loader.plan.transport import choose_transport, is_uniform
from wan_loader.system.machine import memory_limit, processors
from wan_loader.system.page_cache import PageCache
from wan_loader.system.posix import PAGE

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

    import torch

    from wan_loader.engine.reader import Check, Reader
    from wan_loader.formats.facts import Checkpoint
    from wan_loader.loading.allocate import Layout, StoragePlan
    from wan_loader.loading.run import LoadOptions
    from wan_loader.plan.blocks import Block, ByteRange
    from wan_loader.plan.limits import EngineSettings
    from wan_loader.system.page_cache import Knowledge

__all__ = ["LoadPlan", "decide"]

#: Planned and allocated at once, while what was planned before is on its way: a tenth of a millisecond's work.
_PORTION_BLOCKS = 4


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """What a load is going to do."""

    io: str
    """The mode that was asked for, or that must do in its place."""
    layout: Layout
    blocks: Iterator[Block]
    """Planned when they are asked for."""
    settings: EngineSettings
    resident: int
    """Bytes that are in the page cache; what is unknown counts as cold."""
    knowledge: Knowledge
    """How well that is known."""
    batch: int | None
    """How many blocks are planned and allocated at once; None: all."""


def decide(
    checkpoint: Checkpoint,
    plans: Sequence[StoragePlan],
    options: LoadOptions,
    device: torch.device,
    reader: Reader,
    check: Check | None,
) -> LoadPlan:
    """Sizes, ways and settings, before anything is read or allocated."""
    cuda, shard_group = device.type == "cuda", options.shard_group
    io = _mode(options, cuda, check)
    sharers = shard_group.n_local if shard_group is not None else 1
    views = not cuda and check is None and _may_view(checkpoint, options)
    layout = lay_out(checkpoint, plans, views=views, reads=shard_group.reads(plans) if shard_group is not None else {})
    room = check_memory(layout, device, checkpoint.path, sharers)
    nbytes = layout.nbytes_read
    page_cache = PageCache(reader.fds)
    resident = page_cache.total((*layout.byte_ranges, *layout.viewed_ranges))
    may_map = cuda and check is None and prefers_mapping(processors() // sharers)
    transport = choose_transport(io, may_map=may_map, reader=reader, page_cache=page_cache)
    gap = MAX_GAP if shard_group is None else PAGE  # what lies between a process's own bytes, others read
    unit = check.block_bytes if check is not None else None
    size = block_bytes(nbytes, unit or MIN_BLOCK_BYTES)
    blocks = plan_blocks(layout.byte_ranges, block_bytes=size, transport=transport, max_gap=gap)
    if is_uniform(io, resident, nbytes):
        transports = {transport(e.file, e.start, e.end) for e in _firsts(layout.byte_ranges)}
    else:
        planned = list(blocks)
        blocks, transports = iter(planned), {block.transport for block in planned}
    cold = resident * 2 < nbytes
    settings = engine_settings(
        transports,
        io=io,
        threads=options.threads,
        memory_limit=memory_limit(),
        room=room,
        processors=processors(),
        cuda=cuda,
        sharers=sharers,
        block_bytes=size,
        slot_bytes=unit,
        converts=any(plan.converts for plan in layout.copied),
        cold=cold,
        resident=resident >= nbytes,
        reads_straight=not cuda and check is None,
    )
    # a cold load takes long, and others could take the room meanwhile
    batch = None if cold else _PORTION_BLOCKS
    return LoadPlan(io, layout, blocks, settings, resident, page_cache.knowledge, batch)


def _may_view(checkpoint: Checkpoint, options: LoadOptions) -> bool:
    """Whether host tensors may stay in the mapped file: as safetensors' own do, and torch's own only where asked."""
    if options.shard_group is not None or options.owned:
        return False
    return options.io == "mapped" or (options.io == "auto" and checkpoint.format == "safetensors")


def _firsts(byte_ranges: Sequence[ByteRange]) -> Collection[ByteRange]:
    """One extent of each file."""
    return {
        byte_range.file: byte_range for byte_range in reversed(byte_ranges) if byte_range.end > byte_range.start
    }.values()


def _mode(options: LoadOptions, cuda: bool, check: Check | None) -> str:
    """Of a mapped file, nothing passes through this process: neither to be checked, nor to be copied by the processor.

    It would be killed if the file shrank meanwhile. (Views are the caller's to read.)
    """
    return "auto" if options.io == "mapped" and (check is not None or not cuda) else options.io
