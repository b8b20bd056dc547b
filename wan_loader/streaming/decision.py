"""Everything that is decided about a streamed module before a weight is read: a pure function, and a frozen value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from wan_loader.dtypes import ITEMSIZE
from wan_loader.plan.memory import rounded
from wan_loader.plan.transport import TransportRule
from wan_loader.sizes import format_bytes
from wan_loader.streaming.blocks import BlockLayout, lay_out_block, streamable
from wan_loader.streaming.split import Split, choose_pinned, split_blocks

if TYPE_CHECKING:
    from collections.abc import Sequence

    from wan_loader.formats import Checkpoint
    from wan_loader.formats.checkpoint_facts import TensorFacts
    from wan_loader.loading.match import Match
    from wan_loader.plan.dtype_policy import DtypePolicy
    from wan_loader.plan.facts import Facts

__all__ = ["Decision", "Limits", "decide", "lay_out_all"]

#: The page cache and what else runs on the machine need memory, too.
_PINNED_SHARE = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a streamed module may take. Amounts are bytes."""

    buffers: int
    device: int | None = None
    """For all weights on the device; None: as little as may be."""
    pinned: int | None = None
    """Pages of the page cache that may be registered; None: a share of the memory that is allowed here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """The blocks that are streamed, and how."""

    layouts: tuple[BlockLayout, ...]
    """The streamed blocks, in their order."""
    split: Split
    resident: tuple[str, ...]
    """The names in the checkpoint of everything that stays on the device."""
    scratch_nbytes: int
    pinned: frozenset[int]
    """The streamed blocks whose pages are to be registered, by their places in `layouts`."""
    transport: TransportRule
    """Says how the bytes of the others travel."""
    reason: str


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

    Raises:
        DeviceMemoryError: The limit for the device is too small even if every block is streamed.
    """
    in_blocks = {place.name for layout in layouts for place in layout.places}
    rest = sum(_nbytes_on_device(tensor, policy) for tensor in wanted if tensor.name not in in_blocks)
    scratch = chunk_nbytes if facts.cuda and any(layout.converts for layout in layouts) else 0
    split = split_blocks(
        [layout.nbytes for layout in layouts],
        rest,
        buffers=limits.buffers,
        scratch=scratch,
        budget=limits.device,
        path=checkpoint.path,
    )
    streamed = tuple(layouts[number] for number in split.streamed)
    away = {place.name for layout in streamed for place in layout.places}
    limit = facts.memory_limit // _PINNED_SHARE if limits.pinned is None else limits.pinned
    may_pin = facts.cuda and io in ("auto", "mapped")
    pinned = choose_pinned([layout.nbytes_file for layout in streamed], limit) if may_pin else set()
    return Decision(
        layouts=streamed,
        split=split,
        resident=tuple(tensor.name for tensor in wanted if tensor.name not in away),
        scratch_nbytes=scratch if streamed else 0,
        pinned=frozenset(pinned),
        transport=TransportRule(
            # what is not registered is read: a mapped file that shrinks would end a process that copies out of it
            io="auto" if io == "mapped" else io,
            may_map=False,
            residency=facts.residency,
            direct_refused=facts.direct_refused.keys(),
        ),
        reason=_reason(io, limit, n_pinned=len(pinned), n_streamed=len(streamed), cuda=facts.cuda),
    )


def _nbytes_on_device(tensor: TensorFacts, policy: DtypePolicy) -> int:
    itemsize = ITEMSIZE[policy.target(tensor.name, tensor.dtype)]
    return rounded(tensor.nbytes // ITEMSIZE[tensor.dtype] * itemsize)


def _reason(io: str, limit: int, *, n_pinned: int, n_streamed: int, cuda: bool) -> str:
    """Say in one sentence why the bytes come as they do."""
    if not n_streamed:
        return "everything fits on the device"
    if not cuda:
        return "the CPU has nothing to register pages with"
    if io in ("direct", "buffered"):
        return f"io={io} was asked for"
    if n_pinned == n_streamed:
        return f"all of it fits the {format_bytes(limit)} of pages that may be pinned"
    return f"{n_pinned} of {n_streamed} blocks fit the {format_bytes(limit)} of pages that may be pinned"
