"""Loads of several processes: they agree, share the reading, exchange what they read, and notice that one failed.

    processes     who is who and whose device is which, as torchrun starts them
    liveness      heartbeats and failures, told beside the collectives
    exit_note     the last word of a process that has ended
    sharding      who reads what, and what is exchanged afterwards
    exchange      the collectives
    shard_group   the processes of one load: torch.distributed's groups and DTensors on one side, the plan on the other
    shared_load   a load by several processes, wrapped around a load

Public are the names below, for programs that torchrun starts; they are imported when they are first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from wan_loader.system.lazy import lazy_names

if TYPE_CHECKING:
    from wan_loader.distributed.liveness import Liveness
    from wan_loader.distributed.processes import (
        Joined,
        end_now,
        is_first,
        join,
        local_rank,
        use_device,
        warms,
        world_size,
    )
    from wan_loader.distributed.sharding import rows

__all__ = [
    "Joined",
    "Liveness",
    "end_now",
    "is_first",
    "join",
    "local_rank",
    "rows",
    "use_device",
    "warms",
    "world_size",
]

__getattr__ = lazy_names(
    __name__,
    {
        "Joined": "wan_loader.distributed.processes",
        "Liveness": "wan_loader.distributed.liveness",
        "end_now": "wan_loader.distributed.processes",
        "is_first": "wan_loader.distributed.processes",
        "join": "wan_loader.distributed.processes",
        "local_rank": "wan_loader.distributed.processes",
        "rows": "wan_loader.distributed.sharding",
        "use_device": "wan_loader.distributed.processes",
        "warms": "wan_loader.distributed.processes",
        "world_size": "wan_loader.distributed.processes",
    },
)


def __dir__() -> list[str]:
    return __all__
