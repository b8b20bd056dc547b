"""Before torch compiles, and before modules are copied to other processes from C++, what waits is settled.

A compiler looks at a module's tensors one by one, and keeps what it sees. What waits in the module that is to be
compiled cannot be told from what waits elsewhere: all of it is settled. That is too early for a module that moves to a
GPU after its first compiled call, and only for that.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from wan_loader.errors import CheckpointError
from wan_loader.fastpath.deferral.deferred import settle_all

if TYPE_CHECKING:
    from collections.abc import Callable

    from wan_loader.fastpath.patches import Patches

__all__ = ["Settling"]

#: Module and name of functions before which everything is settled. (Others are guarded while something waits.)
_BEFORE = (
    ("torch._dynamo.convert_frame", "_compile"),
    ("torch.nn.parallel.distributed", "DistributedDataParallel.__init__"),
)


@dataclass(frozen=True, slots=True)
class Settling:
    """The seam of functions that see whole modules without asking their tensors."""

    def install(self, patches: Patches) -> None:
        """Have tensors that wait settled before these functions."""
        for module, name in _BEFORE:
            patches.replace(module, name, _settled_before)


def _settled_before(original: Callable[..., Any]) -> Callable[..., Any]:
    def called(*args: Any, **kwargs: Any) -> Any:
        with suppress(CheckpointError):  # whoever looks at what is left will be told
            settle_all()
        return original(*args, **kwargs)

    return called
