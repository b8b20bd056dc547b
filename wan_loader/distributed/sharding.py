"""Who reads what, and what is exchanged afterwards, when several processes load together. Pure.

    block     what one process keeps of a tensor: some of its rows (FSDP), or all of it
    holders   the processes that keep the same block
    part      what one holder reads of it; the parts of all holders make up the block, so every byte is read once

Rows of a tensor follow each other in the file, so a block is one byte range, and so is a part. `divide` describes the
blocks of one process as a checkpoint of their own, which is then loaded like any other. Blocks that several processes
hold are read in parts and exchanged: large ones in equal parts that are gathered in place, small ones whole by one of
the holders, many of them in one message.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from wan_loader.dtypes import ITEMSIZE
from wan_loader.formats.facts import StorageFacts, contiguous_strides
from wan_loader.formats.known import is_planned

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from wan_loader.formats.facts import Checkpoint, TensorFacts

__all__ = [
    "SMALL_BYTES",
    "Chunk",
    "Exchange",
    "Gather",
    "LocalShare",
    "TensorSharding",
    "borders",
    "divide",
    "exchanges",
    "rows",
]

#: Blocks below this size are read whole by one of their holders.
SMALL_BYTES = 256 << 10
#: Equal parts hold a multiple of so many elements, so that they stay aligned.
_ALIGN_ELEMENTS = 256
#: A message with small blocks takes at most so much memory, over all processes.
_MESSAGE_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class TensorSharding:
    """How a tensor lies over the processes, as one of them sees it."""

    holders: tuple[int, ...]
    """Ranks that keep the same block, this process among them, in the order of their group."""
    n_shards: int = 1
    """Into how many blocks of rows the tensor is cut."""
    shard: int = 0
    """Which of them this process keeps."""


@dataclass(frozen=True, slots=True)
class LocalShare:
    """What one process keeps of a checkpoint."""

    checkpoint: Checkpoint
    """Its blocks, as tensors and storages of their own."""
    tensors: tuple[TensorFacts, ...]
    """In the order asked for."""
    holders: tuple[tuple[int, ...], ...]
    """Of each storage of `checkpoint`."""
    cuts: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """Tensors that must be loaded whole, and which of their rows to keep."""


@dataclass(frozen=True, slots=True)
class Gather:
    """Storage number `storage` begins with one piece of `nbytes` from each holder, in their order."""

    storage: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """Bytes `start` to `end` of storage number `storage`, which holder number `owner` has read."""

    storage: int
    start: int
    end: int
    owner: int


@dataclass(frozen=True, slots=True)
class Exchange:
    """What the holders of the same blocks exchange, in bytes of the loaded tensors. The same for each of them."""

    holders: tuple[int, ...]
    gathers: tuple[Gather, ...]
    messages: tuple[tuple[Chunk, ...], ...]
    """Chunks that travel together."""

    def nbytes_received(self, rank: int) -> int:
        """Bytes that come to process `rank` from the others."""
        me = self.holders.index(rank)
        gathered = sum(g.nbytes for g in self.gathers) * (len(self.holders) - 1)
        return gathered + sum(c.end - c.start for m in self.messages for c in m if c.owner != me)


def rows(n_rows: int, n_shards: int, shard: int) -> tuple[int, int]:
    """First and last-plus-one row of a block, as `torch.chunk` cuts: equal blocks, the last ones smaller or empty."""
    size = -(-n_rows // n_shards)
    return min(shard * size, n_rows), min((shard + 1) * size, n_rows)


def divide(
    checkpoint: Checkpoint, tensors: Sequence[TensorFacts], shardings: Mapping[str, TensorSharding], rank: int
) -> LocalShare:
    """What process `rank` keeps of `tensors`. `shardings` by name.

    Tensors whose rows do not follow each other in the file are loaded whole by everybody, with a warning, and cut.
    """
    storages: list[StorageFacts] = []
    holders: list[tuple[int, ...]] = []
    whole: dict[int, int] = {}  # storage of the checkpoint -> of the division
    shared = _holders_of_storages(tensors, shardings, (rank,))
    facts: list[TensorFacts] = []
    cuts: dict[str, tuple[int, int]] = {}
    for tensor in tensors:
        sharding = shardings[tensor.name]
        cut = sharding.n_shards > 1
        if cut and _row_by_row(tensor) and is_planned(checkpoint):
            block, storage = _block(tensor, checkpoint.storages[tensor.storage], sharding)
            facts.append(block._replace(storage=len(storages)))
            storages.append(storage)
            holders.append(sharding.holders)
            continue
        if cut:
            cuts[tensor.name] = rows(tensor.shape[0], sharding.n_shards, sharding.shard)
        if tensor.storage not in whole:
            whole[tensor.storage] = len(storages)
            storages.append(checkpoint.storages[tensor.storage])
            holders.append(shared.get(tensor.storage, (rank,)))
        facts.append(tensor._replace(storage=whole[tensor.storage]))
    warnings = (f"{len(cuts)} tensors are not stored row by row: every process reads them whole",) if cuts else ()
    local = replace(
        checkpoint, storages=tuple(storages), tensors=tuple(facts), warnings=(*checkpoint.warnings, *warnings)
    )
    return LocalShare(local, tuple(facts), tuple(holders), cuts)


def _holders_of_storages(
    tensors: Sequence[TensorFacts], shardings: Mapping[str, TensorSharding], alone: tuple[int, ...]
) -> dict[int, tuple[int, ...]]:
    """Who may share the reading of a whole storage: those that need all of it, nobody where its tensors differ."""
    found: dict[int, set[tuple[int, ...]]] = defaultdict(set)
    for tensor in tensors:
        sharding = shardings[tensor.name]
        if sharding.n_shards == 1:
            found[tensor.storage].add(sharding.holders)
        elif not _row_by_row(tensor):
            found[tensor.storage].add(alone)
    return {storage: next(iter(sets)) if len(sets) == 1 else alone for storage, sets in found.items()}


def _row_by_row(tensor: TensorFacts) -> bool:
    return tensor.stride == contiguous_strides(tensor.shape)


def _block(tensor: TensorFacts, storage: StorageFacts, sharding: TensorSharding) -> tuple[TensorFacts, StorageFacts]:
    first, last = rows(tensor.shape[0], sharding.n_shards, sharding.shard)
    shape = (last - first, *tensor.shape[1:])
    row_nbytes = tensor.nbytes // max(tensor.shape[0], 1)
    start = storage.start + tensor.offset * ITEMSIZE[tensor.dtype] + first * row_nbytes
    block = tensor._replace(shape=shape, stride=contiguous_strides(shape), offset=0)
    return block, StorageFacts(storage.file, start, (last - first) * row_nbytes)


def borders(nbytes: Sequence[int], itemsizes: Sequence[int], n_holders: int) -> list[tuple[int, ...]]:
    """Where the parts of each block begin and end: holder i reads bytes `borders[i]` to `borders[i + 1]`.

    Small blocks go whole to one holder, so that neighbours in the file stay together and every holder gets as much.
    """
    small_total = sum(n for n in nbytes if n < SMALL_BYTES)
    seen, out = 0, []
    for total, itemsize in zip(nbytes, itemsizes, strict=True):
        if total < SMALL_BYTES:
            owner = min(n_holders - 1, (seen + total // 2) * n_holders // max(small_total, 1))
            out.append((*([0] * (owner + 1)), *([total] * (n_holders - owner))))
            seen += total
        else:
            step = itemsize * _ALIGN_ELEMENTS
            range_nbytes = total // n_holders // step * step
            out.append((*(range_nbytes * i for i in range(n_holders)), total))
    return out


def exchanges(
    holders: Sequence[tuple[int, ...]], borders_of: Mapping[int, tuple[int, ...]], scales: Mapping[int, tuple[int, int]]
) -> list[Exchange]:
    """What is exchanged after reading, one `Exchange` for each set of holders, in the order of the storages.

    borders_of: of each shared storage, in bytes of the file. scales: element sizes of each, in the file and loaded.
    """
    together: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for storage in borders_of:
        together[holders[storage]].append(storage)
    out = []
    for group, storages in together.items():
        gathers: list[Gather] = []
        chunks: list[Chunk] = []
        for storage in storages:
            source, target = scales[storage]
            ends = [border // source * target for border in borders_of[storage]]
            segment = ends[1] if 0 < ends[1] < ends[-1] else 0
            if segment:
                gathers.append(Gather(storage, segment))
            owned = range(len(group)) if not segment else [len(group) - 1]
            starts = ends[:-1] if not segment else [*ends[:-2], segment * len(group)]
            chunks += [Chunk(storage, starts[i], ends[i + 1], i) for i in owned if starts[i] < ends[i + 1]]
        out.append(Exchange(group, tuple(gathers), tuple(_messages(chunks, len(group)))))
    return out


def _messages(chunks: Sequence[Chunk], n_holders: int) -> list[tuple[Chunk, ...]]:
    """Chunks in messages to which no holder contributes more than its share of the memory."""
    limit = _MESSAGE_BYTES // n_holders
    messages: list[tuple[Chunk, ...]] = []
    message: list[Chunk] = []
    filled = [0] * n_holders
    for chunk in chunks:
        if message and filled[chunk.owner] + chunk.end - chunk.start > limit:
            messages.append(tuple(message))
            message, filled = [], [0] * n_holders
        message.append(chunk)
        filled[chunk.owner] += chunk.end - chunk.start
    return [*messages, tuple(message)] if message else messages
