"""The loads of the fast path: like any other, but the peaks of memory that are counted stay the program's own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from wan_loader.loading.load_session import LoadSession
from wan_loader.plan.request import LoadRequest

if TYPE_CHECKING:
    import torch

    from wan_loader.formats.checkpoint_facts import Checkpoint
    from wan_loader.loading.result import LoadResult
    from wan_loader.plan.dtype_policy import DtypePolicy
    from wan_loader.types import IoMode

__all__ = ["load"]


def load(
    source: Checkpoint | list[str],
    device: torch.device | str,
    *,
    policy: DtypePolicy,
    io: IoMode = "auto",
    owned: bool = False,
) -> LoadResult:
    """Load a checkpoint, one that was made up or that of paths, by one plan, with a dtype for each tensor.

    Arguments and errors are those of `LoadRequest` and `wan_loader.load`.
    """
    request = LoadRequest(source=source, device=device, policy=policy, io=io, owned=owned)
    with LoadSession(keeps_peaks=True) as session:
        plan = session.plan(request, session.open(request))
        return session.result(plan, session.run(plan))
