"""The collectives of a load: blocks that were read in parts become whole on each of their holders.

Large blocks are gathered in place: each holder's part already lies where it belongs. Small ones travel together in
messages, through a buffer. Bytes are moved, not numbers, so every dtype that torch has can be exchanged.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch
    from torch.distributed import ProcessGroup

    from wan_loader.loader.peers import Peers
    from wan_loader.loader.sharding import Chunk, Exchange

__all__ = ["carry"]


def carry(what: Exchange, flats: Mapping[int, torch.Tensor], group: ProcessGroup, peers: Peers) -> None:
    """Carry out an exchange. flats: storages by number, 1-D. Returns when everything has arrived."""
    import torch

    me = what.holders.index(peers.rank)
    raw = {storage: flat.view(torch.uint8) for storage, flat in flats.items()}
    works = []
    for gather in what.gathers:
        whole = raw[gather.storage][: gather.nbytes * len(what.holders)]
        mine = whole[gather.nbytes * me : gather.nbytes * (me + 1)]
        works.append(_gather(whole, mine, group))
    for work in works:
        peers.wait(work)
    for message in what.messages:
        _send(message, raw, me, len(what.holders), group, peers)
    _finish(next(iter(raw.values()), None))


def _send(
    message: Sequence[Chunk], raw: Mapping[int, torch.Tensor], me: int, n: int, group: ProcessGroup, peers: Peers
) -> None:
    import torch

    size = max(sum(c.end - c.start for c in message if c.owner == owner) for owner in range(n))
    buffer = torch.empty(n * size, dtype=torch.uint8, device=raw[message[0].storage].device)
    position = [owner * size for owner in range(n)]
    places: list[tuple[Any, Any, int]] = []
    for chunk in message:
        start = position[chunk.owner]
        position[chunk.owner] = end = start + chunk.end - chunk.start
        places.append((raw[chunk.storage][chunk.start : chunk.end], buffer[start:end], chunk.owner))
    for inside, outside, owner in places:
        if owner == me:
            outside.copy_(inside)
    peers.wait(_gather(buffer, buffer[me * size : (me + 1) * size], group))
    for inside, outside, owner in places:
        if owner != me:
            inside.copy_(outside)


def _gather(whole: torch.Tensor, mine: torch.Tensor, group: ProcessGroup) -> Any:
    """Start to fill `whole` with everybody's `mine`, which is a part of it already."""
    import torch.distributed as dist

    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # renamed in torch 2.13
    return gather(whole, mine, group=group, async_op=True)


def _finish(tensor: torch.Tensor | None) -> None:
    """Wait for the device: tensors that are handed out are complete."""
    import torch

    if tensor is not None and tensor.is_cuda:
        torch.cuda.current_stream(tensor.device).synchronize()
