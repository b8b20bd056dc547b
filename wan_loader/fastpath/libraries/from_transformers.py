"""The seam of transformers: weights that a model is given wait for their conversion, and go to a device by plan.

transformers converts each weight on the CPU, and moves it, one by one. Its two ways of loading have a place each where
that can be known of many weights before the first is touched:

    5   convert_and_load_state_dict_in_model, for a model, calls spawn_materialize for each weight, and only then waits
        for the first: here they are noted, and served together when the first is wanted
    4   _load_state_dict_into_meta_model, for a file (`transformers_four`)

Both are called as ever, so that rules, checks, warnings and errors stay. Only the values are others: on the CPU tensors
whose conversion waits, for a device tensors that are there already (`wanted`). The rest takes its usual way.
"""

from __future__ import annotations

import inspect
import threading
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from wan_loader.fastpath.libraries.left_alone import LeftAloneError
from wan_loader.fastpath.libraries.transformers_four import find_device, find_wanted, with_weights
from wan_loader.fastpath.libraries.wanted import Wanted, serve
from wan_loader.fastpath.modes import why_not_now
from wan_loader.fastpath.ours import ours

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import torch

    from wan_loader.fastpath.moving.moves import Moves
    from wan_loader.fastpath.patches import Patches
    from wan_loader.fastpath.tally import Tally

__all__ = ["FromTransformers"]

_FIVE, _FOUR = "transformers.core_model_loading", "transformers.modeling_utils"
_DIVIDED = "is divided among devices by transformers"


class _Asked(NamedTuple):
    """A weight that transformers 5 has asked for."""

    read: Callable[[], torch.Tensor]
    """Returns it as it is in its file."""
    dtype: torch.dtype | None
    device: Any
    begin: Callable[[], Any]
    """Has the original begin with it; returns the future."""


@dataclass(slots=True)
class FromTransformers:
    """The seam of the functions by which transformers' `from_pretrained` gives models weights."""

    tally: Tally
    moves: Moves
    """Fetches what goes to a device."""
    _thread: threading.local = field(default_factory=threading.local, repr=False)

    def install(self, patches: Patches) -> None:
        """Replace them, of whichever version is there."""
        of_model = ("model", "state_dict", "load_config")
        patches.replace(_FIVE, "convert_and_load_state_dict_in_model", self._instead_of_convert, of_model)
        of_weight = ("thread_pool", "tensor", "device", "dtype")
        patches.replace(_FIVE, "spawn_materialize", self._instead_of_spawn, of_weight)
        patches.replace(_FIVE, "spawn_tp_materialize", self._instead_of_shard)
        of_file = ("model", "state_dict", "device_map", "hf_quantizer")
        patches.replace(_FOUR, "_load_state_dict_into_meta_model", self._instead_of_fill, of_file)
        patches.replace(_FOUR, "_load_state_dict_into_model", self._instead_of_copy, ("assign_to_params_buffers",))

    def _instead_of_convert(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Have the weights that a model asks for known together."""
        signature = inspect.signature(original)

        def converted(*args: Any, **kwargs: Any) -> Any:
            outer, self._thread.asked = getattr(self._thread, "asked", None), None
            try:
                arguments = signature.bind(*args, **kwargs).arguments
                self._thread.asked = _AskedTogether(type(arguments["model"]).__name__, self.moves)
                _check_not_quantised(arguments["load_config"])
            except TypeError:  # the original will say so
                pass
            except LeftAloneError as reason:
                self.tally.leave(str(reason))
                self._thread.asked = None
            try:
                return original(*args, **kwargs)
            finally:
                self._thread.asked = outer

        return converted

    def _instead_of_spawn(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Note that a weight is asked for; what is returned is to be called for it, as transformers does."""

        def spawned(thread_pool: Any, tensor: Any, device: Any = None, dtype: Any = None, *args: Any, **kw: Any) -> Any:
            begin = partial(original, thread_pool, tensor, device, dtype, *args, **kw)
            asked: _AskedTogether | None = getattr(self._thread, "asked", None)
            if asked is None:
                return begin()
            if (why := _why_alone(thread_pool, device, args, kw)) is not None:
                self.tally.leave(why)
                return begin()
            return asked.add(_Asked(lambda: tensor[...], dtype, device, begin))

        return spawned

    def _instead_of_shard(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Tell of weights that are divided, by versions before 5.16."""

        def divided(*args: Any, **kwargs: Any) -> Any:
            self.tally.leave(_DIVIDED)
            return original(*args, **kwargs)

        return divided

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
                    arguments = self._fill(original, bound.arguments)
            except LeftAloneError as reason:
                self.tally.leave(str(reason))
                return original(*args, **kwargs)
            return original(**arguments)

        return filled

    def _fill(self, original: Callable[..., Any], arguments: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the arguments with which the original finds its work done, as far as that is certain."""
        if (mode := why_not_now()) is not None:
            raise LeftAloneError(mode)
        device = find_device(arguments)
        wanted = find_wanted(original, arguments)
        served = serve(type(arguments["model"]).__name__, wanted, device, self.moves)
        if not served:
            return arguments
        return with_weights(arguments, {name: weight.tensor for name, weight in wanted.items()} | served)

    def _instead_of_copy(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Tell of weights that are copied, by versions before 4.50."""

        def copied(model: Any, state: Any, prefix: Any, assign_to_params_buffers: Any = False) -> Any:
            if not assign_to_params_buffers:
                nbytes = sum(tensor.nbytes for tensor in state.values())
                self.tally.leave("is copied by transformers, as low_cpu_mem_usage is not True", nbytes)
            return original(model, state, prefix, assign_to_params_buffers)

        return copied


@dataclass(slots=True)
class _AskedTogether:
    """The weights that one model has asked transformers 5 for: all are served when the first one is wanted."""

    component: str
    moves: Moves
    _asked: list[_Asked] = field(default_factory=list)
    _ready: dict[int, Callable[[], Any]] = field(default_factory=dict)

    def add(self, asked: _Asked) -> Callable[[], Any]:
        """Note a weight. What is returned is to be called once, when all are noted, and returns it."""
        self._asked.append(asked)
        return partial(self._take, len(self._asked) - 1)

    def _take(self, number: int) -> Any:
        if not self._ready:
            with ours():
                served = self._serve()
            others = {n: asked.begin().result for n, asked in enumerate(self._asked) if str(n) not in served}
            self._ready = others | {int(name): partial(_itself, tensor) for name, tensor in served.items()}
            self._asked.clear()
        return self._ready.pop(number)()

    def _serve(self) -> dict[str, torch.Tensor]:
        """Return weights by their numbers, as far as that is certain."""
        import torch

        wanted: dict[torch.device, dict[str, Wanted]] = {}
        try:
            for number, asked in enumerate(self._asked):
                weight = Wanted(asked.read(), asked.dtype)
                wanted.setdefault(torch.device(asked.device), {})[str(number)] = weight
        except Exception:  # whatever it is, the original will meet it, too
            return {}
        served = dict[str, torch.Tensor]()
        for device, weights in wanted.items():
            served |= serve(self.component, weights, device, self.moves)
        return served


def _itself(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _check_not_quantised(config: Any) -> None:
    """Raise `LeftAloneError` if weights become something else than tensors of a dtype, or if that is not known."""
    if getattr(config, "hf_quantizer", config) is not None:
        raise LeftAloneError("is quantised by transformers")
    if (mode := why_not_now()) is not None:
        raise LeftAloneError(mode)


def _why_alone(thread_pool: Any, device: Any, args: tuple[Any, ...], others: dict[str, Any]) -> str | None:
    """Return why transformers 5 reads a weight by itself; None if it may wait for others.

    Args:
        thread_pool: Where it would be read.
        device: Where it goes.
        args: What is not known of the call.
        others: The same by name.
    """
    if thread_pool is None:
        return "is read one by one by transformers"
    # one of those that become one parameter: on the CPU it would be looked at right away
    if others.get("tensor_idx") is not None and str(device) == "cpu":
        return "is merged or split on the CPU by transformers"
    is_plain = all(value is None for name, value in others.items() if name != "tensor_idx")
    return None if is_plain and not args else _DIVIDED
