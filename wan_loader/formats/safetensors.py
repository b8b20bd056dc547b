"""The safetensors header: 8 bytes of length, that much JSON, then the data. Pure and strict.

Format: https://huggingface.co/docs/safetensors ("Format"). The header is untrusted: its length is capped, the JSON may
not repeat a key, and the ranges must cover the data section exactly, without gap or overlap, and agree with dtype
and shape. Reads the header bytes only.
"""

from __future__ import annotations

import math
import os
from typing import Any

from wan_loader.dtypes import ITEMSIZE
from wan_loader.errors import CheckpointError
from wan_loader.formats.facts import FileFacts, StorageFacts, TensorFacts, check_shape, contiguous_strides, stat_file
from wan_loader.formats.strict_json import parse_object

__all__ = ["MAX_HEADER_BYTES", "SAFETENSORS_NAMES", "parse_header", "read_safetensors"]

#: The reference implementation refuses longer headers, too.
MAX_HEADER_BYTES = 100_000_000

_DTYPES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "U16": "uint16",
    "I16": "int16",
    "U32": "uint32",
    "I32": "int32",
    "U64": "uint64",
    "I64": "int64",
    "F4": "float4_e2m1fn_x2",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2": "float8_e5m2",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "C64": "complex64",
}
#: How safetensors calls a dtype.
SAFETENSORS_NAMES = {name: code for code, name in _DTYPES.items()}


def read_safetensors(path: str) -> tuple[FileFacts, list[StorageFacts], list[TensorFacts], dict[str, str]]:
    """Facts of one file, tensors in order of position, storages as if it were file 0 of its checkpoint."""
    file = stat_file(path)
    try:
        with open(path, "rb") as f:
            prefix = f.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8:
                raise CheckpointError(f"{path} is truncated: {file.nbytes} bytes, shorter than a safetensors header")
            if length > MAX_HEADER_BYTES:
                raise CheckpointError(
                    f"{path}: header length {length} exceeds {MAX_HEADER_BYTES}: not a safetensors file, or damaged"
                )
            header = f.read(length)
            changed = os.fstat(f.fileno()).st_size != file.nbytes
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    if changed:
        raise CheckpointError(f"{path} is changing while it is read: wait until it is complete")
    if len(header) < length:
        raise CheckpointError(
            f"{path} is truncated: its header needs {length} bytes, {len(header)} are there; download it again"
        )
    storages, tensors, metadata = parse_header(header, path=path, nbytes_data=file.nbytes - 8 - length)
    return file, storages, tensors, metadata


def parse_header(
    header: bytes, *, path: str, nbytes_data: int
) -> tuple[list[StorageFacts], list[TensorFacts], dict[str, str]]:
    """Check header JSON against the size of the data section and return facts; `path` only names it in errors."""
    entries = parse_object(header, path=path, what="the header")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(f"{path}: __metadata__ must map strings to strings")
    ranges = sorted((_parse_entry(name, entry, path) for name, entry in entries.items()), key=lambda r: r[:2])
    data_start, frontier = 8 + len(header), 0
    storages: list[StorageFacts] = []
    tensors: list[TensorFacts] = []
    for start, end, name, dtype, shape in ranges:
        if start != frontier:
            kind = "overlap" if start < frontier else "leave a gap"
            raise CheckpointError(
                f"{path}: tensor {name!r}: offsets [{start}, {end}] {kind} at {frontier}: damaged file"
            )
        frontier = end
        tensors.append(TensorFacts(name, dtype, shape, len(storages), contiguous_strides(shape)))
        storages.append(StorageFacts(0, data_start + start, end - start))
    if frontier > nbytes_data:
        raise CheckpointError(
            f"{path} is truncated: tensor {ranges[-1][2]!r} ends at byte {frontier} of the data, "
            f"but only {nbytes_data} are there; download it again"
        )
    if frontier < nbytes_data:
        raise CheckpointError(f"{path}: {nbytes_data - frontier} bytes after the last tensor belong to none")
    return storages, tensors, metadata


def _parse_entry(name: str, entry: Any, path: str) -> tuple[int, int, str, str, tuple[int, ...]]:
    where = f"{path}: tensor {name!r}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where}: needs dtype, shape and data_offsets, and nothing else")
    dtype = _DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise CheckpointError(f"{where}: unknown dtype {entry['dtype']!r}; known: {', '.join(_DTYPES)}")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _counts(shape) or not _counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{where}: shape or data_offsets are not lists of sizes: damaged file")
    check_shape(shape, where)
    if entry["dtype"] == "F4":
        shape = _pack_fp4(shape, where)
    nbytes = math.prod(shape) * ITEMSIZE[dtype]
    if nbytes != offsets[1] - offsets[0]:
        raise CheckpointError(
            f"{where}: {entry['dtype']} {entry['shape']} needs {nbytes} bytes, "
            f"but its range holds {offsets[1] - offsets[0]}"
        )
    return offsets[0], offsets[1], name, dtype, tuple(shape)


def _counts(values: Any) -> bool:
    if not isinstance(values, list):
        return False
    for v in values:  # noqa: SIM110 - a generator costs twice as much here, for every tensor
        if type(v) is not int or not 0 <= v < 2**63:
            return False
    return True


def _pack_fp4(shape: list[int], where: str) -> list[int]:
    if not shape or shape[-1] % 2:
        raise CheckpointError(f"{where}: F4 packs two values into a byte, so the last dimension must be even")
    return [*shape[:-1], shape[-1] // 2]
