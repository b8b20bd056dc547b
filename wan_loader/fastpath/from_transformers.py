"""The seam of transformers: weights that a model is given wait for their conversion, and go to a device by plan.

transformers converts each weight on the CPU, and moves it by itself. Its two ways of loading have a place each where
that can be known of all weights before the first is touched:

    5          convert_and_load_state_dict_in_model(model, state_dict, load_config)
                   spawn_materialize(threads, weight, device, dtype) -> for each weight, before any is waited for
    4.50 on    _load_state_dict_into_meta_model(model, state_dict, shard_file), file by file; what each weight becomes
                   is known from _infer_parameter_dtype
    4 before   the same with other arguments, if low_cpu_mem_usage=True, as diffusers asks for

All are called as ever, so that rules, checks, warnings and errors stay. Only the values are others: on the CPU, tensors
whose conversion waits (`deferred`); for a device, tensors that are there already, fetched by one plan. Both is done for
what is a range of a file, proven. The rest takes its usual way.
"""

from __future__ import annotations

import inspect
import threading
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from wan_loader.fastpath.deferred import defer_all, is_deferred
from wan_loader.fastpath.modes import why_not_now
from wan_loader.fastpath.ours import ours

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    import torch

    from wan_loader.fastpath.moves import Moves
    from wan_loader.fastpath.patches import Patches
    from wan_loader.fastpath.tally import Tally

__all__ = ["FromTransformers"]

_QUANTISED = "is quantised by transformers"
_SHARDED = "is divided among devices by transformers"


class _LeftAloneError(Exception):
    """A call is for the original; the message says why. Never leaves this module."""


class _Wanted(NamedTuple):
    """A weight as it is in its file, and what it is to become; None: it stays of its dtype."""

    tensor: torch.Tensor
    dtype: torch.dtype | None

    @property
    def converts(self) -> bool:
        """Whether it becomes something else."""
        return self.dtype is not None and self.dtype != self.tensor.dtype

    @property
    def is_plain(self) -> bool:
        """Whether it is as it comes from a file: no parameter, nothing of a class of its own."""
        import torch

        return type(self.tensor) is torch.Tensor and not self.tensor.requires_grad


class _Asked(NamedTuple):
    """A weight that transformers 5 has asked for."""

    read: Callable[[], torch.Tensor]
    dtype: torch.dtype | None
    device: Any
    plain: Callable[[], Any]
    """The call that has the original begin with it."""


@dataclass(slots=True)
class FromTransformers:
    """The seam of the functions by which transformers' `from_pretrained` gives models weights."""

    tally: Tally
    moves: Moves
    """Fetches what goes to a device."""
    _thread: threading.local = field(default_factory=threading.local, repr=False)

    def install(self, patches: Patches) -> None:
        """Replace them, in whichever version is there."""
        five, four = "transformers.core_model_loading", "transformers.modeling_utils"
        parameters = ("model", "state_dict", "load_config")
        patches.replace(five, "convert_and_load_state_dict_in_model", self._instead_of_convert, parameters)
        patches.replace(five, "spawn_materialize", self._instead_of_spawn, ("thread_pool", "tensor", "device", "dtype"))
        parameters = ("model", "state_dict", "device_map", "hf_quantizer")
        patches.replace(four, "_load_state_dict_into_meta_model", self._instead_of_fill, parameters)
        patches.replace(four, "_load_state_dict_into_model", self._instead_of_copy, ("assign_to_params_buffers",))

    def _instead_of_convert(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Have the weights that one model asks for known together."""
        signature = inspect.signature(original)

        def converted(*args: Any, **kwargs: Any) -> Any:
            outer, self._thread.asked = getattr(self._thread, "asked", None), None
            try:
                arguments = signature.bind(*args, **kwargs).arguments
                if getattr(arguments["load_config"], "hf_quantizer", arguments) is not None:
                    self.tally.leave(_QUANTISED)
                elif (mode := why_not_now()) is not None:
                    self.tally.leave(mode)
                else:
                    self._thread.asked = _AskedTogether(self, type(arguments["model"]).__name__)
            except (TypeError, KeyError):  # the original will say so
                pass
            try:
                return original(*args, **kwargs)
            finally:
                self._thread.asked = outer

        return converted

    def _instead_of_spawn(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Note that a weight is asked for; what is returned is called for it when it is wanted."""

        def spawned(
            thread_pool: Any, tensor: Any, device: Any = None, dtype: Any = None, *args: Any, **kwargs: Any
        ) -> Any:
            plain = partial(original, thread_pool, tensor, device, dtype, *args, **kwargs)
            asked: _AskedTogether | None = getattr(self._thread, "asked", None)
            if asked is None:
                return plain()
            if (why := _why_alone(thread_pool, device, args, kwargs)) is not None:
                self.tally.leave(why)
                return plain()
            return asked.add(_Asked(lambda: tensor[...], dtype, device, plain))

        return spawned

    def _instead_of_fill(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Give a model of transformers 4 the weights of a file."""
        signature = inspect.signature(original)

        def filled(*args: Any, **kwargs: Any) -> Any:
            try:
                bound = signature.bind(*args, **kwargs)
            except TypeError:  # the original will say so
                return original(*args, **kwargs)
            bound.apply_defaults()
            try:
                with ours():
                    bound.arguments |= self._filled(original, bound.arguments)
            except _LeftAloneError as reason:
                self.tally.leave(str(reason))
            return original(*bound.args, **bound.kwargs)

        return filled

    def _instead_of_copy(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Tell that weights are copied, where they are."""

        def copied(model: Any, state: Any, prefix: Any, assign_to_params_buffers: Any = False) -> Any:
            if not assign_to_params_buffers:
                nbytes = sum(tensor.nbytes for tensor in state.values())
                self.tally.leave("is copied by transformers, as low_cpu_mem_usage is not True", nbytes)
            return original(model, state, prefix, assign_to_params_buffers)

        return copied

    def _filled(self, original: Callable[..., Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments of the original that are to be others: the weights, of a file that is not read again.

        Raises:
            _LeftAloneError: More is asked for than is known here.
        """
        device = _only_device(arguments)
        wanted = dict[str, _Wanted]()
        for name, tensor in _tensors(arguments):
            wanted[name] = _Wanted(tensor, _dtype(original, arguments, name, tensor))
        served = self.serve(type(arguments["model"]).__name__, wanted, device)
        if not served:
            return {}
        state = {name: wanted[name].tensor if name in wanted else t for name, t in arguments["state_dict"].items()}
        return {"state_dict": {**state, **served}} | ({"shard_file": ""} if "shard_file" in arguments else {})

    def serve(self, component: str, wanted: Mapping[str, _Wanted], device: torch.device) -> dict[str, torch.Tensor]:
        """Return what weights become, of those of which it is certain, as the original would have made them.

        Args:
            component: The class of the model.
            wanted: Weights on the CPU, by any names.
            device: Where they are to be.
        """
        import torch

        is_move = device != torch.device("cpu")
        if is_move and device.type not in self.moves.kinds:
            self.tally.leave(f"goes to a device of kind {device.type}")
            return {}
        weights = {name: weight for name, weight in wanted.items() if weight.is_plain and (is_move or weight.converts)}
        if sum(weight.tensor.nbytes for weight in weights.values()) < self.moves.min_nbytes:
            return {}
        casts = {name: weight for name, weight in weights.items() if weight.converts}
        values = defer_all({n: w.tensor for n, w in casts.items()}, {n: w.dtype for n, w in casts.items()}, self.tally)
        if not is_move:
            return values
        # the program may hold the others: they stay as they are
        return self._fetch(component, {n: w.tensor.detach() for n, w in weights.items()} | values, device)

    def _fetch(self, component: str, values: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
        """Move tensors by one plan; return those that have moved."""
        import torch

        holder: torch.nn.Module = type(component, (torch.nn.Module,), {})()
        holder._parameters.update(values)  # type: ignore[arg-type]
        self.moves.fetch(holder, device, None)
        moved = holder._parameters.items()
        return {name: t for name, t in moved if t is not None and t.device.type == device.type and not is_deferred(t)}


@dataclass(slots=True)
class _AskedTogether:
    """The weights that one model has asked transformers 5 for: all are served when the first one is wanted."""

    seam: FromTransformers
    component: str
    _asked: list[_Asked] = field(default_factory=list)
    _ready: dict[int, Callable[[], Any]] = field(default_factory=dict)

    def add(self, asked: _Asked) -> Callable[[], Any]:
        """Note a weight; call what is returned for it, once."""
        self._asked.append(asked)
        return partial(self._take, len(self._asked) - 1)

    def _take(self, number: int) -> Any:
        if not self._ready:
            with ours():
                served = self._serve()
            plain = {n: asked.plain().result for n, asked in enumerate(self._asked) if str(n) not in served}
            self._ready = plain | {int(name): partial(_itself, tensor) for name, tensor in served.items()}
        return self._ready.pop(number)()

    def _serve(self) -> dict[str, torch.Tensor]:
        """Return weights by their numbers, as far as that is certain."""
        import torch

        wanted: dict[torch.device, dict[str, _Wanted]] = {}
        try:
            for number, asked in enumerate(self._asked):
                weight = _Wanted(asked.read(), asked.dtype)
                wanted.setdefault(torch.device(asked.device), {})[str(number)] = weight
        except Exception:  # whatever it is, the original will meet it, too
            return {}
        served = dict[str, torch.Tensor]()
        for device, weights in wanted.items():
            served |= self.seam.serve(self.component, weights, device)
        return served


def _itself(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _why_alone(thread_pool: Any, device: Any, args: tuple[Any, ...], others: dict[str, Any]) -> str | None:
    """Return why transformers 5 reads a weight by itself; None if it may wait for others."""
    if thread_pool is None:
        return "is read one by one by transformers"
    # the number of a tensor among those that become one parameter, on the CPU at once
    if others.pop("tensor_idx", None) is not None and str(device) == "cpu":
        return "is merged or split on the CPU by transformers"
    return _SHARDED if args or any(value is not None for value in others.values()) else None


def _only_device(arguments: Mapping[str, Any]) -> torch.device:
    """Return where transformers 4 has all weights of a file go.

    Raises:
        _LeftAloneError: They go to several devices, or more is asked for than that.
    """
    import torch

    if (mode := why_not_now()) is not None:
        raise _LeftAloneError(mode)
    if arguments.get("hf_quantizer") is not None:
        raise _LeftAloneError(_QUANTISED)
    if arguments.get("device_mesh") is not None:
        raise _LeftAloneError(_SHARDED)
    if any(arguments.get(name) is not None for name in ("cpu_offload_index", "state_dict_index")):
        raise _LeftAloneError("goes to a disk")
    try:
        devices = {torch.device(place) for place in (arguments.get("device_map") or {"": "cpu"}).values()}
    except (TypeError, ValueError, RuntimeError) as error:
        raise _LeftAloneError("goes to something else than a device") from error
    if len(devices) > 1:
        raise _LeftAloneError("goes to several devices")
    return devices.pop()


def _tensors(arguments: Mapping[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the weights that transformers 4 gives a model from a file, as they are there.

    Raises:
        _LeftAloneError: They cannot be had.
    """
    from safetensors import safe_open

    state, path = arguments["state_dict"], arguments.get("shard_file", "")
    expected = set(arguments.get("expected_keys", state))
    names = [name for name in state if name in expected]
    if not path.endswith(".safetensors"):
        yield from ((name, state[name]) for name in names)
        return
    try:
        with safe_open(path, framework="pt") as file:
            for name in names:
                yield name, file.get_tensor(arguments["reverse_renaming_mapping"][name])
    except Exception as error:  # whatever it is, the original will meet it, too
        raise _LeftAloneError("cannot be read") from error


def _dtype(
    original: Callable[..., Any], arguments: Mapping[str, Any], name: str, tensor: torch.Tensor
) -> torch.dtype | None:
    """Return what transformers 4 converts a weight to; None: it does not.

    Raises:
        _LeftAloneError: That is not known.
    """
    import torch

    model = arguments["model"]
    if (infer := getattr(inspect.unwrap(original), "__globals__", {}).get("_infer_parameter_dtype")) is not None:
        keep_fp32 = arguments.get("keep_in_fp32_regex") or arguments.get("keep_in_fp32_modules")
        try:
            dtype: torch.dtype | None = infer(model, name, tensor, keep_fp32, None)[1]
        except Exception as error:
            raise _LeftAloneError("is of a dtype that is not found as in transformers known here") from error
        return dtype
    if not {"start_prefix", "keep_in_fp32_modules", "dtype"} <= arguments.keys():
        raise _LeftAloneError("is of a dtype that is not found as in transformers known here")
    if arguments["dtype"] is None or not tensor.is_floating_point() or tensor.dtype == torch.float8_e4m3fn:
        return None  # what it is converted to nevertheless, if it is, is the original's business
    kept = set(arguments["keep_in_fp32_modules"] or ())
    is_kept = not kept.isdisjoint(name.removeprefix(arguments["start_prefix"]).split("."))
    return torch.float32 if is_kept and arguments["dtype"] == torch.float16 else arguments["dtype"]
