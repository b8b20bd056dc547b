"""Numbers out of quantised blocks: torch operations on whatever device the blocks lie.

Each function takes blocks, uint8 of [n, bytes of a block], and returns their numbers in float32, [n, elements of a
block], by the very operations of the gguf package (`gguf.quants`), so that every bit is the same. `dequantise` makes a
whole tensor, some blocks at a time: what it holds meanwhile does not grow with the tensor.

Layouts: ggml-common.h. In comments and names, d is the scale of a block and m its least value.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from wan_loader.devices.torch_threads import UNDIVIDED
from wan_loader.dtypes import torch_dtype
from wan_loader.formats.gguf_types import GGUF_TYPES

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    Blocks = torch.Tensor

__all__ = ["apply_scale", "apply_scale_into", "dequantise", "dequantise_into"]

#: Elements at a time: on a GPU so many that launches are nothing. What is half done of one takes up to 16 bytes, of
#: which the plan knows (`plan.quantised_values.SCRATCH_BYTES`).
_GPU_ELEMENTS = 8 << 20
#: On a CPU so few that torch divides none of the dozen small steps: where processors are shared, its threads wait long
#: for each other now and then, though they are quicker where nothing else runs.
_CPU_ELEMENTS = UNDIVIDED

_BLOCK = {found.name: found for found in GGUF_TYPES.values()}


def dequantise(raw: torch.Tensor, kind: str, shape: tuple[int, ...], dtype: str) -> torch.Tensor:
    """Make the numbers of a quantised tensor.

    Args:
        raw: Its blocks, uint8 and contiguous, of any shape.
        kind: The name of their type in GGUF.
        shape: The shape of the numbers.
        dtype: What they are rounded to, once, from float32.

    Returns:
        A new tensor on the same device.
    """
    import torch

    made = torch.empty(shape, dtype=torch_dtype(dtype), device=raw.device)
    dequantise_into(made, raw, kind)
    return made


def dequantise_into(made: torch.Tensor, raw: torch.Tensor, kind: str) -> None:
    """Make numbers of whole blocks in memory that is there.

    Args:
        made: Where they go, contiguous and of the dtype that they are rounded to.
        raw: The blocks, uint8 and contiguous.
        kind: The name of their type in GGUF.
    """
    found, numbers = _BLOCK[kind], _NUMBERS_OF[kind]
    blocks, rows = raw.view(-1, found.block_nbytes), made.view(-1, found.block_elements)
    step = _elements_at_once(raw) // found.block_elements
    for start in range(0, len(blocks), step):
        rows[start : start + step] = numbers(blocks[start : start + step])


def apply_scale(raw: torch.Tensor, scale: torch.Tensor, dtype: str) -> torch.Tensor:
    """Multiply eight-bit floats by their scale, in float32, and round once.

    Args:
        raw: The floats, contiguous.
        scale: One number for all, or one for each row (each index of dimension 0).
        dtype: What the products are rounded to.
    """
    import torch

    made = torch.empty(raw.shape, dtype=torch_dtype(dtype), device=raw.device)
    factors = scale.to(torch.float32).reshape(-1)
    apply_scale_into(made.view(-1), raw.view(-1), factors, n_columns=max(1, raw.numel() // len(factors)))
    return made


def apply_scale_into(
    made: torch.Tensor, raw: torch.Tensor, factors: torch.Tensor, *, n_columns: int, first: int = 0
) -> None:
    """Multiply some of the elements of a tensor by their scales, into memory that is there.

    Args:
        made: Where the products go, 1-D and of the dtype that they are rounded to.
        raw: The elements, 1-D.
        factors: The scales in float32, 1-D: one for each row of the whole tensor; a single one stands for all rows.
        n_columns: The elements of a row.
        first: The number of the first of these elements in the whole tensor.
    """
    if len(factors) == 1:
        n_columns, first = max(1, len(raw)), 0
    at = 0
    while at < len(raw):
        row, column = divmod(first + at, n_columns)
        n_rows = 1 if column else max(1, (len(raw) - at) // n_columns)
        end = min(len(raw), at + n_rows * n_columns - column)
        width = (end - at) // n_rows
        _multiply(made[at:end].view(n_rows, width), raw[at:end].view(n_rows, width), factors[row : row + n_rows, None])
        at = end


def _multiply(made: torch.Tensor, raw: torch.Tensor, factors: torch.Tensor) -> None:
    """Multiply rows by a factor each, some elements at a time."""
    import torch

    at_once = _elements_at_once(raw)
    n_rows, width = max(1, at_once // raw.shape[1]), min(raw.shape[1], at_once)
    for top in range(0, len(raw), n_rows):
        factor = factors[top : top + n_rows]
        for left in range(0, raw.shape[1], width):
            part = raw[top : top + n_rows, left : left + width].to(torch.float32)
            made[top : top + n_rows, left : left + width] = part * factor


def _elements_at_once(raw: torch.Tensor) -> int:
    """Return how many elements are made at once."""
    return _GPU_ELEMENTS if raw.is_cuda else _CPU_ELEMENTS


def _half(blocks: Blocks, start: int) -> torch.Tensor:
    """Return the float16 at a place in each block, as float32, [n, 1]."""
    import torch

    return blocks[:, start : start + 2].contiguous().view(torch.float16).to(torch.float32)


def _shifts(device: torch.device, step: int, count: int) -> torch.Tensor:
    import torch

    return torch.arange(0, step * count, step, dtype=torch.uint8, device=device).view(1, 1, count, 1)


def _fields(part: Blocks, width: int, bits: int) -> torch.Tensor:
    """Take bytes apart into numbers of some bits, the lowest first: uint8 of [n, groups, 8 / bits, width].

    Each `width` bytes of a block hold as many numbers of one kind, then as many of the next.
    """
    spread = part.reshape(len(part), -1, 1, width) >> _shifts(part.device, bits, 8 // bits)
    return spread & ((1 << bits) - 1)


def _fifth_bits(part: Blocks) -> torch.Tensor:
    """Return the bits of four bytes, each as 0 or 16: uint8 of [n, 32]."""
    bits = part.reshape(len(part), 1, 4, 1) >> _shifts(part.device, 1, 8).view(1, 1, 1, 8)
    return (bits & 1).view(len(part), 32) << 4


def _q4_0(blocks: Blocks) -> torch.Tensor:
    import torch

    q = _fields(blocks[:, 2:], 16, 4).view(len(blocks), 32).view(torch.int8) - 8
    return _half(blocks, 0) * q.to(torch.float32)


def _q4_1(blocks: Blocks) -> torch.Tensor:
    import torch

    q = _fields(blocks[:, 4:], 16, 4).view(len(blocks), 32)
    return _half(blocks, 0) * q.to(torch.float32) + _half(blocks, 2)


def _q5_0(blocks: Blocks) -> torch.Tensor:
    import torch

    q = _fields(blocks[:, 6:], 16, 4).view(len(blocks), 32) | _fifth_bits(blocks[:, 2:6])
    return _half(blocks, 0) * (q.view(torch.int8) - 16).to(torch.float32)


def _q5_1(blocks: Blocks) -> torch.Tensor:
    import torch

    q = _fields(blocks[:, 8:], 16, 4).view(len(blocks), 32) | _fifth_bits(blocks[:, 4:8])
    return _half(blocks, 0) * q.to(torch.float32) + _half(blocks, 2)


def _q8_0(blocks: Blocks) -> torch.Tensor:
    import torch

    return blocks[:, 2:].view(torch.int8).to(torch.float32) * _half(blocks, 0)


def _q2_k(blocks: Blocks) -> torch.Tensor:
    import torch

    scales = blocks[:, :16]
    d = (_half(blocks, 80) * (scales & 0xF).to(torch.float32)).view(-1, 16, 1)
    m = (_half(blocks, 82) * (scales >> 4).to(torch.float32)).view(-1, 16, 1)
    q = _fields(blocks[:, 16:80], 32, 2).view(-1, 16, 16)
    return (d * q.to(torch.float32) - m).view(len(blocks), 256)


def _q3_k(blocks: Blocks) -> torch.Tensor:
    import torch

    low = _fields(blocks[:, 96:104], 8, 4).view(-1, 16)
    high = _fields(blocks[:, 104:108], 4, 2).view(-1, 16)
    scales = (low | (high << 4)).view(torch.int8) - 32
    d = (_half(blocks, 108) * scales.to(torch.float32)).view(-1, 16, 1)
    q = _fields(blocks[:, 32:96], 32, 2).view(-1, 16, 16).view(torch.int8)
    # strangely, the offset is zero where the bit is one
    offset = (_fields(blocks[:, :32], 32, 1).view(-1, 16, 16) ^ 1) << 2
    return (d * (q - offset.view(torch.int8)).to(torch.float32)).view(len(blocks), 256)


def _scales_and_mins(blocks: Blocks) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what eight groups of a Q4_K or Q5_K block are multiplied by and what is taken off, [n, 8, 1] each.

    Twelve bytes hold six bits of each: four bytes of scales, four of least values, four of the others' low halves,
    whose high bits are the upper ones of the first eight.
    """
    import torch

    a, b, c = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = torch.cat([a & 0x3F, (c & 0x0F) | ((a >> 2) & 0x30)], dim=1).to(torch.float32)
    mins = torch.cat([b & 0x3F, (c >> 4) | ((b >> 2) & 0x30)], dim=1).to(torch.float32)
    return (_half(blocks, 0) * scales).unsqueeze(-1), (_half(blocks, 2) * mins).unsqueeze(-1)


def _q4_k(blocks: Blocks) -> torch.Tensor:
    import torch

    d, m = _scales_and_mins(blocks)
    q = _fields(blocks[:, 16:], 32, 4).view(-1, 8, 32)
    return (d * q.to(torch.float32) - m).view(len(blocks), 256)


def _q5_k(blocks: Blocks) -> torch.Tensor:
    import torch

    d, m = _scales_and_mins(blocks)
    q = _fields(blocks[:, 48:], 32, 4).view(-1, 8, 32) | (_fields(blocks[:, 16:48], 32, 1).view(-1, 8, 32) << 4)
    return (d * q.to(torch.float32) - m).view(len(blocks), 256)


def _q6_k(blocks: Blocks) -> torch.Tensor:
    import torch

    scales = blocks[:, 192:208].view(torch.int8).to(torch.float32)
    d = (_half(blocks, 208) * scales).view(-1, 16, 1)
    low = _fields(blocks[:, :128], 64, 4).view(-1, 8, 32)
    high = _fields(blocks[:, 128:192], 32, 2).view(-1, 8, 32)
    q = (low | (high << 4)).view(torch.int8) - 32
    return (d * q.view(-1, 16, 16).to(torch.float32)).view(len(blocks), 256)


_NUMBERS_OF: dict[str, Callable[[Blocks], torch.Tensor]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
