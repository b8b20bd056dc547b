"""Loads of several processes: who reads what, how they exchange it, and how they notice that one failed.

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
