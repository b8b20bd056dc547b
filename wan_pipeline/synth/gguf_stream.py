"""GGUF as a stream, as `formats` has the other formats: buffers whose concatenation is the file.

Version 3, little-endian, data at multiples of 32. What has more than the four dimensions of the format is stored with
its first ones joined, and the metadata says its shape, as ComfyUI's converters do.
"""

from __future__ import annotations

import math
import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from wan_pipeline.synth.formats import Buffer, Data
    from wan_pipeline.synth.synth_tensors import SynthTensor

__all__ = ["gguf_stream"]

_ALIGNMENT = 32
_MAX_DIMENSIONS = 4
_TYPES = {"fp32": 0, "fp16": 1, "q8_0": 8, "bf16": 30}
_INT32, _STRING, _ARRAY = 5, 8, 9


def gguf_stream(
    tensors: Sequence[SynthTensor], data: Data, metadata: Mapping[str, str] | None = None
) -> Iterator[Buffer]:
    """Yield a file of these tensors, in their order."""
    texts = {"general.architecture": "wan", **(metadata or {})}
    entries = [_text(key) + struct.pack("<I", _STRING) + _text(value) for key, value in texts.items()]
    infos: list[bytes] = []
    end = 0
    for tensor in tensors:
        if len(tensor.shape) > _MAX_DIMENSIONS:
            entries.append(_original_shape(tensor))
        shape = _stored_shape(tensor.shape)
        sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        infos.append(_text(tensor.name) + sizes + struct.pack("<IQ", _TYPES[tensor.dtype], end))
        end += tensor.nbytes + _padding(tensor.nbytes)
    header = b"GGUF" + struct.pack("<IQQ", 3, len(infos), len(entries)) + b"".join([*entries, *infos])
    yield header + bytes(_padding(len(header)))
    for tensor in tensors:
        yield from data(tensor)
        yield bytes(_padding(tensor.nbytes))


def _original_shape(tensor: SynthTensor) -> bytes:
    shape = tensor.shape
    head = struct.pack("<IIQ", _ARRAY, _INT32, len(shape))
    return _text(f"comfy.gguf.orig_shape.{tensor.name}") + head + struct.pack(f"<{len(shape)}i", *shape)


def _stored_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    joined = len(shape) - _MAX_DIMENSIONS + 1
    return shape if joined < 2 else (math.prod(shape[:joined]), *shape[joined:])


def _text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def _padding(nbytes: int) -> int:
    return -nbytes % _ALIGNMENT
