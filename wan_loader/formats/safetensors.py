"""The safetensors header: 8 bytes of length, that much JSON, then the data. Pure and strict.

Format: https://huggingface.co/docs/safetensors ("Format"). The header is untrusted: its length is capped, the JSON may
not repeat a key (the reference takes the last of them), and the ranges must cover the data section exactly, without gap
or overlap, and agree with dtype and shape. Reads the header bytes only.
"""

from __future__ import annotations

import math
from functools import lru_cache
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from wan_loader.dtypes import ITEMSIZE
from wan_loader.errors import CheckpointError
from wan_loader.formats.checkpoint_facts import (
    Checkpoint,
    FileFacts,
    StorageFacts,
    TensorFacts,
    check_shape,
    contiguous_strides,
    stat_file,
)
from wan_loader.formats.checkpoint_format import Likeness
from wan_loader.formats.nested_parts import shown
from wan_loader.formats.strict_json import parse_object

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["MAX_HEADER_BYTES", "SAFETENSORS_NAMES", "SafetensorsFormat", "parse_header", "read_safetensors"]

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
_FIELDS = {"dtype", "shape", "data_offsets"}


def read_safetensors(
    path: str, number: int = 0, n_storages: int = 0
) -> tuple[FileFacts, list[StorageFacts], list[TensorFacts], dict[str, str]]:
    """Read the facts of one file, tensors in order of position.

    Args:
        path: The file.
        number: The position of this file among those of its checkpoint.
        n_storages: The number of storages that the files before it have.

    Returns:
        The file, its storages, its tensors, and the metadata that its writer left.

    Raises:
        CheckpointError: The header is damaged, or does not agree with the file.
    """
    file = stat_file(path)
    try:
        with open(path, "rb") as f:
            prefix = f.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8:
                raise CheckpointError.because(
                    f"is truncated: {file.nbytes} bytes, shorter than a safetensors header", path=path
                )
            if length > MAX_HEADER_BYTES:
                raise CheckpointError(
                    f"{path}: header length {length} exceeds {MAX_HEADER_BYTES}: not a safetensors file, or damaged",
                    path=path,
                )
            header = f.read(length)
            # after the header was read: what was looked at and what was read are one file
            file.check_opened(f.fileno())
    except OSError as error:
        raise CheckpointError.because(f"cannot be read: {error.strerror}", path=path) from error
    if len(header) < length:
        raise CheckpointError(
            f"{path} is truncated: its header needs {length} bytes, {len(header)} are there; download it again",
            path=path,
            remedy="download it again",
        )
    storages, tensors, metadata = parse_header(
        header, path=path, nbytes_data=file.nbytes - 8 - length, number=number, n_storages=n_storages
    )
    return file, storages, tensors, metadata


def parse_header(
    header: bytes, *, path: str, nbytes_data: int, number: int = 0, n_storages: int = 0
) -> tuple[list[StorageFacts], list[TensorFacts], dict[str, str]]:
    """Check header JSON against the size of the data section and return facts.

    Args:
        header: The JSON text.
        path: The file's name for errors; nothing is read.
        nbytes_data: Length of all that follows the header.
        number: As for `read_safetensors`.
        n_storages: As for `read_safetensors`.

    Returns:
        Storages, tensors and metadata.

    Raises:
        CheckpointError: The header is damaged, or its ranges do not cover the data exactly.
    """
    entries = parse_object(header, path=path, what="the header", compact=_compact)
    metadata = entries.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata  # null is as if it were not there, for the reference too
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(f"{path}: __metadata__ must map strings to strings", path=path)
    for name, entry in entries.items():
        if type(entry) is not tuple:
            raise _bad_entry(entry, name, path)
    data_start, frontier = 8 + len(header), 0
    storages: list[StorageFacts] = []
    tensors: list[TensorFacts] = []
    # sorted by start, then by end: an empty tensor comes before the one that begins where it lies
    for name, (start, end, (dtype, shape, stride, _)) in sorted(entries.items(), key=itemgetter(1)):
        if start != frontier:
            kind = "overlap" if start < frontier else "leave a gap"
            raise CheckpointError(
                f"{path}: tensor {shown(name)}: offsets [{start}, {end}] {kind} at {frontier}: damaged file",
                path=path,
                tensor=name,
            )
        frontier = end
        tensors.append(TensorFacts(name, dtype, shape, n_storages + len(storages), stride))
        storages.append(StorageFacts(number, data_start + start, end - start))
    if frontier > nbytes_data:
        raise CheckpointError(
            f"{path} is truncated: tensor {shown(tensors[-1].name)} ends at byte {frontier} of the data, "
            f"but only {nbytes_data} are there; download it again",
            path=path,
            tensor=tensors[-1].name,
            remedy="download it again",
        )
    if frontier < nbytes_data:
        raise CheckpointError(f"{path}: {nbytes_data - frontier} bytes after the last tensor belong to none", path=path)
    return storages, tensors, metadata


#: Dtype, shape and strides as torch has them, and bytes.
_Form = tuple[str, tuple[int, ...], tuple[int, ...], int]


def _compact(fields: dict[str, Any]) -> Any:
    """Make a tuple of a tensor's entry, which takes a third of the memory; anything else stays as it is."""
    if "dtype" in fields:
        try:
            return _parse_entry(fields)
        except CheckpointError:
            return fields
    return fields


def _bad_entry(entry: Any, name: str, path: str) -> CheckpointError:
    """Return the error that says what is wrong with an entry."""
    try:
        _parse_entry(entry)
    except CheckpointError as error:
        return CheckpointError(f"{path}: tensor {shown(name)}: {error}", path=path, tensor=name)
    raise AssertionError("a sound entry was not parsed")


def _parse_entry(entry: Any) -> tuple[int, int, _Form]:
    """Return start and end in the data section, and the form. The caller says of which tensor an error speaks.

    Fields of other names are left alone, as the reference does.
    """
    if type(entry) is not dict or not entry.keys() >= _FIELDS:
        raise CheckpointError("needs dtype, shape and data_offsets")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if type(code) is not str or code not in _DTYPES:
        raise CheckpointError(f"unknown dtype {shown(code)}; known: {', '.join(_DTYPES)}")
    if type(shape) is not list or type(offsets) is not list or len(offsets) != 2:
        raise CheckpointError("shape or data_offsets are not lists of sizes: damaged file")
    for size in (*shape, *offsets):
        # type, not isinstance: True is an int
        if type(size) is not int or not 0 <= size < 2**63:
            raise CheckpointError("shape or data_offsets are not lists of sizes: damaged file")
    start, end = offsets
    form = _form(code, tuple(shape))
    if form[3] != end - start:
        raise CheckpointError(f"{code} {shape} needs {form[3]} bytes, but its range holds {end - start}")
    return start, end, form


@lru_cache(maxsize=4096)
def _form(code: str, shape: tuple[int, ...]) -> _Form:
    """Return the form of a known dtype and checked sizes, which many tensors of a model share."""
    check_shape(shape, code)
    if code == "F4":
        if not shape or shape[-1] % 2:
            raise CheckpointError("F4 packs two values into a byte, so the last dimension must be even")
        shape = (*shape[:-1], shape[-1] // 2)
    dtype = _DTYPES[code]
    return dtype, shape, contiguous_strides(shape), math.prod(shape) * ITEMSIZE[dtype]


class SafetensorsFormat:
    """The `CheckpointFormat` of this module."""

    name = "safetensors"
    stays_mapped = True
    reads_too: frozenset[str] = frozenset()
    load_whole = None

    def likeness(self, head: bytes) -> Likeness:
        """Judge by a length that is allowed and a brace."""
        has_length = int.from_bytes(head[:8], "little") <= MAX_HEADER_BYTES
        return Likeness.CERTAIN if has_length and head[8:].lstrip()[:1] == b"{" else Likeness.NONE

    def read(self, path: str, part: str | None, number: int = 0, n_storages: int = 0) -> Checkpoint:
        """Read the header of a file, which has no parts."""
        if part is not None:
            raise CheckpointError.because(
                "is a safetensors file, which has no parts", "load it without part", path=path
            )
        file, storages, tensors, metadata = read_safetensors(path, number, n_storages)
        return Checkpoint(path, self.name, (file,), tuple(storages), tuple(tensors), metadata)

    def reference_tensors(self, path: str, names: Sequence[str], part: str | None) -> Iterator[tuple[str, Any]]:
        """Read tensors with `safetensors.safe_open`."""
        from safetensors import safe_open

        with safe_open(path, framework="pt", device="cpu") as opened:
            yield from ((name, opened.get_tensor(name)) for name in names)
