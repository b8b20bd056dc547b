"""A load of several processes: each reads its share of the bytes, and they exchange. A wrapper around a load.

Reading and exchanging follow each other within a load: collectives of a load never run beside others of the caller's
thread, and their order is the same on every process.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NoReturn

from wan_loader.devices.resolve import current
from wan_loader.distributed.shard_group import open_shard_group
from wan_loader.loading.bind import make_binding
from wan_loader.loading.load_session import LoadSession
from wan_loader.loading.run import convert_late

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup

    from wan_loader.cancel import CancelToken
    from wan_loader.events import Observer
    from wan_loader.loading.bind import Into
    from wan_loader.loading.result import LoadResult
    from wan_loader.plan.request import LoadRequest

__all__ = ["load_together", "refuse"]


def refuse(error: Exception, group: ProcessGroup | None, module: torch.nn.Module | None) -> NoReturn:
    """Tell the others that this process will not load with them, and raise the error that is why."""
    with open_shard_group(group, module):
        raise error


def load_together(
    request: LoadRequest,
    into: Into | None,
    group: ProcessGroup | None,
    *,
    cancel: CancelToken | None = None,
    observer: Observer | None = None,
) -> LoadResult:
    """Load as one of the processes of a group, all of which make this call.

    Args:
        request: The load that this process asks for.
        into: The module that is to be filled; None returns the tensors alone.
        group: The processes; None takes the group that the DTensors of the module lie on.
        cancel: Stops the load, here and by its failure in the others.
        observer: Is told of spans.

    Raises:
        DistributedError: Another process failed or wants something else.
    """
    with open_shard_group(group, None if into is None else into.module) as shards:
        request = replace(request, device=shards.device(request.device))
        with LoadSession(cancel=shards.token(cancel), observer=observer) as session:
            checkpoint = session.open(request)
            with session.span("header"):
                binding = make_binding(request, checkpoint, into)
                share = shards.divide(binding, checkpoint)
            reads = shards.reads(binding.request)
            plan = session.plan(binding.request, share.checkpoint, reads=reads, n_sharers=shards.n_local)
            transfer = session.run(plan)
            exchanged: dict[str, int] = {}
            if not plan.through_torch:  # else everybody has read everything
                with current(plan.facts.device):
                    exchanged = shards.exchange(plan, transfer, session.observer)
            with session.span("assign"):
                convert_late(transfer.tensors, plan)
                transfer.tensors = shards.cut(transfer.tensors)
                shards.arrived()
                notes = binding.bind(transfer.tensors, plan.facts.device)
            return session.result(plan, transfer, warnings=notes, settings=exchanged)
