"""The GGUF header: metadata, then a list of tensors with type, shape and place, then the data. Strict.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3. The header is untrusted: its length
and every count in it are capped, no key and no name may come twice, and tensors must follow each other as the format
says, each at the next multiple of the alignment, without overlap or gap. Reads the header bytes only.

A quantised tensor is uint8 here, of the shape that its bytes have; `Checkpoint.quantised` says which numbers they stand
for. ComfyUI keeps the shape of what had more than four dimensions in metadata (`comfy.gguf.orig_shape.NAME`).
"""

from __future__ import annotations

import math
import struct
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from wan_loader.errors import CheckpointError
from wan_loader.formats.checkpoint_facts import (
    Checkpoint,
    Quantised,
    StorageFacts,
    TensorFacts,
    check_shape,
    contiguous_strides,
    stat_file,
)
from wan_loader.formats.checkpoint_format import Likeness
from wan_loader.formats.gguf_types import GGUF_TYPES, GgufType
from wan_loader.formats.nested_parts import shown

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

__all__ = ["DEQUANTISED", "MAX_HEADER_BYTES", "GgufFormat"]

MAX_HEADER_BYTES = 100_000_000
#: The types whose numbers can be made here (`devices.dequantise`).
DEQUANTISED = frozenset({"Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"})

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MAX_ENTRIES = 1_000_000
_MAX_STRINGS = 4_000_000
_MAX_NAME_BYTES = 65_535
_MAX_DIMENSIONS = 8
_MAX_NESTED = 4
_MAX_ALIGNMENT = 1 << 20
_ALIGNMENT = "general.alignment"
_SHAPE = "comfy.gguf.orig_shape."
#: Types of metadata: numbers by how `struct` reads them, then those of other lengths.
_NUMBERS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<B", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_INTEGERS = frozenset({0, 1, 2, 3, 4, 5, 10, 11})


class GgufFormat:
    """The files of llama.cpp, stable-diffusion.cpp, and ComfyUI's quantised models."""

    name = "gguf"
    stays_mapped = True
    reads_too: frozenset[str] = frozenset()
    load_whole: Callable[[str, str, str | None], dict[str, Any]] | None = None

    def likeness(self, head: bytes) -> Likeness:
        """Judge a file by its signature; versions that are not read are said when it is."""
        return Likeness.CERTAIN if head.startswith(_MAGIC) else Likeness.NONE

    def read(self, path: str, part: str | None, number: int = 0, n_storages: int = 0) -> Checkpoint:
        """Read the facts of one file."""
        if part is not None:
            raise CheckpointError(f"{path} is GGUF, which has no parts: name none", path=path)
        file = stat_file(path)
        try:
            with open(path, "rb") as opened:
                metadata, entries, data_start = _read_header(_Header(opened, path))
                # after the header was read: what was looked at and what was read are one file
                file.check_opened(opened.fileno())
        except OSError as error:
            raise CheckpointError.because(f"cannot be read: {error.strerror}", path=path) from error
        if not entries:
            raise CheckpointError.because(
                "is GGUF without a tensor: a vocabulary or settings", "name the file that has the weights", path=path
            )
        storages: list[StorageFacts] = []
        tensors: list[TensorFacts] = []
        quantised: dict[str, Quantised] = {}
        for entry in _in_place(entries, metadata, path, file.nbytes - data_start):
            raw, value = _facts(entry, metadata, n_storages + len(storages), path)
            storages.append(StorageFacts(number, data_start + entry.offset, entry.nbytes))
            tensors.append(raw)
            if value is not None:
                kind = entry.type.name
                problem = None if kind in DEQUANTISED else f"is quantised as {kind}, whose numbers are not made here"
                quantised[entry.name] = Quantised(kind, raw, value, problem=problem)
        texts = {key: value if isinstance(value, str) else repr(value) for key, value in metadata.items()}
        return Checkpoint(path, self.name, (file,), tuple(storages), tuple(tensors), texts, quantised=quantised)

    def reference_tensors(self, path: str, names: Sequence[str], part: str | None) -> Iterator[tuple[str, Any]]:
        """Read tensors as plain bytes at their places: no library that we need reads this format."""
        import torch

        from wan_loader.dtypes import torch_dtype

        checkpoint = self.read(path, part)
        facts = {tensor.name: tensor for tensor in checkpoint.tensors}
        with open(path, "rb") as file:
            for name in names:
                tensor = facts[name]
                file.seek(checkpoint.storages[tensor.storage].start)
                flat = torch.frombuffer(bytearray(file.read(tensor.nbytes)) or bytearray(8), dtype=torch.uint8)
                yield name, flat[: tensor.nbytes].view(torch_dtype(tensor.dtype)).view(tensor.shape)


class _Entry(NamedTuple):
    """A tensor as the header lists it."""

    name: str
    type: GgufType
    shape: tuple[int, ...]
    """The shape as torch has it, the slowest dimension first."""
    offset: int
    """The place behind the beginning of the data."""

    @property
    def byte_shape(self) -> tuple[int, ...]:
        """The shape of its bytes, or of its elements where torch has a dtype for them."""
        if self.type.dtype is not None:
            return self.shape
        return (*self.shape[:-1], self.shape[-1] // self.type.block_elements * self.type.block_nbytes)

    @property
    def nbytes(self) -> int:
        """The bytes that it takes."""
        return math.prod(self.shape) // self.type.block_elements * self.type.block_nbytes


class _Header:
    """The bytes of a header, taken one after the other; none of them is trusted."""

    def __init__(self, file: BinaryIO, path: str) -> None:
        self._file = file
        self.path = path
        self.position = 0
        self.n_strings = 0

    def take(self, nbytes: int) -> bytes:
        """Return the next bytes."""
        self.position += nbytes
        if self.position > MAX_HEADER_BYTES:
            raise self.wrong(f"its header is longer than {MAX_HEADER_BYTES} bytes: damaged, or no model's")
        taken = self._file.read(nbytes)
        if len(taken) < nbytes:
            reason = f"is truncated: its GGUF header needs {self.position} bytes or more"
            raise CheckpointError.because(reason, "download it again", path=self.path)
        return taken

    def number(self, form: str) -> Any:
        """Return the next number, of a form that `struct` knows."""
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def count(self, what: str) -> int:
        """Return the next number, which counts something."""
        count = int(self.number("<Q"))
        if count > _MAX_ENTRIES:
            raise self.wrong(f"{count} {what}, more than {_MAX_ENTRIES}: damaged file")
        return count

    def text(self, what: str, most: int = MAX_HEADER_BYTES) -> str:
        """Return the next string."""
        nbytes = int(self.number("<Q"))
        if nbytes > most:
            raise self.wrong(f"{what} of {nbytes} bytes: damaged file")
        try:
            return self.take(nbytes).decode()
        except UnicodeDecodeError:
            raise self.wrong(f"{what} is no UTF-8: damaged file") from None

    def wrong(self, reason: str, tensor: str | None = None) -> CheckpointError:
        """Return the error for what is wrong in it."""
        about = self.path if tensor is None else f"{self.path}: tensor {shown(tensor)}"
        return CheckpointError(f"{about}: {reason}", path=self.path, tensor=tensor, reason=reason)


def _read_header(header: _Header) -> tuple[dict[str, Any], list[_Entry], int]:
    """Read everything; return the metadata that is kept, the tensors, and where the data begins."""
    header.take(len(_MAGIC))
    version = header.number("<I")
    if version not in _VERSIONS:
        big = int.from_bytes(version.to_bytes(4, "little"), "big") in _VERSIONS
        which = "big-endian GGUF" if big else f"GGUF of version {version}"
        raise CheckpointError.because(f"is {which}; versions 2 and 3 are read", "convert it again", path=header.path)
    n_tensors, n_keys = header.count("tensors"), header.count("entries of metadata")
    metadata, seen = dict[str, Any](), set[str]()
    for _ in range(n_keys):
        key = header.text("a key", _MAX_NAME_BYTES)
        if key in seen:
            raise header.wrong(f"the key {shown(key)} stands there twice: damaged file")
        seen.add(key)
        value = _value(header, header.number("<I"))
        if value is not None:
            metadata[key] = value
    names: set[str] = set()
    entries: list[_Entry] = []
    for _ in range(n_tensors):
        entry = _entry(header)
        if entry.name in names:
            raise header.wrong("stands there twice: damaged file", entry.name)
        names.add(entry.name)
        entries.append(entry)
    alignment = _alignment(metadata, header)
    return metadata, entries, _aligned(header.position, alignment)


def _value(header: _Header, kind: int, depth: int = 0) -> Any:
    """Read a value of metadata; return it if it is a number, a string, or a short array of integers, else None."""
    if kind == _STRING:
        header.n_strings += 1
        if header.n_strings > _MAX_STRINGS:
            raise header.wrong(f"more than {_MAX_STRINGS} strings of metadata: damaged file")
        return header.text("a string")
    if kind == _ARRAY:
        return _array(header, depth)
    if kind not in _NUMBERS:
        raise header.wrong(f"metadata of unknown type {kind}: damaged file, or a newer version of the format")
    return header.number(_NUMBERS[kind])


def _array(header: _Header, depth: int) -> tuple[int, ...] | None:
    kind, count = header.number("<I"), header.number("<Q")
    if depth >= _MAX_NESTED:
        raise header.wrong("arrays within arrays: damaged file")
    if kind in _NUMBERS:
        nbytes = struct.calcsize(_NUMBERS[kind])
        content = header.take(count * nbytes)
        if kind in _INTEGERS and count <= _MAX_DIMENSIONS:
            return tuple(struct.unpack(f"<{count}{_NUMBERS[kind][1]}", content))
        return None
    for _ in range(count):
        _value(header, kind, depth + 1)
    return None


def _entry(header: _Header) -> _Entry:
    """Read what the header says of one tensor."""
    name = header.text("a tensor's name", _MAX_NAME_BYTES)
    n_dimensions = header.number("<I")
    if n_dimensions > _MAX_DIMENSIONS:
        raise header.wrong(f"{n_dimensions} dimensions: damaged file", name)
    shape = tuple(header.number("<Q") for _ in range(n_dimensions))[::-1]
    number, offset = header.number("<I"), header.number("<Q")
    if number not in GGUF_TYPES:
        raise header.wrong(f"its type has the number {number}, which is not known: damaged, or newer than we are", name)
    check_shape(shape, f"{header.path}: tensor {shown(name)}")
    found = GGUF_TYPES[number]
    if found.block_elements > 1 and (not shape or shape[-1] % found.block_elements):
        rows = shape[-1] if shape else 1
        raise header.wrong(f"rows of {rows} elements are not made of {found.name}'s blocks: damaged file", name)
    return _Entry(name, found, shape, offset)


def _alignment(metadata: Mapping[str, Any], header: _Header) -> int:
    alignment: int = metadata.get(_ALIGNMENT, 32)
    good = isinstance(alignment, int) and 8 <= alignment <= _MAX_ALIGNMENT and alignment & (alignment - 1) == 0
    if not good:
        raise header.wrong(f"{_ALIGNMENT} is {alignment!r:.60}: damaged file")
    return alignment


def _aligned(position: int, alignment: int) -> int:
    return -(-position // alignment) * alignment


def _in_place(entries: Sequence[_Entry], metadata: Mapping[str, Any], path: str, nbytes_data: int) -> Iterator[_Entry]:
    """Yield tensors in the order of their places; raise unless each begins where it has to, and ends in the file."""
    alignment, frontier = metadata.get(_ALIGNMENT, 32), 0
    for entry in sorted(entries, key=lambda entry: (entry.offset, entry.nbytes)):
        where = f"{path}: tensor {shown(entry.name)}"
        if entry.offset != (expected := _aligned(frontier, alignment)):
            kind = "overlaps what is before it" if entry.offset < frontier else "is out of place"
            reason = f"begins at byte {entry.offset} of the data and {kind}: {expected} was expected: damaged file"
            raise CheckpointError(f"{where} {reason}", path=path, tensor=entry.name)
        frontier = entry.offset + entry.nbytes
        if frontier > nbytes_data:
            raise CheckpointError(
                f"{path} is truncated: tensor {shown(entry.name)} ends at byte {frontier} of the data, "
                f"but only {max(nbytes_data, 0)} are there; download it again",
                path=path,
                tensor=entry.name,
                remedy="download it again",
            )
        yield entry


def _facts(
    entry: _Entry, metadata: Mapping[str, Any], storage: int, path: str
) -> tuple[TensorFacts, TensorFacts | None]:
    """Return the tensor as the file has it and, if it is quantised, the one of its numbers."""
    shape = entry.shape
    original = metadata.get(_SHAPE + entry.name)
    if original is not None:
        fits = isinstance(original, tuple) and all(size >= 0 for size in original)
        if not fits or math.prod(original) != math.prod(shape):
            reason = f"{_SHAPE}* says {original!r:.60}, which is no shape of its {math.prod(shape)} elements"
            raise CheckpointError(f"{path}: tensor {shown(entry.name)}: {reason}", path=path, tensor=entry.name)
        shape = original
    if entry.type.dtype is not None:
        return TensorFacts(entry.name, entry.type.dtype, shape, storage, contiguous_strides(shape)), None
    raw = entry.byte_shape
    return (
        TensorFacts(entry.name, "uint8", raw, storage, contiguous_strides(raw)),
        TensorFacts(entry.name, "float32", shape, storage, contiguous_strides(shape)),
    )
