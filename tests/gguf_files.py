"""GGUF files of any content, sound or not, written byte by byte."""

import struct

#: Type of tensors -> the number that stands for it.
TYPES = {"float32": 0, "float16": 1, "int8": 24, "int16": 25, "int32": 26, "int64": 27, "float64": 28, "bfloat16": 30}
KINDS = {"Q4_0": 2, "Q4_1": 3, "Q5_0": 6, "Q5_1": 7, "Q8_0": 8, "Q2_K": 10, "Q3_K": 11, "Q4_K": 12, "Q5_K": 13} | {
    "Q6_K": 14,
    "IQ4_XS": 23,
}
UINT32, INT32, STRING, ARRAY = 4, 5, 8, 9


def text(value):
    value = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(value)) + value


def string(key, value):
    return text(key) + struct.pack("<I", STRING) + text(value)


def number(key, value):
    return text(key) + struct.pack("<II", UINT32, value)


def integers(key, values):
    return text(key) + struct.pack("<IIQ", ARRAY, INT32, len(values)) + struct.pack(f"<{len(values)}i", *values)


def tensor_info(name, dims, type_, offset):
    """`dims` in the order of the file: the fastest first."""
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, type_, offset)


def header(infos=(), metadata=(), *, version=3, n_tensors=None, n_keys=None):
    counts = len(infos) if n_tensors is None else n_tensors, len(metadata) if n_keys is None else n_keys
    return b"GGUF" + struct.pack("<IQQ", version, *counts) + b"".join(metadata) + b"".join(infos)


def padded(content, alignment=32):
    return content + bytes(-len(content) % alignment)


def gguf_bytes(tensors, metadata=(), *, alignment=32):
    """A sound file. `tensors`: name -> (number of its type, shape as torch has it, bytes)."""
    infos, data = [], b""
    for name, (type_, shape, content) in tensors.items():
        data = padded(data, alignment)
        infos.append(tensor_info(name, shape[::-1], type_, len(data)))
        data += content
    return padded(header(infos, metadata), alignment) + data


def plain(tensor):
    """A tensor of a dtype that torch has, for `gguf_bytes`."""
    import torch

    content = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return TYPES[str(tensor.dtype).removeprefix("torch.")], tuple(tensor.shape), content


def blocks(kind, shape, content):
    """A quantised tensor, for `gguf_bytes`: the shape of its numbers, and its blocks."""
    return KINDS[kind], tuple(shape), content.numpy().tobytes()
