"""The tensor that waits: it knows all but its values, and becomes an ordinary tensor when somebody wants those.

It says what it is (shape, dtype, device, ...) without its values, which a cast or an initialisation will give; aliases
of it wait for the same. Every other function first turns the tensor itself, the same Python object, into an ordinary
one, and then goes on as if it always had been. So nothing of ours is left in what has been computed with.

Imports torch: for our own modules, `deferred` is the way in.
"""

from __future__ import annotations

import copy
import os
import sys
import threading
import weakref
from contextlib import suppress
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_map

from wan_loader.errors import CheckpointError
from wan_loader.fastpath.deferral.facts import FACTS, overwrites
from wan_loader.fastpath.deferral.guards import Guards
from wan_loader.fastpath.deferral.waiting_init import WaitingInit
from wan_loader.fastpath.modes import without_modes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from wan_loader.fastpath.deferral.waiting_cast import WaitingCast

    Waiting = WaitingCast | WaitingInit

__all__ = [
    "Deferred",
    "cast_of",
    "defer_parameter",
    "give",
    "give_memory",
    "is_sole",
    "living",
    "settle",
    "settle_each",
    "settle_file",
    "waiting_of",
]


class Deferred(torch.Tensor):
    """A contiguous tensor on the CPU whose values are the outcome of something that waits. `give` makes it."""

    _waiting: Waiting
    _is_param: bool

    #: By this, others would take the memory of a tensor without asking it.
    __dlpack_c_exchange_api__ = None

    def __new__(cls, data: Any = None, requires_grad: bool = True) -> Any:
        """Make a parameter: libraries make one of the class that an old one has."""
        return torch.nn.Parameter(data, requires_grad)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Answer a function of torch without the values; else settle what waits, and call it again."""
        kwargs = kwargs or {}
        if func in FACTS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if overwrites(func) and (found := _overwrite(func, args, kwargs)) is not None:
            return found
        if (answer := _ANSWERS.get(func)) is not None and (found := answer(*args, **kwargs)) is not None:
            return None if found is _DONE else found
        args, kwargs = tree_map(_settled, (tuple(args), kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # the class of torch has no such method, only a place for one
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Compute with the outcome: what reaches torch from C++ has not asked `__torch_function__` before."""
        args, kwargs = tree_map(_outcome, (tuple(args), dict(kwargs or {})))
        return func(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Copy as the ordinary tensor that this becomes."""
        return copy.deepcopy(settle(self), memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle as the ordinary tensor that this becomes."""
        return settle(self).__reduce_ex__(protocol)

    # about these two methods torch does not ask

    def set_(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """Make the ordinary tensor that this becomes another one."""
        return settle(self).set_(*args, **kwargs)

    def as_subclass(self, cls: type) -> Any:
        """Return the ordinary tensor that this becomes as one of another class."""
        return settle(self).as_subclass(cls)

    def __repr__(self, **options: Any) -> str:  # type: ignore[override]
        """Show the ordinary tensor that this becomes."""
        return str(settle(self).__repr__(**options))


#: The tensors that wait, by their ids.
_living: dict[int, weakref.ref[Deferred]] = {}


def _note(tensor: Deferred) -> None:
    key = id(tensor)
    _living[key] = weakref.ref(tensor, lambda _: _forget(key))
    _guards.put_in()


def _forget(key: int) -> None:
    _living.pop(key, None)
    if not _living:
        _guards.take_out()


def give(waiting: Waiting, *, requires_grad: bool = False) -> Deferred:
    """Return a new tensor that waits for a cast or an initialisation. Costs 5 microseconds."""
    with torch._C.DisableTorchFunctionSubclass():
        tensor: Deferred = torch.Tensor._make_wrapper_subclass(
            Deferred, waiting.shape, dtype=waiting.dtype, device=torch.device("cpu"), requires_grad=requires_grad
        )
        # where it is not asked, that is an error, and no other memory
        torch._C._set_throw_on_mutable_data_ptr(tensor)
    tensor._waiting = waiting
    _note(tensor)
    return tensor


def cast_of(tensor: object) -> WaitingCast | None:
    """Return the cast that a tensor waits for; None if it waits for an initialisation, or is an ordinary one."""
    return None if isinstance(waiting := waiting_of(tensor), WaitingInit) else waiting


def waiting_of(tensor: object) -> Waiting | None:
    """Return what a tensor waits for; None if it is an ordinary one."""
    return vars(tensor).get("_waiting") if type(tensor) is Deferred else None


def is_sole(tensor: torch.Tensor) -> bool:
    """Say whether no other tensor waits for the same."""
    return _count_references(tensor) == _count_references(SimpleNamespace(_waiting=object()))


def _count_references(holder: Any) -> int:
    return sys.getrefcount(vars(holder)["_waiting"])


def settle(tensor: Any) -> Any:
    """Turn a tensor that waits into an ordinary one, the same object.

    Args:
        tensor: A tensor; an ordinary one stays as it is.

    Returns:
        The tensor. If C++ holds it, which cannot be told of a change, an ordinary one in its place, always the same.
    """
    if (waiting := waiting_of(tensor)) is None:
        return tensor
    return without_modes(lambda: _settle(tensor, waiting))


def _settle(tensor: Deferred, waiting: Waiting) -> torch.Tensor:
    with waiting.lock:
        if waiting_of(tensor) is not waiting:  # another thread was here
            return settle(tensor)  # type: ignore[no-any-return]
        attributes = vars(tensor)
        if (ordinary := attributes.get("_in_its_place")) is None:
            with torch._C.DisableTorchFunctionSubclass():
                ordinary = _like(tensor, waiting.outcome())
            if not _replace_by(tensor, ordinary):
                attributes["_in_its_place"] = ordinary
        return ordinary if type(tensor) is Deferred else tensor


def _like(tensor: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
    """Return an ordinary tensor on some memory, and be it a parameter, as the one that waits is."""
    if "_is_data" in vars(tensor):  # writes to it are not counted with those to what it was taken of
        memory = memory.data
    if "_is_param" in vars(tensor):
        return torch.nn.Parameter(memory, tensor.requires_grad)
    return memory.detach().requires_grad_(tensor.requires_grad)


def give_memory(tensor: torch.Tensor, waiting: Waiting, memory: torch.Tensor) -> bool:
    """Turn a tensor that waits into an ordinary one on other memory, as `tensor.data = memory` does; no mode is active.

    Returns:
        False if somebody has settled it already, or C++ holds it; then nothing was changed.
    """
    with waiting.lock, torch._C.DisableTorchFunctionSubclass():
        is_waiting = waiting_of(tensor) is waiting and not waiting.is_done
        return is_waiting and _replace_by(tensor, _like(tensor, memory))


def _replace_by(tensor: torch.Tensor, other: torch.Tensor) -> bool:
    """Make a tensor that waits what an ordinary one is, which is worth nothing afterwards; its attributes stay.

    As `torch.utils.swap_tensors`, but a tensor may be held by weak references: they go on leading to it.

    Returns:
        False if C++ holds one of both; then nothing was changed.
    """
    if _is_held(tensor) or _is_held(other):
        return False
    torch._C._swap_tensor_impl(tensor, other)
    # only now: what another thread sees meanwhile asks for the lock of what waits, or is ordinary
    tensor.__class__ = type(other)
    for name in ("_waiting", "_is_param", "_is_data"):
        vars(tensor).pop(name, None)
    _forget(id(tensor))
    return True


def _is_held(tensor: torch.Tensor) -> bool:
    """Say whether C++ holds a tensor beside Python, as graphs do: it would go on holding what the tensor was."""
    count: int = torch.Tensor._use_count(tensor)  # type: ignore[attr-defined]
    return count > 1


def defer_parameter(parameter: torch.Tensor, waiting: Waiting) -> bool:
    """Have a parameter, the same object, wait for a cast or an initialisation in place of what it is.

    Returns:
        False if C++ holds it; then nothing was changed.
    """
    if _is_held(parameter):
        return False
    is_parameter = isinstance(parameter, torch.nn.Parameter)
    deferred = give(waiting, requires_grad=parameter.requires_grad)
    with waiting.lock:
        # in this order, what another thread sees meanwhile asks for the lock
        vars(parameter).update({"_waiting": waiting} | ({"_is_param": True} if is_parameter else {}))
        parameter.__class__ = Deferred  # type: ignore[assignment]
        torch._C._swap_tensor_impl(parameter, deferred)
        _note(parameter)  # type: ignore[arg-type]
    return True


def living() -> list[Deferred]:
    """Return all tensors that wait."""
    return [tensor for one in list(_living.values()) if (tensor := one()) is not None]


def settle_each(tensors: Iterable[torch.Tensor]) -> None:
    """Turn tensors that wait into ordinary ones, as many as can be.

    Raises:
        CheckpointError: A file was modified since; what is of it waits still.
    """
    failures = []
    for tensor in tensors:
        try:
            settle(tensor)
        except CheckpointError as failure:
            failures.append(failure)
    if failures:
        raise failures[0]


def settle_file(path: Any) -> None:
    """Turn tensors whose casts wait for a file into ordinary ones, as many as can be.

    Raises:
        CheckpointError: The file was modified since; what is of it waits still.
    """
    if not _living:
        return
    try:
        wanted = os.stat(path)
    except (OSError, TypeError, ValueError):  # no file, or not one yet
        return
    casts = ((tensor, cast) for tensor in living() if (cast := cast_of(tensor)) is not None)
    settle_each([tensor for tensor, cast in casts if cast.file.is_of(wanted)])


def _audit(event: str, args: tuple[Any, ...]) -> None:
    """Look at what this process opens; Python cannot take this out again, and it does nothing when nothing waits."""
    if not _living:
        return
    opens_to_write = event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR)
    if opens_to_write or event == "os.truncate":
        with suppress(CheckpointError):  # whoever looks at what is left will be told
            settle_file(args[0])


sys.addaudithook(_audit)


def _renew_locks() -> None:
    """Forget, in a forked process, which threads of its parent were about to settle something: they are not here."""
    for tensor in living():
        if (waiting := waiting_of(tensor)) is not None:
            waiting.lock = threading.RLock()


os.register_at_fork(after_in_child=_renew_locks)


def _settled(value: Any, *, by: Any = None) -> Any:
    if isinstance(value, (list, tuple)):  # of a class of its own, which `tree_map` does not look into
        for each in value:
            _settled(each)
    return settle(value) if type(value) is Deferred and type(by) is not Deferred else value


def _settle_what_can_be() -> None:
    with suppress(CheckpointError):  # whoever looks at what is left will be told
        settle_each(living())


_guards = Guards(_settled, _settle_what_can_be)


def _outcome(value: Any) -> Any:
    if (waiting := waiting_of(value)) is None:
        return value
    return without_modes(waiting.outcome)


# What is answered without the values.

_DONE = object()
_CPU = torch.device("cpu")


def _alias(tensor: Any) -> Any:
    if (waiting := _answering(tensor)) is None:
        return None
    alias = give(waiting)
    if "_is_data" in vars(tensor):
        vars(alias)["_is_data"] = True
    return alias


def _data(tensor: Any, *_: Any) -> Any:
    if (alias := _alias(tensor)) is not None:
        vars(alias)["_is_data"] = True
    return alias


def _answering(tensor: Any) -> Waiting | None:
    """Return what a tensor waits for, unless an ordinary one has taken its place."""
    waiting = waiting_of(tensor)
    return waiting if waiting is not None and "_in_its_place" not in vars(tensor) else None


def _to(tensor: Any, *args: Any, **kwargs: Any) -> Any:
    """Return the tensor itself for a move and a conversion to what it is."""
    # `copy` stands behind `non_blocking`, which is of no consequence here
    behind = 2 if args and isinstance(args[0], torch.dtype | torch.Tensor) else 3
    if waiting_of(tensor) is None or any(arg is True for arg in (*args[behind:], kwargs.get("copy"))):
        return None
    kwargs.pop("copy", None)
    device, dtype, _, memory_format = torch._C._nn._parse_to(*args, **kwargs)
    return _converted(tensor, dtype) if device in (None, _CPU) and memory_format is None else None


def _as(dtype: torch.dtype | None) -> Callable[..., Any]:
    def answer(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        return _converted(tensor, dtype) if not args and not kwargs else None

    return answer


def _converted(tensor: Any, dtype: torch.dtype | None) -> Any:
    """Return a tensor for which nothing is to be done; one whose initialisation waits goes on doing so."""
    if dtype in (None, tensor.dtype):
        return tensor
    waiting = _answering(tensor)
    if not isinstance(waiting, WaitingInit) or (tensor.requires_grad and torch.is_grad_enabled()):
        return None
    return None if (converted := waiting.converted(dtype)) is None else give(converted)


def _set_data(tensor: Any, value: Any) -> Any:
    """Give a tensor that waits other memory: its own values are not wanted any more."""
    if tensor is value:
        return _DONE
    if (waiting := waiting_of(tensor)) is None:
        return None
    if (other := _answering(value)) is not None:
        with waiting.lock:
            return _DONE if defer_parameter(tensor, other) else None
    if type(value) is not torch.Tensor:
        return None
    # what torch refuses to give it, it refuses in its own words
    follows = not tensor.requires_grad or value.is_floating_point() or value.is_complex()
    if not follows or not _may_be_set(tensor, value):
        return None
    return _DONE if without_modes(lambda: give_memory(tensor, waiting, value)) else None


def _overwrite(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Call a function that gives a tensor all its values anew, without the initialisation that it waits for."""
    first, *others = (*args, *kwargs.values())
    waiting = waiting_of(first)
    if not isinstance(waiting, WaitingInit) or any(waiting_of(value) is waiting for value in others):
        return None
    call = waiting.give_up()
    try:
        args, kwargs = tree_map(_settled, (tuple(args), kwargs))
        return func(*args, **kwargs)
    except BaseException:
        if call is not None:
            without_modes(lambda: waiting.make(call))
        raise


def _may_be_set(tensor: Any, other: Any) -> bool:
    """Say whether a tensor can be given another one's memory, as modules ask before they do; else it is replaced."""
    if any("_in_its_place" in vars(one) for one in (tensor, other) if type(one) is Deferred):
        return False
    with torch._C.DisableTorchFunctionSubclass():
        return torch._has_compatible_shallow_copy_type(tensor, other)


_T: Any = torch.Tensor
_ANSWERS: dict[Any, Callable[..., Any]] = {
    _T.detach: _alias,
    torch.detach: _alias,
    _T.__getitem__: lambda tensor, index: _alias(tensor) if index is ... and not tensor.requires_grad else None,
    _T.data.__get__: _data,
    _T.data.__set__: _set_data,
    torch._has_compatible_shallow_copy_type: _may_be_set,
    _T.to: _to,
    _T.cpu: _as(None),
    _T.contiguous: _as(None),
    _T.bfloat16: _as(torch.bfloat16),
    _T.half: _as(torch.float16),
    _T.float: _as(torch.float32),
    _T.double: _as(torch.float64),
    _T.new_tensor: lambda tensor, *args, **kwargs: torch.empty(0, dtype=tensor.dtype, device=_CPU).new_tensor(
        *args, **kwargs
    ),
}
