"""What of torch takes a tensor's memory without asking the tensor, guarded as long as anything waits.

A tensor that waits notices every function of torch that is called with it. Some look at tensors from C++, or keep what
they saw: who is given the memory of another by `.data`, other classes of tensors, the old way to DLPack, and tracers.
And some layers choose their kernel by the kind of their tensors.
In their places stand functions of ours that settle first, from the first tensor that waits to the last; programs in
which nothing waits never meet them. Imports torch.
"""

from __future__ import annotations

import sys
import threading
from functools import wraps
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.overrides
import torch.utils.dlpack

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Guards"]

#: Functions before which all that waits is settled: they see whole modules.
_OF_MODULES = ("script", "trace", "trace_module")
_ABSENT = object()


class _Place(NamedTuple):
    """A guard that stands in a place."""

    owner: Any
    name: str
    guard: Any
    before: Any
    """What stood there; `_ABSENT`: nothing, it is inherited."""


class _Data:
    """`torch.Tensor.data`: what is given the memory of a tensor that waits is not asked by torch, and asks here."""

    def __init__(self, settled: Callable[..., Any]) -> None:
        self._settled = settled
        self._original: Any = torch.Tensor.data

    def __get__(self, tensor: Any, owner: Any = None) -> Any:
        return self._original if tensor is None else self._original.__get__(tensor, owner)

    def __set__(self, tensor: Any, value: Any) -> None:
        self._original.__set__(tensor, self._settled(value, by=tensor))

    def __delete__(self, tensor: Any) -> None:
        self._original.__delete__(tensor)  # it refuses


class _MakeSubclass:
    """`torch.Tensor._make_subclass`, which makes tensors of other classes on the same memory."""

    def __init__(self, settled: Callable[..., Any]) -> None:
        self._original: Any = torch.Tensor._make_subclass
        self._guarded = _with_settled(settled, self._original)

    def __get__(self, tensor: Any, owner: Any = None) -> Any:
        # the compiler of torch registers the function itself when it is imported
        is_asked_by_compiler = sys._getframe(1).f_globals.get("__name__", "").startswith("torch._dynamo")
        return self._original if is_asked_by_compiler else self._guarded


class _HasTorchFunction:
    """`torch.overrides.has_torch_function`, by which layers choose a kernel: as if nothing waited."""

    def __init__(self, settled: Callable[..., Any]) -> None:
        self._settled = settled
        self._original: Any = torch.overrides.has_torch_function

    def __call__(self, args: Any) -> Any:
        for value in args:
            self._settled(value)
        return self._original(args)

    # the compiler of torch registers the function itself when it is imported

    def __eq__(self, other: object) -> bool:
        return self is other or other == self._original

    def __hash__(self) -> int:
        return hash(self._original)


class Guards:
    """The guards of a process.

    Args:
        settled: Returns the ordinary tensor that a value becomes if it waits, else the value; unless `by`, a tensor to
            whom it is given, waits itself.
        settle_all: Settles everything.
    """

    def __init__(self, settled: Callable[..., Any], settle_all: Callable[[], None]) -> None:
        self._settled = settled
        self._settle_all = settle_all
        self._places: list[_Place] = []
        self._lock = threading.RLock()

    def put_in(self) -> None:
        """Put all guards in, unless they are."""
        if self._places:
            return
        with self._lock:
            if not self._places:
                self._put(torch.Tensor, "data", _Data(self._settled))
                self._put(torch.Tensor, "_make_subclass", _MakeSubclass(self._settled))
                self._put(torch.nn.Parameter, "__new__", staticmethod(_new_parameter(self._settled)))
                self._put(torch.overrides, "has_torch_function", _HasTorchFunction(self._settled))
                for owner, name in ((torch.utils, "swap_tensors"), (torch.utils.dlpack, "to_dlpack")):
                    self._put(owner, name, _with_settled(self._settled, getattr(owner, name)))
                for name in _OF_MODULES:
                    self._put(torch.jit, name, _after(self._settle_all, getattr(torch.jit, name)))

    def _put(self, owner: Any, name: str, guard: Any) -> None:
        self._places.append(_Place(owner, name, guard, vars(owner).get(name, _ABSENT)))
        setattr(owner, name, guard)

    def take_out(self) -> None:
        """Take out those that nobody else has replaced meanwhile; others only pass calls on."""
        with self._lock:
            while self._places:
                owner, name, guard, before = self._places.pop()
                if vars(owner).get(name) is not guard:
                    continue
                if before is _ABSENT:
                    delattr(owner, name)
                else:
                    setattr(owner, name, before)


def _new_parameter(settled: Callable[..., Any]) -> Callable[..., Any]:
    """Return `torch.nn.Parameter.__new__`, which makes a parameter of a class of its own of no tensor that waits."""
    original = torch.nn.Parameter.__new__

    @wraps(original)
    def new(cls: type, data: Any = None, *args: Any, **kwargs: Any) -> Any:
        return original(cls, data if cls is torch.nn.Parameter else settled(data), *args, **kwargs)

    return new


def _with_settled(settled: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        return original(*map(settled, args), **{name: settled(value) for name, value in kwargs.items()})

    return guarded


def _after(settle_all: Callable[[], None], original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        settle_all()
        return original(*args, **kwargs)

    return guarded
