"""Hooks on torch: copies, conversions, construction, random initialisation, loading, sharding, CUDA's start.

They are put in place once torch has been imported. Copies and conversions of less than 64 kB are left alone.
"""

from __future__ import annotations

import functools
import os
import types
from _weakref import ref

from .recorder import MIN_BYTES
from .wrap import drop_frame, patch, timed

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

__all__ = ["hook_distributed", "hook_torch"]

_MOVES = ("to", "cuda", "half", "bfloat16", "float", "double", "type", "clone", "contiguous", "pin_memory")
_RANDOM = ("uniform_", "normal_", "exponential_", "random_", "bernoulli_", "log_normal_", "cauchy_")
#: What processes do together, and wait for each other in.
_TOGETHER = (
    "init_process_group",
    "fully_shard",
    "barrier",
    "monitored_barrier",
    "broadcast",
    "broadcast_object_list",
    "all_reduce",
    "all_gather",
    "all_gather_object",
    "all_gather_into_tensor",
    "scatter",
    "gather",
    "reduce_scatter_tensor",
    "recv",
)

#: Label of a move whose kind is not known yet.
_MOVE = "move"

# types of which nbytes can be read directly; subclasses may answer with Python code of their own
_plain: set[Any] = set()
_overrides: list[Any] = []


def _without_overrides() -> Any:
    return _overrides[0]()


def hook_torch(recorder: Any, torch: Any) -> None:
    """Wrap what a start-up spends its time in."""
    _plain.update((torch.Tensor, torch.nn.Parameter))
    _overrides.append(torch._C.DisableTorchFunction)
    for name in _MOVES:
        patch(recorder, torch.Tensor, name, lambda f: _move(recorder, torch, f))
    patch(recorder, torch.Tensor, "copy_", lambda f: _copy(recorder, torch, f))
    for name in _RANDOM:
        patch(recorder, torch.Tensor, name, lambda f: _random(recorder, f))
    for name in dir(torch.nn.init):
        if name.endswith("_") and not name.startswith("_") and callable(getattr(torch.nn.init, name)):
            patch(
                recorder, torch.nn.init, name, lambda f, n=name: timed(recorder, f, "random_init", "torch.nn.init." + n)
            )
    patch(recorder, torch.nn.Module, "load_state_dict", lambda f: timed(recorder, f, "assign", "load_state_dict"))
    patch(recorder, torch.cuda, "_lazy_init", lambda f: timed(recorder, f, "cuda_init", "CUDA"))
    patch(recorder, torch.cuda, "synchronize", lambda f: timed(recorder, f, "wait", "torch.cuda.synchronize"))
    for name in ("to", "clone"):  # copy.deepcopy clones storages
        patch(recorder, torch.storage._StorageBase, name, lambda f: _move(recorder, torch, f))
    _hook_load(recorder, torch)
    _hook_modules(recorder, torch.nn.Module)
    hook_distributed(recorder, torch.distributed)
    recorder.facts["torch"] = str(torch.__version__)


def _hook_load(recorder: Any, torch: Any) -> Any:
    def nbytes_of(before: Any) -> Any:
        read, called = recorder.io()
        return max(read - before[0], called - before[1])

    def make(load: Any) -> Any:
        inner = timed(recorder, load, "read", "torch.load", nbytes_of)

        @functools.wraps(load)
        def wrapper(f: Any, *args: Any, **kwargs: Any) -> Any:
            if recorder.on and (path := _path_of(f)) is not None:
                recorder.file(path, "torch.load", bool(kwargs.get("mmap")))
            try:
                return inner(f, *args, **kwargs)
            except BaseException as error:
                drop_frame(error)
                raise

        return wrapper

    patch(recorder, torch, "load", make)


def _path_of(file: Any) -> Any:
    """Return the path of a file that may be given by its path or open; None where it has none."""
    try:
        name = file if isinstance(file, (str, os.PathLike)) else file.name
        return None if isinstance(name, int) else os.fspath(name)
    except Exception:
        return None


def _size(tensor: Any) -> Any:
    """Count the bytes of a tensor or a storage, without calling what a subclass of the program's own overrides."""
    try:
        if type(tensor) in _plain:
            return tensor.nbytes
        with _without_overrides():
            return tensor.nbytes() if callable(tensor.nbytes) else tensor.nbytes
    except Exception:
        return 0


def _move(recorder: Any, torch: Any, original: Any) -> Any:
    """Wrap a method that returns the tensor elsewhere, or as another dtype, or itself."""

    @functools.wraps(original)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not recorder.on or _size(self) < MIN_BYTES or _moving(recorder):
            return _plainly(original, self, *args, **kwargs)
        # asked for before: afterwards the context is there
        fresh, before = _context_missing(torch), _counters(recorder, self)
        recorder.begin("h2d", _MOVE)
        result = self
        try:
            result = original(self, *args, **kwargs)
            return result
        except BaseException as error:
            drop_frame(error)
            raise
        finally:
            _close(recorder, torch, self, result, before, fresh)

    return wrapper


def _copy(recorder: Any, torch: Any, original: Any) -> Any:
    @functools.wraps(original)
    def copy_(self: Any, src: Any, *args: Any, **kwargs: Any) -> Any:
        if not recorder.on or _size(self) < MIN_BYTES or _moving(recorder):
            return _plainly(original, self, src, *args, **kwargs)
        fresh, before = _context_missing(torch), _counters(recorder, src)
        recorder.begin("h2d", _MOVE)
        try:
            return original(self, src, *args, **kwargs)
        except BaseException as error:
            drop_frame(error)
            raise
        finally:
            _close(recorder, torch, src, self, before, fresh)

    return copy_


def _moving(recorder: Any) -> Any:
    """Tell whether this is a part of another move, as in tensor subclasses: only the whole is recorded."""
    around = recorder.around()
    return around is not None and around[1] is _MOVE


def _counters(recorder: Any, source: Any) -> Any:
    """Return the counters before a move; None where it cannot cause page faults, since the source is on a GPU."""
    return None if type(source) in _plain and source.is_cuda else recorder.counters()


def _plainly(original: Any, *args: Any, **kwargs: Any) -> Any:
    """Call without recording."""
    try:
        return original(*args, **kwargs)
    except BaseException as error:
        drop_frame(error)
        drop_frame(error)
        raise


def _close(recorder: Any, torch: Any, source: Any, target: Any, before: Any, fresh: Any) -> None:
    """Close the span of a move under the name that it turned out to deserve. Never raises."""
    kind = None
    try:
        with _without_overrides():
            if source is not target:
                kind = _classify(torch, source, target, fresh)
            nbytes = _size(source)
    except Exception:
        kind = None
    if kind is None:
        recorder.drop()
    else:
        recorder.end(0 if kind[0] == "cuda_init" else nbytes, kind, before)


def _classify(torch: Any, source: Any, target: Any, fresh: Any) -> Any:
    """Find (name, label) of a move; None for one that moves nothing."""
    here, there = source.device.type, target.device.type
    if here == "meta" or there == "meta":
        return None
    cast = getattr(source, "dtype", None) != getattr(target, "dtype", None)
    if fresh and there == "cuda" and not _context_missing(torch) and _size(source) < 1 << 28:
        return "cuda_init", "CUDA context, with the first copy"
    if here == "cpu" and there != "cpu":
        label = ("pinned" if source.is_pinned() else "pageable") + " host to " + there
        return ("cast", "converting copy, " + label) if cast else ("h2d", label)
    if cast:
        return "cast", f"{_short(source.dtype)} to {_short(target.dtype)} on the {here.upper()}"
    return ("h2d", "copy in host memory") if here == "cpu" else None


def _short(dtype: Any) -> Any:
    return str(dtype).replace("torch.", "")


def _context_missing(torch: Any) -> Any:
    """Tell whether the GPU still has no context: the first copy will make it."""
    try:
        if not torch.cuda.is_initialized():  # asking for the device would initialise it
            return True
        return not torch._C._cuda_hasPrimaryContext(torch.cuda.current_device())
    except Exception:
        return False


def _random(recorder: Any, original: Any) -> Any:
    @functools.wraps(original)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not recorder.on or _size(self) < MIN_BYTES or self.device.type == "meta":
            return _plainly(original, self, *args, **kwargs)
        recorder.begin("random_init", original.__name__)
        try:
            return original(self, *args, **kwargs)
        except BaseException as error:
            drop_frame(error)
            raise
        finally:
            recorder.end(_size(self))

    return wrapper


def _hook_modules(recorder: Any, module_class: Any) -> None:
    """Time the construction of the outermost module. Classes made later are wrapped as they are made."""
    building: set[int] = set()

    def visit(cls: Any) -> None:
        _wrap_init(recorder, cls, building)
        for sub in cls.__subclasses__():
            visit(sub)

    for cls in module_class.__subclasses__():
        visit(cls)

    def __init_subclass__(cls: Any, **kwargs: Any) -> None:
        super(module_class, cls).__init_subclass__(**kwargs)
        _wrap_init(recorder, cls, building)

    # a torch that has one of its own keeps it: classes made later are then not seen
    if "__init_subclass__" not in vars(module_class):
        hook: Any = __init_subclass__
        module_class.__init_subclass__ = classmethod(hook)
        recorder.undo.append(lambda: delattr(module_class, "__init_subclass__"))


def _wrap_init(recorder: Any, cls: Any, building: Any) -> Any:
    init = vars(cls).get("__init__")
    if not isinstance(init, types.FunctionType):
        return
    from _thread import get_ident

    name = "shard" if cls.__name__ == "FullyShardedDataParallel" else "construct"

    @functools.wraps(init)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> Any:
        me = get_ident()
        # submodules are a part of the outermost one; sharding is told apart wherever it happens
        outermost = recorder.on and (me not in building or name == "shard")
        if outermost:
            building.add(me)
            recorder.begin(name, type(self).__name__)
        try:
            return init(self, *args, **kwargs)
        except BaseException as error:
            drop_frame(error)
            raise
        finally:
            if outermost:
                building.discard(me)
                recorder.end()

    try:
        cls.__init__ = __init__
    except (TypeError, AttributeError):
        return
    alive = ref(cls)

    def undo() -> None:
        owner = alive()
        if owner is not None and vars(owner).get("__init__") is __init__:
            owner.__init__ = init

    recorder.undo.append(undo)


def hook_distributed(recorder: Any, distributed: Any) -> None:
    """Wrap sharding and the process group, by whatever of it this module offers."""
    for name in _TOGETHER:
        patch(recorder, distributed, name, lambda f, n=name: timed(recorder, f, "shard", n))
