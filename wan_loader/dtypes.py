"""Dtypes by name.

Inside the package a dtype is its torch attribute name ("bfloat16"), so that headers can be read, checked and planned
without importing torch; `torch_dtype` turns a name into the object at the last moment.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from wan_loader.errors import CheckpointError, OptionError

if TYPE_CHECKING:
    import torch

__all__ = ["FLOATING", "ITEMSIZE", "dtype_name", "parse_dtype", "torch_dtype"]

#: Bytes per element. float4_e2m1fn_x2 packs two values into one byte, which torch counts as one element.
ITEMSIZE: dict[str, int] = {
    "bool": 1,
    "uint8": 1,
    "int8": 1,
    "uint16": 2,
    "int16": 2,
    "uint32": 4,
    "int32": 4,
    "uint64": 8,
    "int64": 8,
    "bits8": 1,
    "bits16": 2,
    "bits1x8": 1,
    "bits2x4": 1,
    "bits4x2": 1,
    "float4_e2m1fn_x2": 1,
    "float8_e4m3fn": 1,
    "float8_e4m3fnuz": 1,
    "float8_e5m2": 1,
    "float8_e5m2fnuz": 1,
    "float8_e8m0fnu": 1,
    "float16": 2,
    "bfloat16": 2,
    "float32": 4,
    "float64": 8,
    "complex32": 4,
    "complex64": 8,
    "complex128": 16,
}

#: What a requested dtype applies to. Packed fp4, integers, bits, bool and complex stay as they are in the file.
FLOATING = frozenset(name for name in ITEMSIZE if name.startswith(("float", "bfloat")) and "x2" not in name)

_ALIASES = {
    "bf16": "bfloat16",
    "fp16": "float16",
    "f16": "float16",
    "half": "float16",
    "fp32": "float32",
    "f32": "float32",
    "float": "float32",
    "fp64": "float64",
    "double": "float64",
}


def parse_dtype(text: str) -> str:
    """Return the canonical name of a floating dtype given as bf16, fp16, fp32 or a torch name.

    Raises:
        OptionError: The text names no floating dtype.
    """
    name = _ALIASES.get(text.lower(), text.lower())
    if name not in FLOATING:
        raise OptionError.because(f"unknown dtype {text!r:.60}", "use bf16, fp16, fp32 or a floating torch dtype name")
    return name


def dtype_name(dtype: torch.dtype | str | None) -> str | None:
    """Return the canonical name of what a caller passed as `dtype=`; None stays None.

    Raises:
        OptionError: The value is no dtype, or not a floating one.
    """
    if dtype is None:
        return None
    # torch's and numpy's dtypes, told by the names of their types: neither has to be imported for that
    if not isinstance(dtype, str) and not type(dtype).__name__.lower().endswith("dtype"):
        raise OptionError.because(
            f"dtype is of type {type(dtype).__name__}", "pass a torch.dtype, or bf16, fp16 or fp32"
        )
    return parse_dtype(str(dtype).removeprefix("torch."))


@cache
def torch_dtype(name: str) -> Any:
    """Return the torch dtype object of a canonical name.

    Raises:
        CheckpointError: The installed torch is too old to have it.
    """
    import torch

    dtype = getattr(torch, name, None)
    if dtype is None:
        raise CheckpointError.because(f"torch {torch.__version__} has no dtype {name}", "install a newer torch")
    return dtype
