"""The table of kept weights: which bytes of the shared memory are which tensor, and the checksums of these bytes.

It travels as a file in memory, sealed: the keeper passes it on like a chunk, and never looks into it.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from wan_loader.dtypes import ITEMSIZE, torch_dtype
from wan_loader.errors import KeepError

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch

    from wan_loader.devices.shared_memory import SharedRange

__all__ = ["ALIGNMENT", "KeptStorage", "KeptTable", "KeptTensor", "Origin", "padded", "read_table", "write_table"]

#: Storages begin at multiples of it, as those of torch's own allocator do.
ALIGNMENT = 512
_MAX_BYTES = 1 << 30


def padded(nbytes: int) -> int:
    """Return the bytes that a storage takes, with what is left free behind it."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


class KeptStorage(NamedTuple):
    """Bytes that one or more tensors are on, and their checksum."""

    start: int
    nbytes: int
    checksum: str


class Origin(NamedTuple):
    """The bytes of a file that are one tensor and nothing else: `file` counts the table's."""

    file: int
    start: int
    nbytes: int
    dtype: str


class KeptTensor(NamedTuple):
    """A tensor on storage number `storage`. `stride` and `offset` count elements."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    storage: int
    stride: tuple[int, ...]
    offset: int
    origin: Origin | None = None
    """What it was loaded from; None: from more than its own bytes."""


@dataclass(frozen=True, slots=True)
class KeptTable:
    """All tensors that are kept of one checkpoint."""

    storages: tuple[KeptStorage, ...]
    tensors: tuple[KeptTensor, ...]
    files: tuple[str, ...] = ()
    """What tells the files apart that they are from (`identity.file_mark`)."""

    @property
    def nbytes(self) -> int:
        """The bytes of all storages."""
        return sum(storage.nbytes for storage in self.storages)

    def check(self, nbytes: int) -> None:
        """Raise `KeepError` unless everything lies in so many bytes of memory: what lies beyond would be anybody's."""
        try:
            fits = all(0 <= one.start <= one.start + one.nbytes <= nbytes for one in self.storages)
            for tensor in self.tensors:
                last = tensor.offset + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride, strict=True))
                end = (last + 1) * ITEMSIZE[tensor.dtype] if math.prod(tensor.shape) else 0
                fits = fits and min((0, tensor.offset, *tensor.shape, *tensor.stride)) == 0
                fits = fits and (tensor.origin is None or 0 <= tensor.origin.file < len(self.files))
                fits = fits and tensor.storage >= 0 and end <= self.storages[tensor.storage].nbytes
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise KeepError("the table of kept weights is damaged") from error
        if not fits:
            raise KeepError("the table of kept weights is damaged")

    def tensors_on(self, memory: SharedRange, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Make tensors on the shared memory, without a copy. About 20 microseconds each."""
        import torch

        by_name = {tensor.name: tensor for tensor in self.tensors}
        made, out = dict[int, Any](), dict[str, torch.Tensor]()
        for name in names:
            facts = by_name[name]
            if (flat := made.get(facts.storage)) is None:
                place = self.storages[facts.storage]
                flat = made[facts.storage] = memory.tensor(place.start, place.nbytes)
            tensor = torch.empty(0, dtype=torch_dtype(facts.dtype), device=flat.device)
            out[name] = tensor.set_(flat.untyped_storage(), facts.offset, facts.shape, facts.stride)
        return out


def write_table(table: KeptTable) -> int:
    """Return the descriptor of a file in memory that holds the table, and that nobody can change."""
    fd = os.memfd_create("wan-loader-table", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        with os.fdopen(fd, "wb", closefd=False) as file:
            file.write(
                json.dumps({"storages": table.storages, "tensors": table.tensors, "files": table.files}).encode()
            )
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE)
    except BaseException:
        os.close(fd)
        raise
    return fd


def read_table(fd: int) -> KeptTable:
    """Read a table; the descriptor stays open. Raises `KeepError` for what is none."""
    try:
        nbytes = os.fstat(fd).st_size
        if nbytes > _MAX_BYTES:
            raise KeepError("the table of kept weights is damaged")
        document = json.loads(os.pread(fd, nbytes, 0))
        storages = tuple(KeptStorage(*one) for one in document["storages"])
        return KeptTable(storages, tuple(map(_tensor, document["tensors"])), tuple(document["files"]))
    except (KeyError, TypeError, ValueError, OSError) as error:
        if isinstance(error, KeepError):
            raise
        raise KeepError("the table of kept weights is damaged") from error


def _tensor(fields: list[Any]) -> KeptTensor:
    name, dtype, shape, storage, stride, offset, origin = fields
    from_file = None if origin is None else Origin(*origin)
    return KeptTensor(name, dtype, tuple(shape), storage, tuple(stride), offset, from_file)
