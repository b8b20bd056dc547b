"""A tensor that is about to be converted by somebody's rule: if as expected, the cast waits.

Imports torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

import torch

from wan_loader.fastpath.deferral.deferred_tensor import give

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from wan_loader.fastpath.deferral.waiting_cast import WaitingCast

__all__ = ["Convertible"]


class Convertible(torch.Tensor):
    """An alias of an ordinary tensor: `.to(dtype)` of it is a cast that waits, all else is as of the ordinary one.

    So whatever is made of it is either the waiting tensor or an ordinary one. It is for handing over: functions that
    take it hold it no longer than they run.
    """

    _ordinary: torch.Tensor
    _cast: WaitingCast

    @classmethod
    def of(cls, tensor: torch.Tensor, cast: WaitingCast) -> Self:
        """Return an alias of a tensor, for which the cast has been found."""
        made: Self = torch.Tensor._make_subclass(cls, tensor)
        made._ordinary, made._cast = tensor, cast
        return made

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Let the cast wait, or call the function with the ordinary tensor."""
        kwargs = kwargs or {}
        if func is torch.Tensor.to and type(args[0]) is cls and _is_cast(args[0]._cast.dtype, args[1:], kwargs):
            return give(args[0]._cast)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*(arg._ordinary if type(arg) is cls else arg for arg in args), **kwargs)


def _is_cast(dtype: torch.dtype, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Say whether arguments of `Tensor.to` ask for a dtype, on the CPU, and for nothing else that shows."""
    try:
        device, wanted, _, memory_format = torch._C._nn._parse_to(*args, **kwargs)
    except (TypeError, RuntimeError):
        return False
    return wanted == dtype and device in (None, torch.device("cpu")) and memory_format is None
