"""Functions of torch that look at tensors without asking them: before they do, what waits is settled.

A tensor that waits notices every function of torch that is called with it. Compilers and tracers look at a module's
tensors one by one, or from C++, and keep what they see; others take the memory as it is. What waits in
a module that is to be compiled cannot be told from what waits elsewhere: all of it is settled. That is too early for a
module that moves to a GPU after its first compiled call, and only for that.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from wan_loader.errors import CheckpointError
from wan_loader.fastpath.deferred import is_deferred, settle, settle_all

if TYPE_CHECKING:
    from collections.abc import Callable

    from wan_loader.fastpath.patches import Patches

__all__ = ["Settling"]

#: Module and name of functions before which everything is settled.
_BEFORE = (
    ("torch._dynamo.convert_frame", "_compile"),
    ("torch.jit._script", "script"),
    ("torch.jit._trace", "trace"),
    ("torch.jit._trace", "trace_module"),
    ("torch.nn.parallel.distributed", "DistributedDataParallel.__init__"),
)


@dataclass(slots=True)
class Settling:
    """The seam of functions that look without asking."""

    def install(self, patches: Patches) -> None:
        """Have tensors that wait settled before these functions."""
        for module, name in _BEFORE:
            patches.replace(module, name, _settled_before)
        patches.replace("torch.utils.dlpack", "to_dlpack", _settled_arguments)
        patches.replace("torch.utils", "swap_tensors", _settled_arguments)


def _settled_before(original: Callable[..., Any]) -> Callable[..., Any]:
    def called(*args: Any, **kwargs: Any) -> Any:
        with suppress(CheckpointError):  # whoever looks at what is left will be told
            settle_all()
        return original(*args, **kwargs)

    return called


def _settled_arguments(original: Callable[..., Any]) -> Callable[..., Any]:
    def called(*tensors: Any) -> Any:
        return original(*(settle(tensor) if is_deferred(tensor) else tensor for tensor in tensors))

    return called
