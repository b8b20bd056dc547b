"""The sharing of a load: who reads what, and what is exchanged afterwards, when several processes load together. Pure.

    shard       what one process keeps of a tensor: some of its rows (FSDP), or all of it
    holders     the processes that keep the same shard
    borders     the byte ranges of a shard that each of its holders reads; together they are all of it, so every byte is
                read once

Rows of a tensor follow each other in the file, so a shard is one byte range. `divide` describes the shards of one
process as a checkpoint of their own, which is then loaded like any other. Shards that several processes hold are
exchanged after reading: of a large one each holder reads an equal byte range, and they are gathered in place; a small
one is read whole by one of the holders, and many of them travel in one message.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from wan_loader.dtypes import ITEMSIZE
from wan_loader.formats.checkpoint_facts import StorageFacts, contiguous_strides
from wan_loader.formats.known_formats import is_planned

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from wan_loader.formats.checkpoint_facts import Checkpoint, TensorFacts

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

#: Storages below this size are read whole by one of their holders.
SMALL_BYTES = 256 << 10
#: Equal byte ranges hold a multiple of so many elements, so that they stay aligned.
_ALIGN_ELEMENTS = 256
#: A message with small storages takes at most so much memory, over all processes.
_MESSAGE_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class TensorSharding:
    """The place of a tensor on the processes, as one of them sees it."""

    holders: tuple[int, ...]
    """Ranks that keep the same shard, this process among them, in the order of their group."""
    n_shards: int = 1
    """The number of shards, which are ranges of rows, that the tensor is cut into."""
    shard: int = 0
    """The number of the one that this process keeps."""


@dataclass(frozen=True, slots=True)
class LocalShare:
    """The share of a checkpoint that one process keeps."""

    checkpoint: Checkpoint
    """Its shards, as tensors and storages of their own."""
    tensors: tuple[TensorFacts, ...]
    """The tensors, in the order asked for."""
    holders: tuple[tuple[int, ...], ...]
    """The holders of each storage of `checkpoint`."""
    cuts: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """Tensors that must be loaded whole, and which of their rows to keep."""


@dataclass(frozen=True, slots=True)
class Gather:
    """A storage, by its number, that begins with a segment of `nbytes` from each holder, in their order."""

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
    """The exchange between holders of the same shards, in bytes of the loaded tensors. The same for each of them."""

    holders: tuple[int, ...]
    gathers: tuple[Gather, ...]
    messages: tuple[tuple[Chunk, ...], ...]
    """Chunks that travel together."""

    def nbytes_received(self, rank: int) -> int:
        """Count the bytes that come to process `rank` from the others."""
        me = self.holders.index(rank)
        gathered = sum(g.nbytes for g in self.gathers) * (len(self.holders) - 1)
        return gathered + sum(c.end - c.start for m in self.messages for c in m if c.owner != me)


def rows(n_rows: int, n_shards: int, shard: int) -> tuple[int, int]:
    """Return first and last-plus-one row of a shard, as `torch.chunk` cuts: equal ones, the last smaller or empty."""
    size = -(-n_rows // n_shards)
    return min(shard * size, n_rows), min((shard + 1) * size, n_rows)


def divide(
    checkpoint: Checkpoint, tensors: Sequence[TensorFacts], shardings: Mapping[str, TensorSharding], rank: int
) -> LocalShare:
    """Describe what process `rank` keeps.

    Tensors whose rows do not follow each other in the file are loaded whole by everybody, with a warning, and cut.

    Args:
        checkpoint: The whole checkpoint.
        tensors: The tensors that are asked for.
        shardings: Their places, by name.
        rank: The process.
    """
    storages: list[StorageFacts] = []
    holders: list[tuple[int, ...]] = []
    whole: dict[int, int] = {}  # storage of the checkpoint -> of the share
    shared = _holders_of_storages(tensors, shardings, (rank,))
    facts: list[TensorFacts] = []
    cuts: dict[str, tuple[int, int]] = {}
    for tensor in tensors:
        sharding = shardings[tensor.name]
        cut = sharding.n_shards > 1
        if cut and _row_by_row(tensor) and is_planned(checkpoint):
            shard, storage = _shard(tensor, checkpoint.storages[tensor.storage], sharding)
            facts.append(shard._replace(storage=len(storages)))
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
    """Find who may share the reading of a whole storage: those that need all of it, nobody where its tensors differ."""
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


def _shard(tensor: TensorFacts, storage: StorageFacts, sharding: TensorSharding) -> tuple[TensorFacts, StorageFacts]:
    first, last = rows(tensor.shape[0], sharding.n_shards, sharding.shard)
    shape = (last - first, *tensor.shape[1:])
    row_nbytes = tensor.nbytes // max(tensor.shape[0], 1)
    start = storage.start + tensor.offset * ITEMSIZE[tensor.dtype] + first * row_nbytes
    shard = tensor._replace(shape=shape, stride=contiguous_strides(shape), offset=0)
    return shard, StorageFacts(storage.file, start, (last - first) * row_nbytes)


def borders(nbytes: Sequence[int], itemsizes: Sequence[int], n_holders: int) -> list[tuple[int, ...]]:
    """Cut storages into byte ranges of their holders: holder i reads bytes `borders[i]` to `borders[i + 1]` of each.

    Small storages go whole to one holder, so that neighbours in the file stay together and every holder gets as much.
    """
    small_total = sum(n for n in nbytes if n < SMALL_BYTES)
    seen, out = 0, []
    for total, itemsize in zip(nbytes, itemsizes, strict=True):
        if total < SMALL_BYTES:
            # by the middle of the storage, so that each holder gets a run of neighbours of about the same size
            owner = min(n_holders - 1, (seen + total // 2) * n_holders // max(small_total, 1))
            out.append((*([0] * (owner + 1)), *([total] * (n_holders - owner))))
            seen += total
        else:
            # the last holder gets the rest; the others end at a whole element, whose loaded size may be another
            step = itemsize * _ALIGN_ELEMENTS
            range_nbytes = total // n_holders // step * step
            out.append((*(range_nbytes * i for i in range(n_holders)), total))
    return out


def exchanges(
    holders: Sequence[tuple[int, ...]], borders_of: Mapping[int, tuple[int, ...]], scales: Mapping[int, tuple[int, int]]
) -> list[Exchange]:
    """Plan what is exchanged after reading: one `Exchange` for each set of holders, in the order of the storages.

    Args:
        holders: The holders of each storage.
        borders_of: The borders of each shared storage, in bytes of the file.
        scales: Element sizes of each, in the file and loaded.
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
            # an equal segment for everybody is gathered in place; the rest of the last holder travels as a chunk
            segment = ends[1] if 0 < ends[1] < ends[-1] else 0
            if segment:
                gathers.append(Gather(storage, segment))
            owned = range(len(group)) if not segment else [len(group) - 1]
            starts = ends[:-1] if not segment else [*ends[:-2], segment * len(group)]
            chunks += [Chunk(storage, starts[i], ends[i + 1], i) for i in owned if starts[i] < ends[i + 1]]
        out.append(Exchange(group, tuple(gathers), tuple(_messages(chunks, len(group)))))
    return out


def _messages(chunks: Sequence[Chunk], n_holders: int) -> list[tuple[Chunk, ...]]:
    """Gather chunks in messages to which no holder contributes more than its share of the memory."""
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
