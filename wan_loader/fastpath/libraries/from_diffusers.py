"""The seam of diffusers: weights that a model is given wait for their conversion, and go to a device by plan.

diffusers gives weights to a model in one function, file by file, and `from_single_file` and adapters do so, too. It
converts each tensor on the CPU and then moves it, one after the other:

    load_model_dict_into_meta(model, state_dict, dtype=..., keep_in_fp32_modules=..., device_map=...)

It is called as ever, with other values for what is a range of a file, proven: tensors that are not converted when they
are asked to be, but when they move or are looked at. So the rules of what becomes what stay where they are, and with
them checks, warnings and errors. What a `device_map` has on a GPU is first given as if for the CPU and then fetched, by
one plan a file; what was not fetched is given once more, as the program has asked for it.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from wan_loader.fastpath.libraries.left_alone import LeftAloneError
from wan_loader.fastpath.modes import why_not_now
from wan_loader.fastpath.ours import ours

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    import torch

    from wan_loader.fastpath.moving.moves import Moves
    from wan_loader.fastpath.patches import Patches
    from wan_loader.fastpath.tally import Tally

__all__ = ["FromDiffusers"]

#: What the function must take. Where the weights go it is told as `device_map`, until 0.32 as `device`.
_PARAMETERS = ("model", "state_dict", "dtype", "hf_quantizer", "keep_in_fp32_modules")
#: Arguments with which it does more than is known here, and what it does then.
_LEFT = {
    "hf_quantizer": "is quantised by diffusers",
    "offload_index": "goes to a disk",
    "state_dict_index": "goes to a disk",
}


class _Place(NamedTuple):
    """The place of a tensor in a model."""

    owner: dict[str, Any]
    key: str
    is_parameter: bool

    @property
    def tensor(self) -> torch.Tensor:
        """What is there now."""
        tensor: torch.Tensor = self.owner[self.key]
        return tensor


@dataclass(frozen=True, slots=True)
class FromDiffusers:
    """The seam of `load_model_dict_into_meta`, by which diffusers gives models their weights."""

    tally: Tally
    moves: Moves
    """Fetches what goes to a device."""

    def install(self, patches: Patches) -> None:
        """Replace the function."""
        module, name = "diffusers.models.model_loading_utils", "load_model_dict_into_meta"
        patches.replace(module, name, self._instead_of, _PARAMETERS)
        patches.replace(module, "_load_shard_file", _with_state, ("model", "model_state_dict", "hf_quantizer"))

    def _instead_of(self, original: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(original)

        def given(*args: Any, **kwargs: Any) -> Any:
            if (arguments := _bound(signature, args, kwargs)) is None:
                return original(*args, **kwargs)
            return self._give(original, arguments)

        return given

    def _give(self, original: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        """Give a model the weights of a file."""
        model, state = arguments["model"], arguments["state_dict"]
        places = {name: place for name in state if (place := _place(model, name)) is not None}
        try:
            with ours():
                devices = _devices(original, arguments, places)
                dtypes = _expected_casts(state, places, arguments)
                values = {**state, **self._waiting({name: state[name] for name in dtypes}, dtypes)}
        except LeftAloneError as reason:
            self.tally.leave(str(reason), sum(getattr(tensor, "nbytes", 0) for tensor in state.values()))
            return original(**arguments)
        planned = {
            name: device
            for name, device in devices.items()
            if self._is_planned(device)
            and _fits(state[name], places[name])
            and (name not in dtypes or values[name] is not state[name])
        }
        fetched = self._fetch(original, arguments, values, places, planned) if planned else set()
        # what was to be fetched and was not goes its usual way, as what it always was
        rest = {n: state[n] if n in planned else value for n, value in values.items() if n not in fetched}
        return original(**{**arguments, "state_dict": rest})

    def _waiting(
        self, sources: Mapping[str, torch.Tensor], dtypes: Mapping[str, torch.dtype]
    ) -> dict[str, torch.Tensor]:
        """Return tensors of which the conversion waits, once they are asked to be of those dtypes."""
        from wan_loader.fastpath.deferral.convertible import Convertible
        from wan_loader.fastpath.deferral.waiting_cast import find_casts

        casts = find_casts(sources, dtypes, self.tally)
        return {name: Convertible.of(sources[name], cast) for name, cast in casts.items()}

    def _is_planned(self, device: torch.device) -> bool:
        """Say whether weights for a device are fetched; those for the CPU stay in their files for now."""
        import torch

        return self.moves.plans_to(device) and device != torch.device("cpu")

    def _fetch(
        self,
        original: Callable[..., Any],
        arguments: dict[str, Any],
        values: Mapping[str, torch.Tensor],
        places: Mapping[str, _Place],
        planned: Mapping[str, torch.device],
    ) -> set[str]:
        """Give a model some of its weights on the CPU, where nothing is done with them yet, and move them by plan.

        Returns:
            The names of those that are where they belong.
        """
        given = {name: value for name, value in arguments.items() if name not in ("device_map", "device")}
        original(**{**given, "state_dict": {name: values[name] for name in planned}})
        component, fetched = type(arguments["model"]).__name__, set[str]()
        with ours():
            for device in set(planned.values()):
                tensors = {name: places[name].tensor for name, target in planned.items() if target == device}
                fetched |= self.moves.fetch_tensors(component, tensors, device).keys()
        return fetched


def _bound(signature: inspect.Signature, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return arguments by their names; None where they do not fit, which the original will say."""
    try:
        return signature.bind(*args, **kwargs).arguments
    except TypeError:
        return None


def _with_state(original: Callable[..., Any]) -> Callable[..., Any]:
    """Have `model.state_dict()` give what diffusers has asked for before, while it gives a model the weights of a file.

    Only names and shapes are wanted of it, which do not change, and the walk through the model takes longer than all
    else that is done for a file.
    """
    signature = inspect.signature(original)

    def load(*args: Any, **kwargs: Any) -> Any:
        arguments = _bound(signature, args, kwargs) or {}
        model: Any = arguments.get("model")
        state = arguments.get("model_state_dict")
        if not state or arguments.get("hf_quantizer") is not None or "state_dict" in vars(model):
            return original(*args, **kwargs)
        # on the object: other models of its class are not touched
        vars(model)["state_dict"] = lambda *args, **kwargs: (
            type(model).state_dict(model, *args, **kwargs) if args or kwargs else state
        )
        try:
            return original(*args, **kwargs)
        finally:
            vars(model).pop("state_dict", None)

    return load


def _place(model: torch.nn.Module, name: str) -> _Place | None:
    """Return where a model has a tensor; None if it has none of that name."""
    *path, key = name.split(".")
    module = model
    for part in path:
        if (child := module._modules.get(part)) is None:
            return None
        module = child
    if module._parameters.get(key) is not None:
        return _Place(module._parameters, key, is_parameter=True)
    return _Place(module._buffers, key, is_parameter=False) if module._buffers.get(key) is not None else None


def _devices(
    original: Callable[..., Any], arguments: Mapping[str, Any], names: Iterable[str]
) -> dict[str, torch.device]:
    """Return where each tensor goes.

    Raises:
        LeftAloneError: That is not known, or more than that is asked for.
    """
    import torch

    if (mode := why_not_now()) is not None:
        raise LeftAloneError(mode)
    for name, why in _LEFT.items():
        if arguments.get(name) is not None:
            raise LeftAloneError(why)
    device_map = arguments.get("device_map")
    if device_map is None:
        return dict.fromkeys(names, torch.device(arguments.get("device") or "cpu"))
    try:
        find = inspect.unwrap(original).__globals__["_determine_param_device"]
        return {name: torch.device(find(name, device_map)) for name in names}
    except (LookupError, TypeError, ValueError, RuntimeError) as error:  # the original says what is wrong, if it is
        raise LeftAloneError("goes to something else than a device, or diffusers finds it in another way") from error


def _expected_casts(
    state: Mapping[str, torch.Tensor], places: Mapping[str, _Place], arguments: Mapping[str, Any]
) -> dict[str, torch.dtype]:
    """Guess what diffusers will convert, and to what. Where that is wrong, it is converted at once, as ever."""
    import torch

    from wan_loader.plan.dtype_policy import has_part

    kept = arguments.get("keep_in_fp32_modules") or ()
    dtypes = {}
    for name, place in places.items():
        dtype = torch.float32 if has_part(name, kept) else arguments.get("dtype") or place.tensor.dtype
        if state[name].is_floating_point() and state[name].dtype != dtype:
            dtypes[name] = dtype
    return dtypes


def _fits(tensor: torch.Tensor, place: _Place) -> bool:
    """Say whether a tensor is for a parameter of its shape; of another, the original complains."""
    return place.is_parameter and tensor.shape == place.tensor.shape
