"""Everything that is decided about a streamed module before a weight is read: a pure function, and a frozen value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from wan_loader.dtypes import ITEMSIZE
from wan_loader.plan.blocks import Transport
from wan_loader.plan.memory import rounded
from wan_loader.plan.quantised_values import SCRATCH_BYTES
from wan_loader.sizes import format_bytes
from wan_loader.streaming.blocks import BlockLayout, lay_out_block, streamable
from wan_loader.streaming.ledger import Held
from wan_loader.streaming.split import Split, choose_kept, split_blocks

if TYPE_CHECKING:
    from collections.abc import Sequence

    from wan_loader.formats import Checkpoint
    from wan_loader.formats.checkpoint_facts import TensorFacts
    from wan_loader.loading.match import Match
    from wan_loader.plan.dtype_policy import DtypePolicy
    from wan_loader.plan.facts import Facts
    from wan_loader.streaming.split import SharedBuffers

__all__ = ["Decision", "Limits", "decide", "lay_out_all"]

#: What is pinned can be used for nothing else: a half of the memory that is allowed here.
_PINNED_SHARE = 0.5
#: The page cache that blocks rely on: other programs, and the rest of this one, need some, too.
_HOST_SHARE = 0.75
_NOTHING = Held()


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a streamed module may take. Amounts are bytes."""

    buffers: int
    device: int | None = None
    """For all weights on the device; None: as little as may be."""
    pinned: int | None = None
    """Pages of the page cache that may be registered; None: a share of the memory that is allowed here."""
    host: int | None = None
    """The page cache that may be relied upon; None: a share of the memory that is available now."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """The blocks that are streamed, and how."""

    layouts: tuple[BlockLayout, ...]
    """The streamed blocks, in their order."""
    split: Split
    resident: tuple[str, ...]
    """The names in the checkpoint of everything that stays on the device."""
    scratch_nbytes: int
    """The bytes of the longest segment that is converted."""
    half_done_nbytes: int
    """What making numbers takes beside that."""
    pinned: frozenset[int]
    """The streamed blocks whose pages are to be registered, by their places in `layouts`."""
    kept: frozenset[int]
    """Those that are expected to stay in the page cache, the pinned ones included; the others are read from the disk
    each time."""
    io: str
    held: Held
    """What the module holds for itself."""
    reason: str

    def transport(self, number: int) -> Transport:
        """Return how the bytes of a block travel that is not pinned."""
        if self.io in ("direct", "buffered"):
            return Transport(self.io)
        return Transport.BUFFERED if number in self.kept else Transport.DIRECT


def lay_out_all(
    blocks: Sequence[str],
    found: Match,
    parameters: frozenset[str],
    checkpoint: Checkpoint,
    policy: DtypePolicy,
) -> tuple[BlockLayout, ...]:
    """Lay out each block as if it were streamed.

    Args:
        blocks: The dotted names of the blocks.
        found: The pairs of the checkpoint's names and the module's.
        parameters: The names of the module's parameters.
        checkpoint: The checkpoint.
        policy: The dtype that each tensor gets.
    """
    return tuple(
        lay_out_block(block, streamable(block, found.slots, parameters, found.facts), checkpoint, policy)
        for block in blocks
    )


def decide(
    layouts: Sequence[BlockLayout],
    wanted: Sequence[TensorFacts],
    checkpoint: Checkpoint,
    policy: DtypePolicy,
    facts: Facts,
    limits: Limits,
    *,
    io: str,
    chunk_nbytes: int,
    shared: SharedBuffers | None = None,
    taken: Held = _NOTHING,
) -> Decision:
    """Decide which blocks are streamed, and where their bytes come from.

    Args:
        layouts: All blocks, of `lay_out_all`.
        wanted: All tensors that fill the module.
        checkpoint: The checkpoint.
        policy: The dtype that each tensor gets.
        facts: The machine.
        limits: What may be taken.
        io: The mode that was asked for.
        chunk_nbytes: What is converted at a time.
        shared: The buffers, if another module has them already.
        taken: What other modules hold for which the limits count, too.

    Raises:
        DeviceMemoryError: The limit for the device is too small even if every block is streamed.
        OptionError: Blocks are larger than the buffers that are there.
    """
    in_blocks = {place.name for layout in layouts for place in layout.places}
    rest = sum(_nbytes_on_device(tensor, policy) for tensor in wanted if tensor.name not in in_blocks)
    scratch = chunk_nbytes if facts.cuda and any(layout.converts for layout in layouts) else 0
    half_done = SCRATCH_BYTES if facts.cuda and any(layout.quantised for layout in layouts) else 0
    split = split_blocks(
        [layout.nbytes for layout in layouts],
        rest + taken.device,
        buffers=limits.buffers,
        scratch=scratch + half_done,
        budget=limits.device,
        path=checkpoint.path,
        shared=shared,
    )
    streamed = tuple(layouts[number] for number in split.streamed)
    away = {place.name for layout in streamed for place in layout.places}
    sizes = [layout.nbytes_file for layout in streamed]
    host = max(0, (_host_limit(facts) if limits.host is None else limits.host) - taken.host)
    kept = choose_kept(sizes, host)
    limit = int(facts.memory_limit * _PINNED_SHARE) if limits.pinned is None else limits.pinned
    limit = min(host, max(0, limit - taken.pinned))
    may_pin = facts.cuda and io in ("auto", "mapped")
    pinned = _choose_among(kept, sizes, limit) if may_pin else set()
    return Decision(
        layouts=streamed,
        split=split,
        resident=tuple(tensor.name for tensor in wanted if tensor.name not in away),
        scratch_nbytes=scratch if streamed else 0,
        half_done_nbytes=half_done if streamed else 0,
        pinned=frozenset(pinned),
        kept=frozenset(kept),
        io=io,
        held=Held(
            split.nbytes - split.nbytes_beside - taken.device,
            0 if io == "direct" else sum(sizes[number] for number in kept),
            sum(sizes[number] for number in pinned),
        ),
        reason=_reason(io, host, limit, n_pinned=len(pinned), n_kept=len(kept), n_streamed=len(streamed), facts=facts),
    )


def _host_limit(facts: Facts) -> int:
    free = facts.memory_limit if facts.host_free is None else min(facts.host_free, facts.memory_limit)
    return int(free * _HOST_SHARE)


def _choose_among(kept: set[int], sizes: Sequence[int], limit: int) -> set[int]:
    """Choose again among some blocks, by a smaller limit."""
    numbers = sorted(kept)
    return {numbers[i] for i in choose_kept([sizes[number] for number in numbers], limit)}


def _nbytes_on_device(tensor: TensorFacts, policy: DtypePolicy) -> int:
    itemsize = ITEMSIZE[policy.target(tensor.name, tensor.dtype)]
    return rounded(tensor.nbytes // ITEMSIZE[tensor.dtype] * itemsize)


def _reason(io: str, host: int, limit: int, *, n_pinned: int, n_kept: int, n_streamed: int, facts: Facts) -> str:
    """Say in one sentence why the bytes come as they do."""
    if not n_streamed:
        return "everything fits on the device"
    if io in ("direct", "buffered"):
        return f"io={io} was asked for"
    reasons = []
    if n_kept < n_streamed:
        reasons.append(f"{n_kept} of {n_streamed} blocks fit the {format_bytes(host)} of host memory")
    if not facts.cuda:
        reasons.append("the CPU has nothing to register pages with")
    elif n_pinned < n_kept:
        reasons.append(f"{n_pinned} of {n_streamed} blocks fit the {format_bytes(limit)} of pages that may be pinned")
    return "; ".join(reasons) or f"all of it fits the {format_bytes(limit)} of pages that may be pinned"
