"""Modules without weights: parameters on the meta device, and everything else as an ordinary construction makes it.

`torch.device("meta")` puts all tensors there, also the tables that a constructor computes and that are in no
checkpoint, so that the module cannot run once it is filled. Here the class of parameters decides: whatever is made of
`torch.nn.Parameter` or of a subclass is on meta from its birth, so initialising it does nothing. torch's own layers
make their parameters of `torch.empty`; that does not allocate, either. All of it holds for one thread, and ends with
the block.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["empty_weights"]

_ParameterMeta = type(torch.nn.Parameter)
_lock = threading.Lock()
#: Blocks that are open, in all threads.
_n_open = 0


class _Here(threading.local):
    """The depth of this thread inside of blocks."""

    depth = 0


_here = _Here()


@contextlib.contextmanager
def empty_weights() -> Iterator[None]:
    """Build modules whose parameters are on the meta device: no memory, no initialisation. `load_into` fills them.

    Buffers, persistent or not, and plain tensor attributes are real: what the constructor computes, it computes, on
    the device where it would. Parameters that are one object under several names stay so; subclasses of
    `torch.nn.Parameter` keep their class; a parameter from before the block stays as it is.

    What is on meta stays there, whatever the constructor sets its `.data` to, and where it moves the module: dtypes
    count, and buffers move. Only a constructor that asks for values of its parameters (`.item()`) cannot have them.

    Only the thread that entered is concerned. Blocks may be nested, and nothing is left behind, also after an error.
    Random numbers for parameters are mostly not drawn, so torch's generators stand elsewhere afterwards than after an
    ordinary construction. What a constructor computes before it becomes a parameter (`Parameter(torch.randn(n) / 9)`)
    is computed and dropped; `Parameter(torch.empty(n))` takes addresses for a moment, no memory. A parameter that is
    read from a file inside of the block is empty, too: load after it (`load_into` may be called inside).
    """
    with _counted(), _EmptyLayers():
        yield


@contextlib.contextmanager
def _counted() -> Iterator[None]:
    """Have this thread's parameters made on meta; the first block of all threads installs that, the last removes it."""
    global _n_open
    with _lock:
        _n_open += 1
        _ParameterMeta.__call__ = _make_parameter  # type: ignore[method-assign, assignment]
    _here.depth += 1
    try:
        yield
    finally:
        _here.depth -= 1
        with _lock:
            _n_open -= 1
            if not _n_open:
                del _ParameterMeta.__call__


def _make_parameter(cls: Any, *args: Any, **kwargs: Any) -> Any:
    """Stand in for the call of a parameter's class."""
    made = type.__call__(cls, *args, **kwargs)
    if not _here.depth or type(made) is not cls or made.is_meta or is_lazy(made):
        return made
    # a subclass's own __torch_function__ would see a parameter that is not whole yet
    with torch._C.DisableTorchFunctionSubclass():
        empty = torch.empty_like(made.detach(), device="meta")
        parameter = torch.Tensor._make_subclass(cls, empty, made.requires_grad)
    parameter.__dict__.update(made.__dict__)
    return parameter


#: Methods of tensors and functions of `torch.nn.init` that only set values. On meta they do nothing, for which torch
#: takes up to 0.3 ms each, and seconds of imports once.
_FILLS = {"normal_", "uniform_", "log_normal_", "exponential_", "cauchy_", "geometric_", "erfinv_", "clamp_"}
_FILLS |= {"constant_", "kaiming_uniform_"}
_MOVES = {"to", "cpu", "cuda"}
_SET_DATA = torch.Tensor.data.__set__  # type: ignore[attr-defined]


class _EmptyLayers(TorchFunctionMode):
    """A mode in which torch's own layers allocate nothing, and what is on meta stays there, uninitialised."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty and _in_constructor_of_layer(sys._getframe(1)):
            kwargs = {**kwargs, "device": "meta"}  # in there, it is for parameters only
        elif (name := getattr(func, "__name__", "")) in _FILLS:
            filled = args[0] if args else kwargs.get("tensor")
            if isinstance(filled, torch.Tensor) and filled.is_meta:
                return filled
        elif args and isinstance(args[0], torch.Tensor) and args[0].is_meta:
            if name in _MOVES:
                return _moved(*args, **kwargs) if name == "to" else args[0]
            if func == _SET_DATA:
                return func(args[0], torch.empty_like(args[1], device="meta"))
        return func(*args, **kwargs)


def _moved(tensor: torch.Tensor, *args: Any, copy: bool = False, **kwargs: Any) -> torch.Tensor:
    """Return `tensor.to(...)` of what has no weights yet: of another dtype maybe, but nowhere else."""
    where = [arg for arg in args if not isinstance(arg, bool)]  # the parser knows nothing of `copy`
    _, dtype, _, memory_format = torch._C._nn._parse_to(*where, **kwargs)
    return tensor.to(dtype or tensor.dtype, memory_format=memory_format or torch.preserve_format)


def _in_constructor_of_layer(frame: Any) -> bool:
    while frame.f_globals.get("__name__") == "torch.utils._device":  # a default device, set inside of the block
        frame = frame.f_back
    module = str(frame.f_globals.get("__name__"))
    return bool(frame.f_code.co_name == "__init__") and module.startswith("torch.nn.modules.")
