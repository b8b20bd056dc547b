"""What the installed torch and safetensors have, and tests that need it."""

import contextlib
import io
from importlib.metadata import PackageNotFoundError, version

import pytest
import safetensors
import safetensors.torch
import torch

from wan_loader.dtypes import ITEMSIZE

TORCH = tuple(int(number) for number in torch.__version__.split(".")[:2])


def _version(package):
    with contextlib.suppress(PackageNotFoundError):
        return tuple(int(number) for number in version(package).split(".")[:2])
    return (0, 0)


TRANSFORMERS, DIFFUSERS = _version("transformers"), _version("diffusers")


def _can_save(dtype, save):
    """Whether a library writes tensors of a dtype; old ones lack some."""
    try:
        save(torch.zeros(2 * dtype.itemsize, dtype=torch.uint8).view(dtype))
    except (KeyError, ValueError, safetensors.SafetensorError):
        return False
    return True


#: Name -> dtype, of what a checkpoint may hold and torch.save can write.
DTYPES = {
    name: dtype
    for name in ITEMSIZE
    if (dtype := getattr(torch, name, None)) and _can_save(dtype, lambda tensor: torch.save(tensor, io.BytesIO()))
}
#: The same for safetensors.
IN_SAFETENSORS = {
    name: dtype
    for name in ITEMSIZE
    if (dtype := getattr(torch, name, None)) and _can_save(dtype, lambda tensor: safetensors.torch.save({"w": tensor}))
}

needs_parallelism = pytest.mark.skipif(
    TORCH < (2, 6) or DIFFUSERS < (0, 36), reason="before torch 2.6 and diffusers 0.36: no fully_shard, no Ulysses"
)
needs_offset_keys = pytest.mark.skipif(
    not hasattr(safetensors.safe_open, "offset_keys"), reason="this safetensors has no offset_keys"
)


def needs_torch(major, minor, what):
    """Skip a test where torch is older: what it is about came with that release."""
    return pytest.mark.skipif((major, minor) > TORCH, reason=f"before torch {major}.{minor}: {what}")


def needs_dtype(name):
    """Skip a test where there are no files of a dtype."""
    return pytest.mark.skipif(name not in DTYPES, reason=f"this torch has no {name}")


def as_dtype(dtype):
    """The keyword of diffusers' `from_pretrained` for a dtype: an old one ignores the new name.

    None stands for the dtypes of the files. With transformers 4, a text encoder would become fp32.
    """
    if dtype is None:
        return (
            {}
            if TRANSFORMERS >= (5, 0)
            else {"torch_dtype": {"text_encoder": torch.bfloat16, "default": torch.float32}}
        )
    return {"torch_dtype" if DIFFUSERS < (0, 40) else "dtype": dtype}
