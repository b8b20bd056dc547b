"""Stand-ins for how transformers 4 gives a model its weights, written here: the same arguments, the same order of work.

`scripts/library-matrix` runs the tests with the real ones.
"""

import re

import torch
from safetensors import safe_open


def _infer_parameter_dtype(model, param_name, empty_param, keep_in_fp32_regex=None, hf_quantizer=None):
    old = model.get_parameter(param_name)
    dtype = None
    if empty_param.dtype.is_floating_point:
        is_kept = keep_in_fp32_regex is not None and keep_in_fp32_regex.search(param_name)
        dtype = torch.float32 if is_kept else old.dtype
    return old.is_contiguous(), dtype


@torch.no_grad()
def fill_from_file(
    model,
    state_dict,
    shard_file,
    expected_keys,
    reverse_renaming_mapping,
    device_map=None,
    cpu_offload_index=None,
    hf_quantizer=None,
    keep_in_fp32_regex=None,
    device_mesh=None,
):
    """As from 4.50 on: what `state_dict` has is empty, and the file is read here, unless it is no safetensors."""
    file = safe_open(shard_file, framework="pt") if shard_file.endswith(".safetensors") else None
    for name, empty in state_dict.items():
        if name not in expected_keys:
            continue
        tensor = empty if file is None else file.get_slice(reverse_renaming_mapping[name])
        to_contiguous, dtype = _infer_parameter_dtype(model, name, empty, keep_in_fp32_regex, hf_quantizer)
        tensor = tensor[...]
        if dtype is not None:
            tensor = tensor.to(dtype)
        if to_contiguous:
            tensor = tensor.contiguous()
        place = "cpu" if device_map is None else device_map[re.search("|".join(device_map), name).group()]
        _put(model, name, tensor.to(place))


def fill_from_state(
    model,
    state_dict,
    start_prefix,
    expected_keys,
    device_map=None,
    state_dict_index=None,
    dtype=None,
    hf_quantizer=None,
    keep_in_fp32_modules=None,
):
    """As before 4.50: what `state_dict` has are the weights, mapped."""
    for name, tensor in state_dict.items():
        if name not in expected_keys:
            continue
        name = name.removeprefix(start_prefix)
        if dtype is not None and tensor.is_floating_point():
            is_kept = any(part in name.split(".") for part in keep_in_fp32_modules or ()) and dtype == torch.float16
            tensor = tensor.to(torch.float32 if is_kept else dtype)
        if dtype is None:
            tensor = tensor.to(model.get_parameter(name).dtype)
        _put(model, name, tensor.contiguous().to("cpu" if device_map is None else device_map[""]))
    return []


def _put(model, name, tensor):
    path, _, key = name.rpartition(".")
    model.get_submodule(path).load_state_dict({key: tensor}, strict=False, assign=True)
