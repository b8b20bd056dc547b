"""The loads of the fast path: like any other, but the peaks of memory that are counted stay the program's own.

Whole, or piece by piece for whoever only looks at each.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from wan_loader.loading.load_session import LoadSession
from wan_loader.plan.request import LoadRequest

if TYPE_CHECKING:
    import torch

    from wan_loader.formats.checkpoint_facts import Checkpoint
    from wan_loader.loading.iterate import TensorIterator
    from wan_loader.loading.result import LoadResult
    from wan_loader.plan.dtype_policy import DtypePolicy
    from wan_loader.types import IoMode

__all__ = ["PIECE_BYTES", "load", "load_pieces"]

#: Tensors of this size, of which there are some fifty at a time, keep the link to a device busy.
PIECE_BYTES = 4 << 20
#: So much of what is looked at must be in memory: a disk would take longer than the copy that is to be spared.
_RESIDENT = 0.9


def load(
    source: Checkpoint | list[str],
    device: torch.device | str,
    *,
    policy: DtypePolicy,
    io: IoMode = "auto",
    owned: bool = False,
    names: tuple[str, ...] | None = None,
) -> LoadResult:
    """Load a checkpoint, one that was made up or that of paths, by one plan, with a dtype for each tensor.

    Arguments and errors are those of `LoadRequest` and `wan_loader.load`.
    """
    request = LoadRequest(source=source, device=device, policy=policy, io=io, owned=owned, names=names)
    with LoadSession(keeps_peaks=True) as session:
        plan = session.plan(request, session.open(request))
        return session.result(plan, session.run(plan))


def load_pieces(source: Checkpoint, device: torch.device, *, io: IoMode = "auto") -> TensorIterator | None:
    """Load the tensors of a checkpoint that was made up one after the other, each for a moment.

    Args:
        source: Tensors of at most `PIECE_BYTES`.
        device: Where they go.
        io: As for `load`.

    Returns:
        The tensors by name, as they arrive, for whoever lets go of each at once: then all of them take less than 256
        MiB of the device. None if too little of the files is in memory. Errors are those of `load`, and come at any
        time, the last one after the last tensor: a file was changed meanwhile.
    """
    from wan_loader.loading.iterate import arrivals

    request = LoadRequest(source=source, device=device, io=io, owned=True, piecemeal=True)
    with LoadSession(keeps_peaks=True) as session:
        plan = session.plan(request, session.open(request))
    # bytes that several tensors are made of are there, or not, once
    nbytes = sum(end - start for _, start, end in {(r.file, r.start, r.end) for r in plan.layout.byte_ranges})
    if plan.resident is None or plan.resident < _RESIDENT * nbytes:
        return None
    return arrivals(session, replace(plan, blocks=replace(plan.blocks, nbytes=min(plan.blocks.nbytes, PIECE_BYTES))))
