"""What transformers 4 is about to do with the weights of a file, from the arguments of the call that does it.

Of the function `_load_state_dict_into_meta_model` there were two kinds, which are told apart by their arguments:

    from 4.50 on    (model, state_dict, shard_file, ..., device_map, ...): `state_dict` is empty, `shard_file` is read,
                    unless that is no safetensors file; `_infer_parameter_dtype` knows what each weight becomes
    before          (model, state_dict, start_prefix, ..., device_map, ..., dtype, ...): `state_dict` has the weights
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from wan_loader.fastpath.libraries.left_alone import LeftAloneError
from wan_loader.fastpath.libraries.wanted import Wanted

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    import torch

__all__ = ["find_device", "find_wanted", "with_weights"]

_UNKNOWN_DTYPE = "is of a dtype that is not found as in transformers known here"


def find_device(arguments: Mapping[str, Any]) -> torch.device:
    """Return where all weights of a file go.

    Raises:
        LeftAloneError: They go to several devices, or more is asked for than that.
    """
    import torch

    if arguments.get("hf_quantizer") is not None:
        raise LeftAloneError("is quantised by transformers")
    if arguments.get("device_mesh") is not None:
        raise LeftAloneError("is divided among devices by transformers")
    if any(arguments.get(name) is not None for name in ("cpu_offload_index", "state_dict_index")):
        raise LeftAloneError("goes to a disk")
    try:
        devices = {torch.device(place) for place in (arguments.get("device_map") or {"": "cpu"}).values()}
    except (TypeError, ValueError, RuntimeError) as error:
        raise LeftAloneError("goes to something else than a device") from error
    if len(devices) > 1:
        raise LeftAloneError("goes to several devices")
    return devices.pop()


def find_wanted(original: Callable[..., Any], arguments: Mapping[str, Any]) -> dict[str, Wanted]:
    """Return the weights that a model is given from a file.

    Args:
        original: The function of transformers.
        arguments: All that it takes by name, defaults included.

    Raises:
        LeftAloneError: They cannot be had, or it is not known what they become.
    """
    return {
        name: Wanted(tensor, _dtype(original, arguments, name, tensor)) for name, tensor in _read_tensors(arguments)
    }


def with_weights(arguments: Mapping[str, Any], weights: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Return the arguments of a call that gives a model these weights, and reads no file for it."""
    changed = {**arguments, "state_dict": {**arguments["state_dict"], **weights}}
    return changed | {"shard_file": ""} if "shard_file" in arguments else changed


def _read_tensors(arguments: Mapping[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the weights as they are in their file."""
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
        raise LeftAloneError("cannot be read") from error


def _dtype(
    original: Callable[..., Any], arguments: Mapping[str, Any], name: str, tensor: torch.Tensor
) -> torch.dtype | None:
    """Return what a weight is converted to; None: it is not."""
    import torch

    if not {"start_prefix", "keep_in_fp32_modules", "dtype"} <= arguments.keys():
        infer: Any = getattr(inspect.unwrap(original), "__globals__", {}).get("_infer_parameter_dtype")
        keep_fp32 = arguments.get("keep_in_fp32_regex") or arguments.get("keep_in_fp32_modules")
        try:
            dtype: torch.dtype | None = infer(arguments["model"], name, tensor, keep_fp32, None)[1]
        except Exception as error:  # there is no such function, or the original will meet it, too
            raise LeftAloneError(_UNKNOWN_DTYPE) from error
        return dtype
    if arguments["dtype"] is None or not tensor.is_floating_point() or tensor.dtype == torch.float8_e4m3fn:
        return None  # what it is converted to nevertheless, if it is, is the original's business
    kept = set(arguments["keep_in_fp32_modules"] or ())
    is_kept = not kept.isdisjoint(name.removeprefix(arguments["start_prefix"]).split("."))
    return torch.float32 if is_kept and arguments["dtype"] == torch.float16 else arguments["dtype"]
