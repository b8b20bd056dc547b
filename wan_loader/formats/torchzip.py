"""Torch zip checkpoints (.pth, .pt, .bin): where each tensor's bytes lie, without torch and without running anything.

Format: a zip archive of stored (uncompressed) records. `NAME/data.pkl` is a pickle that builds tensors from
persistent ids `("storage", type, key, location, numel)`; `NAME/data/KEY` holds the raw bytes of storage KEY
(torch/serialization.py, `_save`). The pickle is read by an unpickler that knows a handful of names and turns each
into inert facts. Any other name raises `UnplannedError`: whether such a file is harmless is for
`torch.load(weights_only=True)` to say.
"""

from __future__ import annotations

import io
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, ClassVar

from wan_loader.dtypes import ITEMSIZE
from wan_loader.errors import CheckpointError
from wan_loader.formats.facts import FileFacts, StorageFacts, TensorFacts, check_shape, stat_file
from wan_loader.formats.parts import choose_part

__all__ = ["MAX_PICKLE_BYTES", "UnplannedError", "is_zip", "read_torch_zip"]

#: A data.pkl needs about 150 bytes a tensor; the largest models stay under 1 MB.
MAX_PICKLE_BYTES = 64 << 20

_STORAGE_TYPES = {
    "BoolStorage": "bool",
    "ByteStorage": "uint8",
    "CharStorage": "int8",
    "ShortStorage": "int16",
    "IntStorage": "int32",
    "LongStorage": "int64",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "FloatStorage": "float32",
    "DoubleStorage": "float64",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
}


class UnplannedError(Exception):
    """The pickle uses something beyond plain dense tensors; the message says what."""


@dataclass(frozen=True, slots=True)
class _Storage:
    key: str
    nbytes: int
    dtype: str | None


@dataclass(frozen=True, slots=True)
class _Tensor:
    storage: _Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def is_zip(path: str) -> bool:
    """Whether the file begins like a zip archive."""
    with open(path, "rb") as f:
        return f.read(4) == b"PK\x03\x04"


def read_torch_zip(path: str, part: str | None = None) -> tuple[FileFacts, list[StorageFacts], list[TensorFacts]]:
    """Facts of one file, tensors by position; `part` names a nested dict by its keys, joined by dots.

    Raises `CheckpointError`, or `UnplannedError` for exotic pickles.
    """
    file = stat_file(path)
    try:
        with zipfile.ZipFile(path) as archive:
            records = _stored_records(archive, file)
            prefix, pickled = _read_pickle(archive, path)
            _check_byteorder(archive, prefix)
    except (zipfile.BadZipFile, OSError, EOFError, struct.error, ValueError, OverflowError, RuntimeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} is truncated or damaged: {error}; download it again") from error
    state = _unpickle(pickled, path)
    chosen = choose_part(state, part, path=path, is_tensor=lambda value: type(value) is _Tensor)
    return _collect(file, chosen, records, prefix)


def _stored_records(archive: zipfile.ZipFile, file: FileFacts) -> dict[str, tuple[int, int]]:
    """Name -> (start, nbytes) of every record's bytes in the file, checked to lie inside it one after the other."""
    records: dict[str, tuple[int, int]] = {}
    fd = os.open(file.path, os.O_RDONLY)
    try:
        for info in archive.infolist():
            if info.filename in records:
                raise CheckpointError(f"{file.path}: record {info.filename!r} stands twice in the archive")
            if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size or info.flag_bits & 1:
                raise CheckpointError(
                    f"{file.path}: record {info.filename!r} is compressed; torch stores records plain"
                )
            local = os.pread(fd, 30, info.header_offset)
            if len(local) < 30 or local[:4] != b"PK\x03\x04":
                raise CheckpointError(
                    f"{file.path}: record {info.filename!r} is not where the index says: damaged file"
                )
            name_length, extra_length = struct.unpack_from("<HH", local, 26)
            records[info.filename] = (info.header_offset + 30 + name_length + extra_length, info.file_size)
    finally:
        os.close(fd)
    frontier = 0
    for name, (start, nbytes) in sorted(records.items(), key=lambda item: item[1]):
        if start < frontier or start + nbytes > file.nbytes:
            raise CheckpointError(f"{file.path}: record {name!r} overlaps another or leaves the file: damaged file")
        frontier = start + nbytes
    return records


def _read_pickle(archive: zipfile.ZipFile, path: str) -> tuple[str, bytes]:
    pickles = [name for name in archive.namelist() if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise CheckpointError(f"{path} is a zip archive, but not a torch checkpoint: it has no NAME/data.pkl")
    if archive.getinfo(pickles[0]).file_size > MAX_PICKLE_BYTES:
        raise CheckpointError(f"{path}: its data.pkl is larger than {MAX_PICKLE_BYTES} bytes: not a weights file")
    return pickles[0].removesuffix("data.pkl"), archive.read(pickles[0])


def _check_byteorder(archive: zipfile.ZipFile, prefix: str) -> None:
    name = prefix + "byteorder"
    if name in archive.namelist() and archive.getinfo(name).file_size < 16 and archive.read(name) != b"little":
        raise UnplannedError("it was written on a big-endian machine")


def _unpickle(pickled: bytes, path: str) -> Any:
    try:
        return _FactsUnpickler(io.BytesIO(pickled)).load()
    except UnplannedError:
        raise
    except Exception as error:  # any opcode may fail in its own way on damaged input
        raise CheckpointError(f"{path}: its data.pkl is damaged ({type(error).__name__}: {error})") from error


def _rebuild_tensor(
    storage: Any, offset: Any, shape: Any, stride: Any, *rest: Any, dtype: str | None = None
) -> _Tensor:
    if len(rest) > 2 and rest[2]:
        raise UnplannedError("a tensor carries metadata, such as a conjugate bit")
    if not isinstance(storage, _Storage) or (dtype := dtype or storage.dtype) is None:
        raise ValueError("a tensor is not built from a storage")
    return _Tensor(storage, dtype, offset, tuple(shape), tuple(stride))


def _rebuild_tensor_v3(
    storage: Any, offset: Any, shape: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, *metadata: Any
) -> _Tensor:
    if not isinstance(dtype, str) or dtype not in ITEMSIZE:
        raise ValueError("a tensor has no dtype")
    return _rebuild_tensor(storage, offset, shape, stride, grad, hooks, *metadata, dtype=dtype)


def _rebuild_parameter(tensor: Any, *_: Any) -> Any:
    return tensor


def _ordered_dict(*args: Any) -> OrderedDict[str, Any]:
    if args:
        raise ValueError("an OrderedDict with arguments")
    return OrderedDict()


#: Opcodes that weights do not need, and that allocate by a number in the file, or hash values of any depth.
_REFUSED = (b"\x96", b"\x97", b"\x98", b"\x82", b"\x83", b"\x84", b"\x8f", b"\x90", b"\x91")


# The pure-Python unpickler on purpose: its memo is a dict, so a damaged index cannot make it allocate gigabytes.
class _FactsUnpickler(pickle._Unpickler):
    dispatch: ClassVar[dict[int, Any]] = {
        code: load for code, load in pickle._Unpickler.dispatch.items() if bytes([code]) not in _REFUSED
    }

    def load_setitem(self: Any) -> None:
        value = self.stack.pop()
        self._set(self.stack.pop(), value)

    def load_setitems(self: Any) -> None:
        items = self.pop_mark()
        for i in range(0, len(items), 2):
            self._set(items[i], items[i + 1])

    def _set(self: Any, key: Any, value: Any) -> None:
        # Hashing a nested tuple of a few hundred bytes can take for ever.
        if not isinstance(key, str | int) or not isinstance(self.stack[-1], dict):
            raise ValueError("a dict key is no string")
        dict.__setitem__(self.stack[-1], key, value)

    dispatch[pickle.SETITEM[0]] = load_setitem
    dispatch[pickle.SETITEMS[0]] = load_setitems

    def find_class(self, module: str, name: str) -> Any:
        match module, name:
            case "collections", "OrderedDict":
                return _ordered_dict
            case "torch._utils", "_rebuild_tensor_v2":
                return _rebuild_tensor
            case "torch._utils", "_rebuild_tensor_v3":
                return _rebuild_tensor_v3
            case "torch._utils", "_rebuild_parameter":
                return _rebuild_parameter
            case "torch.storage", "UntypedStorage":
                return "untyped"
            case "torch", _ if name in _STORAGE_TYPES:
                return _STORAGE_TYPES[name]
            case "torch", _ if name in ITEMSIZE:
                return name
        raise UnplannedError(f"its pickle uses {module}.{name}")

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _location, numel = pid
        if kind != "storage" or not isinstance(key, str) or not isinstance(dtype, str):
            raise ValueError("bad persistent id")
        if type(numel) is not int or not 0 <= numel < 2**63 or (dtype != "untyped" and dtype not in ITEMSIZE):
            raise ValueError("bad persistent id")
        if dtype == "untyped":
            return _Storage(key, numel, None)
        return _Storage(key, numel * ITEMSIZE[dtype], dtype)


def _collect(
    file: FileFacts, state: dict[str, Any], records: dict[str, tuple[int, int]], prefix: str
) -> tuple[FileFacts, list[StorageFacts], list[TensorFacts]]:
    found: dict[str, _Tensor] = {}
    for name, value in dict.items(state):
        _check_view(value, f"{file.path}: tensor {name!r}")
        found[name] = value
    keys = {t.storage.key: t.storage for t in found.values()}
    for name, tensor in found.items():
        if tensor.storage.nbytes != keys[tensor.storage.key].nbytes:
            raise CheckpointError(f"{file.path}: tensor {name!r} and others disagree about the size of their storage")
    placed = [(*_record(file, s, records, prefix), s.key) for s in keys.values()]
    order = {key: i for i, (_, _, key) in enumerate(sorted(placed))}
    storages = [StorageFacts(0, start, nbytes) for start, nbytes, _ in sorted(placed)]
    tensors = [TensorFacts(n, t.dtype, t.shape, order[t.storage.key], t.stride, t.offset) for n, t in found.items()]
    return file, storages, sorted(tensors, key=lambda t: (t.storage, t.offset))


def _record(file: FileFacts, storage: _Storage, records: dict[str, tuple[int, int]], prefix: str) -> tuple[int, int]:
    record = records.get(f"{prefix}data/{storage.key}")
    if record is None:
        raise CheckpointError(f"{file.path}: the record of storage {storage.key!r} is missing: damaged file")
    if record[1] != storage.nbytes:
        raise CheckpointError(
            f"{file.path}: storage {storage.key!r} should have {storage.nbytes} bytes, its record has {record[1]}"
        )
    return record


def _check_view(tensor: _Tensor, where: str) -> None:
    """A view may not reach outside its storage."""
    numbers = (tensor.offset, *tensor.shape, *tensor.stride)
    if len(tensor.shape) != len(tensor.stride) or any(type(n) is not int or not 0 <= n < 2**63 for n in numbers):
        raise CheckpointError(f"{where}: shape, stride or offset make no sense: damaged file")
    check_shape(tensor.shape, where)
    if tensor.storage.nbytes % ITEMSIZE[tensor.dtype]:
        raise UnplannedError("a storage ends within an element")
    if 0 in tensor.shape:
        return
    last = tensor.offset + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride, strict=True))
    if (last + 1) * ITEMSIZE[tensor.dtype] > tensor.storage.nbytes:
        raise CheckpointError(f"{where} reaches outside its storage of {tensor.storage.nbytes} bytes: damaged file")
