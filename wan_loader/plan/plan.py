"""The plan of a load, made before a weight is read: which bytes, how, in which order, with how much memory. Pure.

A plan is a value: it can be printed, compared, and played through for other hardware (`profiler.analysis.simulate`).
Its blocks are made anew each time they are asked for, one by one, so that the first read does not wait for the last.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING

from wan_loader.errors import OptionError
from wan_loader.formats.checkpoint_facts import contiguous_strides
from wan_loader.formats.known_formats import format_of, is_planned
from wan_loader.plan.blocks import MAX_GAP, Transport, plan_blocks
from wan_loader.plan.engine_settings import (
    MIN_BLOCK_BYTES,
    block_bytes,
    engine_settings,
    piecemeal_block_bytes,
    prefers_mapping,
)
from wan_loader.plan.layout import Layout, lay_out, plan_storages
from wan_loader.plan.memory import check_host_memory, check_memory
from wan_loader.plan.quantised_values import nbytes_beside, nbytes_of_values, parts_of, read_for, values_among
from wan_loader.plan.transport import TransportRule, explain, is_uniform
from wan_loader.sizes import format_bytes, format_count
from wan_loader.system.page_cache import Knowledge
from wan_loader.system.posix import PAGE

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence

    from wan_loader.formats.checkpoint_facts import Checkpoint, Quantised, TensorFacts
    from wan_loader.plan.blocks import Block, ByteRange
    from wan_loader.plan.engine_settings import EngineSettings
    from wan_loader.plan.facts import Facts
    from wan_loader.plan.layout import StoragePlan
    from wan_loader.plan.request import LoadRequest

__all__ = ["Blocks", "LoadPlan", "make_plan", "may_view"]

#: Planned and allocated at once, while what was planned before is on its way: a tenth of a millisecond's work.
_BATCH_BLOCKS = 4


@dataclass(frozen=True, slots=True)
class Blocks:
    """The blocks of a plan, in the order in which they are read: made when they are iterated over, as often as that."""

    byte_ranges: tuple[ByteRange, ...]
    nbytes: int
    """The most that one block holds."""
    rule: TransportRule
    max_gap: int
    """Gaps up to this many bytes are read through."""

    def __iter__(self) -> Iterator[Block]:
        """Make the blocks, one by one."""
        return plan_blocks(self.byte_ranges, block_bytes=self.nbytes, transport=self.rule, max_gap=self.max_gap)


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class LoadPlan:
    """Everything that one load is going to do. `print(plan)` says it in words."""

    request: LoadRequest
    checkpoint: Checkpoint
    facts: Facts
    tensors: Sequence[TensorFacts]
    """The tensors to load, the most urgent first."""
    storages: Sequence[StoragePlan]
    """The storages of those tensors, in the order in which they are first named."""
    io: str
    """The mode that was asked for, or that must do in its place."""
    layout: Layout
    blocks: Blocks
    settings: EngineSettings
    resident: int | None
    """The bytes of what is wanted that are in the page cache; None: unknown."""
    batch: int | None
    """The number of blocks that are planned and allocated at once; None: all."""
    reason: str
    """The reason why the bytes travel as they do, in one sentence."""
    values: Mapping[str, Quantised] = field(default_factory=dict)
    """The wanted tensors whose numbers are made once their bytes have arrived, by name."""
    shared: bool = False
    """True if other processes read the rest of some storages: what is read is not complete without an exchange."""
    warnings: tuple[str, ...] = ()

    def __repr__(self) -> str:
        nbytes = format_bytes(sum(tensor.nbytes for tensor in self.tensors))
        what = f"{format_count(len(self.tensors), 'tensor')}, {nbytes}"
        return f"LoadPlan({self.checkpoint.path!r}, {what}, to {self.request.device}, io={self.io!r})"

    @property
    def through_torch(self) -> bool:
        """True if nothing can be planned: `torch.load` reads the files."""
        return not is_planned(self.checkpoint)

    @property
    def nbytes_file(self) -> int:
        """The bytes of the wanted storages in the files."""
        return sum(self.checkpoint.storages[s.storage].nbytes for s in self.storages)

    @property
    def nbytes_loaded(self) -> int:
        """The bytes that the tensors have once loaded."""
        copied = sum(s.nbytes_loaded(self.checkpoint.storages[s.storage].nbytes) for s in self.storages)
        return copied + self.nbytes_grown

    @property
    def read_names(self) -> list[str]:
        """The names of the tensors that are read: those that are wanted, or what their numbers are made of."""
        return [facts.name for storage in self.storages for facts in storage.tensors]

    @property
    def nbytes_grown(self) -> int:
        """The bytes by which numbers are more than what they are made of."""
        return nbytes_of_values(self.values, self.request.policy) - sum(
            part.nbytes for one in self.values.values() for part in parts_of(one)
        )

    def __str__(self) -> str:
        """Say what will be read, how, why, and with how much memory."""
        files = format_count(len({self.checkpoint.storages[s.storage].file for s in self.storages}), "file")
        tensors = format_count(len(self.tensors), "tensor")
        if self.request.slices:
            tensors += f" ({len(self.request.slices)} in part)"
        dtype = "as in the file" if self.request.policy.dtype is None else f"as {self.request.policy.dtype}"
        lines = [
            f"load {tensors}, {format_bytes(self.nbytes_file)} in {files} of {self.checkpoint.path}",
            f"  to      {self.facts.device}, {dtype}: {format_bytes(self.nbytes_loaded)}",
            f"  why     {self.reason}",
        ]
        if self.through_torch:
            return "\n".join([*lines, *(f"  note    {warning}" for warning in self.warnings)])
        if self.values:
            kinds = ", ".join(sorted({one.kind for one in self.values.values()}))
            lines.append(f"  make    the numbers of {format_count(len(self.values), 'tensor')} ({kinds}) on the device")
        for transport, nbytes, count in self._transports():
            lines.append(f"  read    {format_bytes(nbytes)} {transport}, {format_count(count, 'block')}")
        if viewed := self.layout.nbytes_viewed:
            lines.append(f"  view    {format_bytes(viewed)} where it lies in the file")
        if any(True for _ in self.blocks):
            settings = self.settings
            ring = f"{settings.n_slots} slots of {format_bytes(settings.slot_bytes)}"
            reads = format_count(settings.threads, "read")
            lines.append(f"  through {ring} at most ({format_bytes(settings.n_slots * settings.slot_bytes)}), {reads}")
        return "\n".join([*lines, *(f"  note    {warning}" for warning in self.warnings)])

    def _transports(self) -> list[tuple[str, int, int]]:
        """Count the bytes and the blocks of each transport."""
        found: dict[str, tuple[int, int]] = {}
        for block in self.blocks:
            nbytes, count = found.get(block.transport.value, (0, 0))
            found[block.transport.value] = nbytes + sum(s.nbytes for s in block.segments), count + 1
        return [(name, nbytes, count) for name, (nbytes, count) in found.items()]


def make_plan(
    request: LoadRequest,
    checkpoint: Checkpoint,
    facts: Facts,
    *,
    reads: Mapping[int, tuple[int, int]] | None = None,
    read_unit: int | None = None,
) -> LoadPlan:
    """Decide everything about a load before anything is read or allocated. Costs about 5 microseconds a tensor.

    Args:
        request: Everything that was asked for.
        checkpoint: The checkpoint that `request.open` gave, or what takes its place: a share of it, or a converted
            copy.
        facts: The machine, as `probe` found it.
        reads: Where several processes load together, the storages of which this one reads only some bytes, from and to.
        read_unit: Where each block is checked while it is read: the bytes that must be read together.

    Raises:
        KeyMismatchError: Names that were asked for are not there.
        CheckpointError: Something cannot be converted.
        OptionError: Quantised tensors are to be loaded in a way that cannot make numbers of them.
        DeviceMemoryError: The weights do not fit on the device.
        HostMemoryError: The load does not fit into the host's memory.
    """
    tensors = request.select(checkpoint)
    notes = request.policy.check(checkpoint, tensors)
    alone, checked = reads is None, read_unit is not None
    values = values_among(tensors, checkpoint)
    if values and not (alone and not checked):
        reason = "holds quantised tensors, whose numbers are made by one process alone, from the file itself"
        raise OptionError.because(reason, "load it without a group and without a cache", path=checkpoint.path)
    parts, policy = read_for(tensors, values, request.policy)
    storages = plan_storages(parts, policy)
    io = _io_mode(request.io, cuda=facts.cuda, checked=checked)
    views = alone and not facts.cuda and not checked and may_view(request, checkpoint)
    # this process copies what is wanted of them: it would be killed if they were mapped, and the file shrank
    to_cut = {t.name for t in tensors if t.name in request.slices and t.stride != contiguous_strides(t.shape)}
    to_cut |= {part.name for one in values.values() for part in parts_of(one)}
    layout = lay_out(checkpoint, storages, views=views, to_cut=to_cut, reads=reads or MappingProxyType({}))
    blocks = _blocks(layout, facts, io, read_unit, alone=alone, piecemeal=request.piecemeal)
    beside = nbytes_beside(values, request.policy, piecemeal=request.piecemeal)
    room = _room(checkpoint, storages, layout, facts, blocks.nbytes, piecemeal=request.piecemeal, beside=beside)
    nbytes = layout.nbytes_read
    resident = facts.residency.total((*layout.byte_ranges, *layout.viewed_ranges))
    cold = resident * 2 < nbytes
    settings = engine_settings(
        _transports(blocks, uniform=is_uniform(io, resident, nbytes)),
        io=io,
        threads=request.threads,
        memory_limit=facts.memory_limit,
        room=room,
        processors=facts.processors,
        cuda=facts.cuda,
        sharers=facts.n_sharers,
        block_bytes=blocks.nbytes,
        slot_bytes=read_unit,
        converts=any(plan.converts for plan in layout.copied),
        cold=cold,
        resident=resident >= nbytes,
        reads_in_place=not facts.cuda and not checked,
    )
    return LoadPlan(
        request=request,
        checkpoint=checkpoint,
        facts=facts,
        tensors=tensors,
        storages=storages,
        io=io,
        layout=layout,
        blocks=blocks,
        settings=settings,
        resident=None if facts.residency.knowledge is Knowledge.UNKNOWN else resident,
        # a cold load takes long, and others could take the room meanwhile: all is allocated at once
        batch=None if cold and not request.piecemeal else _BATCH_BLOCKS,
        values=values,
        shared=not alone,
        reason=explain(request.io, io, resident, nbytes, layout.nbytes_viewed, facts.residency.knowledge),
        warnings=(*checkpoint.warnings, *notes, *layout.warnings, *_direct_fallbacks(blocks, facts)),
    )


def _room(
    checkpoint: Checkpoint,
    storages: Sequence[StoragePlan],
    layout: Layout,
    facts: Facts,
    block_bytes: int,
    *,
    piecemeal: bool,
    beside: int,
) -> int | None:
    """Return the host memory that is left for the rings of all loads; raise where the load does not fit."""
    if is_planned(checkpoint):
        # what a GPU converts stays referred to until the end
        may_go = piecemeal and not (facts.cuda and any(plan.converts for plan in layout.copied))
        return check_memory(layout, facts, checkpoint.path, block_bytes=block_bytes, piecemeal=may_go, beside=beside)
    read = sum(checkpoint.storages[s.storage].nbytes for s in storages)
    return check_host_memory(0 if facts.cuda else read, facts, checkpoint.path)


def _blocks(layout: Layout, facts: Facts, io: str, read_unit: int | None, *, alone: bool, piecemeal: bool) -> Blocks:
    may_map = facts.cuda and read_unit is None and not piecemeal
    rule = TransportRule(
        io=io,
        may_map=may_map and prefers_mapping(facts.processors // facts.n_sharers),
        residency=facts.residency,
        direct_refused=facts.direct_refused.keys(),
    )
    size = block_bytes(layout.nbytes_read, read_unit or MIN_BLOCK_BYTES)
    if piecemeal and not facts.cuda:
        size = piecemeal_block_bytes(layout.nbytes_read)
    # of a shared load, what lies between a process's own bytes is read by others: gaps are not read through
    return Blocks(layout.byte_ranges, size, rule, MAX_GAP if alone else PAGE)


def _transports(blocks: Blocks, *, uniform: bool) -> set[Transport]:
    """Return how the blocks travel.

    Where those of a file travel alike, one byte range of each tells: that saves the milliseconds of planning them all.
    """
    if uniform:
        return {blocks.rule(r.file, r.start, r.end) for r in _firsts(blocks.byte_ranges)}
    return {block.transport for block in blocks}


def _direct_fallbacks(blocks: Blocks, facts: Facts) -> list[str]:
    """Say why files are not read with O_DIRECT that would be."""
    if not facts.direct_refused:
        return []
    wanted = replace(blocks, rule=replace(blocks.rule, direct_refused=()))
    files = {block.file for block in wanted if block.transport is Transport.DIRECT}
    return [why for file, why in facts.direct_refused.items() if file in files]


def may_view(request: LoadRequest, checkpoint: Checkpoint) -> bool:
    """Return whether host tensors may stay in the mapped file: safetensors' do, and torch's only where asked."""
    if request.owned:
        return False
    return request.io == "mapped" or (request.io == "auto" and format_of(checkpoint).stays_mapped)


def _firsts(byte_ranges: Sequence[ByteRange]) -> Collection[ByteRange]:
    """Return one byte range of each file."""
    return {r.file: r for r in reversed(byte_ranges) if r.end > r.start}.values()


def _io_mode(io: str, *, cuda: bool, checked: bool) -> str:
    """Return the mode to use: nothing of a mapped file passes through this process, to be checked or copied.

    It would be killed if the file shrank meanwhile. (Views are the caller's to read.)
    """
    return "auto" if io == "mapped" and (checked or not cuda) else io
