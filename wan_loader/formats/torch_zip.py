"""Torch zip checkpoints (.pth, .pt, .bin): where each tensor's bytes lie, without torch and without running anything.

Format: a zip archive of stored (uncompressed) records. `NAME/data.pkl` is a pickle that builds tensors from persistent
ids `("storage", type, key, location, numel)`; `NAME/data/KEY` holds the raw bytes of storage KEY
(torch/serialization.py, `_save`). Both are read as torch reads them, or refused. A pickle with more in it than dense
tensors and plain values raises `UnplannedError`: whether it is harmless is for `torch.load(weights_only=True)` to say.
"""

from __future__ import annotations

import os
import re
from functools import lru_cache
from typing import Any

from wan_loader.dtypes import ITEMSIZE
from wan_loader.errors import CheckpointError
from wan_loader.formats.checkpoint_facts import FileFacts, StorageFacts, TensorFacts, check_shape, stat_file
from wan_loader.formats.facts_unpickler import Reading, read_pickle
from wan_loader.formats.nested_parts import choose_part, shown
from wan_loader.formats.pickle_calls import KNOWN, STORAGE_TYPES
from wan_loader.formats.pickle_values import Global, Other, PickledStorage, PickledTensor, PickleError
from wan_loader.formats.zip_archive import Record, ZipArchive, read_archive

__all__ = ["MAX_PICKLE_BYTES", "UnplannedError", "read_torch_zip"]

#: A data.pkl needs about 150 bytes a tensor; the largest models stay under 1 MB.
MAX_PICKLE_BYTES = 64 << 20
_MAX_MARK_BYTES = 256
#: The versions of the format that torch 2.13 reads.
_VERSION = re.compile(rb"\s*\+?0*([1-9]|10)(?!\d)")
_SAVE_WEIGHTS = "and save its weights alone with torch.save(module.state_dict(), path)"
_PROGRAMS = {
    "constants.pkl": "a TorchScript archive, which holds a program: load it with torch.jit.load(path)",
    "archive_format": "a torch.export archive, which holds a program: load it with torch.export.load(path).module()",
    ".data/extern_modules": "a torch.package archive, which holds a program: load it with PackageImporter(path)",
}


class UnplannedError(Exception):
    """The pickle uses something beyond plain dense tensors; the message says what."""


def read_torch_zip(path: str, part: str | None = None) -> tuple[FileFacts, list[StorageFacts], list[TensorFacts]]:
    """Read the facts of one file, tensors by position; `part` names a nested dict by its keys, joined by dots.

    Raises:
        CheckpointError: The file is damaged, or torch would refuse it.
        UnplannedError: Its pickle is exotic.
    """
    file = stat_file(path)
    try:
        with open(path, "rb", buffering=0) as f:
            # between the two looks, the file may have grown or been replaced
            if os.fstat(f.fileno()).st_size != file.nbytes:
                raise CheckpointError.because("is changing while it is read", "wait until it is complete", path=path)
            archive = read_archive(path, f.fileno(), file.nbytes)
            pickled = _read_pickle(archive)
            storages = _Storages(archive)
            reading = _unpickle(pickled, storages, path)
            tensors = choose_part(reading.value, part, path=path, is_tensor=_is_tensor)
            facts = _collect(path, tensors, storages)
            _check_others(reading.tensors, tensors, path)
            return file, *facts
    except OSError as error:
        raise CheckpointError.because(f"cannot be read: {error.strerror}", path=path) from error


def _is_tensor(value: Any) -> bool:
    return type(value) is PickledTensor


def _read_pickle(archive: ZipArchive) -> bytes:
    """Return the pickle of an archive of torch.save, which is checked to be one."""
    # they hold a data.pkl as well, which describes a module and no dict of weights
    for name, program in _PROGRAMS.items():
        if name in archive:
            raise CheckpointError.because(f"is {program}, {_SAVE_WEIGHTS}", path=archive.path)
    pickled = archive.read("data.pkl", MAX_PICKLE_BYTES)
    if pickled is None:
        raise CheckpointError(
            f"{archive.path} is a zip archive, but not a torch checkpoint: it has no NAME/data.pkl; "
            "unpack it, and load what is in it",
            path=archive.path,
            remedy="unpack it, and load what is in it",
        )
    _check_marks(archive)
    version = archive.read(".data/version" if ".data/version" in archive else "version", _MAX_MARK_BYTES)
    if version is None or not _VERSION.match(version):
        raise CheckpointError.because(
            "has no format version that torch reads: damaged, or too new a file", path=archive.path
        )
    return pickled


def _check_marks(archive: ZipArchive) -> None:
    """Check small records that say nothing to us, but that torch refuses a file for if they are damaged."""
    archive.read(".format_version", _MAX_MARK_BYTES)
    identity = archive.read(".data/serialization_id", _MAX_MARK_BYTES)
    alignment = archive.read(".storage_alignment", _MAX_MARK_BYTES)
    if (identity and not identity.isascii()) or (alignment is not None and not alignment.strip().isdigit()):
        raise CheckpointError(
            f"{archive.path}: its id or its alignment makes no sense: damaged file", path=archive.path
        )


def _unpickle(pickled: bytes, storages: _Storages, path: str) -> Reading:
    try:
        reading = read_pickle(pickled, storages.load)
    except PickleError as error:
        raise CheckpointError(f"{path}: its data.pkl is damaged ({error})", path=path) from None
    if storages.byteorder != b"little":
        raise UnplannedError("it was written on a big-endian machine")
    if reading.foreign:
        raise UnplannedError(reading.foreign)
    return reading


class _Storages:
    """The storages that a pickle's persistent ids name, each with its record in the archive."""

    def __init__(self, archive: ZipArchive) -> None:
        byteorder = archive.read("byteorder", _MAX_MARK_BYTES)
        self.byteorder = b"little" if byteorder is None else byteorder
        if self.byteorder not in (b"little", b"big"):
            raise CheckpointError(f"{archive.path}: its byte order is none: damaged file", path=archive.path)
        self._archive = archive
        self._storages: dict[str, PickledStorage] = {}
        self._records: dict[str, Record] = {}

    def load(self, pid: Any) -> PickledStorage | Other:
        """Return the storage of a persistent id. The first id of a key says its dtype and size, as for torch."""
        if type(pid) is not tuple or len(pid) != 5:
            raise PickleError("a persistent id makes no sense")
        kind, storage_type, key, _location, numel = pid
        if kind != "storage" or type(storage_type) is not Global or type(key) is not str or type(numel) is not int:
            raise PickleError("a persistent id makes no sense")
        dtype = STORAGE_TYPES.get(storage_type.name)
        if dtype is None:
            if storage_type.name in KNOWN:
                raise PickleError(f"a persistent id names {storage_type.name}, which is no storage")
            return Other(storage_type.name)
        if key in self._storages:
            return self._storages[key]
        nbytes = numel * ITEMSIZE[dtype]
        # a name ends at NUL for miniz, so that another record would be found
        record = None if "\0" in key else self._archive.find(f"data/{key}")
        if record is None:
            raise CheckpointError(
                f"{self._archive.path}: the record of storage {shown(key)} is missing: damaged file",
                path=self._archive.path,
            )
        if record.nbytes != nbytes:
            raise CheckpointError(
                f"{self._archive.path}: storage {shown(key)} should have {nbytes} bytes, "
                f"its record has {record.nbytes}",
                path=self._archive.path,
            )
        storage = PickledStorage(key, nbytes, dtype)
        self._records[key] = record
        if nbytes:  # torch does not remember empty ones
            self._storages[key] = storage
        return storage

    def start_of(self, key: str) -> int:
        """Return where the bytes of a storage begin in the file; of an empty one, torch does not look where that is."""
        record = self._records[key]
        return self._archive.start_of(f"data/{key}", record) if record.nbytes else record.header


def _collect(
    path: str, found: dict[str, PickledTensor], storages: _Storages
) -> tuple[list[StorageFacts], list[TensorFacts]]:
    """Return facts of the tensors and of the storages that they need, both by position."""
    for name, tensor in found.items():
        _check_name(name, path)
        _check_view(tensor, name, path)
    sizes = {tensor.storage.key: tensor.storage.nbytes for tensor in found.values()}
    placed = sorted((storages.start_of(key), nbytes, key) for key, nbytes in sizes.items())
    frontier = 0
    for start, nbytes, key in placed:
        # empty records may lie anywhere; of others, a byte belongs to one storage
        if nbytes and start < frontier:
            raise CheckpointError(
                f"{path}: the record of storage {shown(key)} overlaps another: damaged file", path=path
            )
        frontier = max(frontier, start + nbytes)
    order = {key: i for i, (_, _, key) in enumerate(placed)}
    tensors = [TensorFacts(n, t.dtype, t.shape, order[t.storage.key], t.stride, t.offset) for n, t in found.items()]
    tensors.sort(key=lambda t: (t.storage, t.offset))
    return [StorageFacts(0, start, nbytes) for start, nbytes, _ in placed], tensors


def _check_others(tensors: list[PickledTensor], found: dict[str, PickledTensor], path: str) -> None:
    """Check the tensors that were not asked for: torch refuses a file for any."""
    checked = {id(tensor) for tensor in found.values()}
    for tensor in tensors:
        if id(tensor) not in checked:
            _check_view(tensor, None, path)


def _check_name(name: str, path: str) -> None:
    """Refuse a name that is not text: surrogates cannot be written to any file or terminal."""
    if not name.isascii():
        try:
            name.encode()
        except UnicodeEncodeError:
            raise CheckpointError(
                f"{path}: the name of tensor {shown(name)} is not Unicode text: damaged file", path=path, tensor=name
            ) from None


def _check_view(tensor: PickledTensor, name: str | None, path: str) -> None:
    """Refuse a view that reaches outside its storage."""
    storage, dtype, offset, shape, stride = tensor
    try:
        nbytes = _end_of_view(offset, shape, stride) * ITEMSIZE[dtype]
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {_words(name)} {error}: damaged file", path=path, tensor=name) from None
    # an untyped storage may: what becomes of its end is for torch to say
    if storage.nbytes % ITEMSIZE[dtype]:
        raise UnplannedError("a storage ends within an element")
    if nbytes > storage.nbytes:
        raise CheckpointError(
            f"{path}: {_words(name)} reaches outside its storage of {storage.nbytes} bytes: damaged file",
            path=path,
            tensor=name,
        )


def _words(name: str | None) -> str:
    return "a tensor beside those asked for" if name is None else f"tensor {shown(name)}"


def _end_of_view(offset: Any, shape: tuple[Any, ...], stride: tuple[Any, ...]) -> int:
    """Return the number of elements from the start of the storage to the end of a view."""
    if type(offset) is not int or not {*map(type, shape), *map(type, stride)} <= {int}:
        raise CheckpointError("has a shape, stride or offset that is no number")
    if not 0 <= offset < 2**63:
        raise CheckpointError("has an offset that makes no sense")
    span = _span(shape, stride)
    # an empty view reaches nowhere, whatever its offset
    return offset + span if span else 0


@lru_cache(maxsize=4096)
def _span(shape: tuple[int, ...], stride: tuple[int, ...]) -> int:
    """Return the number of elements from the first to the last of a view, 0 if it is empty.

    Many tensors of a model share a shape and its strides.
    """
    numbers = (*shape, *stride, 0)
    if len(shape) != len(stride) or min(numbers) < 0 or max(numbers) >= 2**63:
        raise CheckpointError("has a shape or stride that makes no sense")
    check_shape(shape, "of")
    return 0 if 0 in shape else 1 + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
