"""Quantised tensors: which ones are numbers only together with a scale, told from names and dtypes alone.

Quantisers store a weight in eight bits or fewer and beside it a scale, by which the weight is to be multiplied. The
scale's name has no standard; all that are in use are made of the weight's. For a weight `X.weight`:

    X.weight_scale, X.weight_scale_inv, X.weight_scale_2     compressed-tensors, DeepSeek, ModelOpt, torchao
    X.scale_weight, and scaled_fp8 once in the file          ComfyUI
    X.weight_scale and X.comfy_quant                         ComfyUI, later
    X.scale, X.scales, X.weight.scale, X.weight._scale       DeepSeek's own code, GPTQ, quanto
    X.weight_quantizer._scale, X.weight_block_scale          ModelOpt's own files, and others
    X.weight.absmax, X.weight.quant_state.*, X.SCB           bitsandbytes

Scales of activations (X.input_scale, X.scale_input) say nothing about the weight. Nothing is dequantised here.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from wan_loader.formats.checkpoint_facts import TensorFacts

__all__ = ["FLOAT8", "find_scales"]

#: Numbers of eight bits. (float8_e8m0fnu has powers of two only: it is for scales.)
FLOAT8 = frozenset({"float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz"})
_CODES = FLOAT8 | {"float4_e2m1fn_x2", "uint8", "int8", "int32"}
#: ComfyUI's mark that all eight-bit floats of a file are scaled.
_MARK = "scaled_fp8"

_HINT = re.compile("scal|absmax|SCB|quant")
_AFTER = re.compile(
    r"(.+?)([._:])_?(?:fp8_|block_|dequant_|double_)?(?:scales?(?:_inv|_\d)?|scaling_factor|absmax|SCB|comfy_quant)"
)
_STATE = re.compile(r"(.+?)\.quant_state\..+")
_BEFORE = re.compile(r"((?:.+\.)?)scale_(\w+)")
_DATA = re.compile(r"(.+?)(?:[._:]_?q?data|_packed|_blocks)")
_DATA_ENDS = ("data", "_packed", "_blocks")


def find_scales(tensors: Sequence[TensorFacts]) -> dict[str, str]:
    """Return the names of the tensors that come with a scale, each with the name of its scale.

    Costs a comparison a tensor where none is quantised, about a microsecond a tensor elsewhere.
    """
    codes = {t.name: t for t in tensors if t.dtype in _CODES}
    if not codes:
        return {}
    stored_as = {_weight_name(name): name for name in codes}
    found: dict[str, str] = {}
    for scale in (t for t in tensors if _HINT.search(t.name)):
        for weight, is_bare in _weights_of(scale.name):
            name = stored_as.get(weight)
            # A module may have a parameter called scale, which was cast with all others.
            if name is not None and name != scale.name and not (is_bare and scale.dtype in FLOAT8):
                found.setdefault(name, scale.name)
    return found | _marked(tensors, found)


def _marked(tensors: Iterable[TensorFacts], found: dict[str, str]) -> dict[str, str]:
    """Return tensors of a file that bears ComfyUI's mark, but not their scales."""
    mark = next((t.name for t in tensors if t.name.rpartition(".")[2] == _MARK), None)
    if mark is None:
        return {}
    return {t.name: mark for t in tensors if t.dtype in FLOAT8 and t.name not in found and t.nbytes and t.name != mark}


def _weight_name(name: str) -> str:
    """Return a tensor's name in the module, where the name in the file says that it is only the data of it."""
    match = _DATA.fullmatch(name) if name.endswith(_DATA_ENDS) else None
    return match[1] if match else name


def _weights_of(name: str) -> Iterator[tuple[str, bool]]:
    """Yield names of weights that a tensor of this name may scale; and whether it bears not the weight's name."""
    if match := _AFTER.fullmatch(name):
        base = match[1].removesuffix("_quantizer")
        yield base.removesuffix("s") if base.endswith("weights") else base, False
        if match[2] == ".":
            yield f"{base}.weight", True
            yield f"{base}.qweight", True
    if match := _STATE.fullmatch(name):
        yield match[1], False
    if match := _BEFORE.fullmatch(name):
        yield match[1] + match[2], False
