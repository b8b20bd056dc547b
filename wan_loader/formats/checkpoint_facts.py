"""The facts that a checkpoint's headers state: which bytes of which file make up which tensor. No weights.

A *storage* is a contiguous byte range of one file; a *tensor* is a view of one storage. Safetensors has one storage
per tensor; a torch zip checkpoint may let several tensors share one, and keeps strides. What there is one of for every
tensor is a named tuple: a third of the time that a frozen dataclass takes to make.
"""

from __future__ import annotations

import math
import os
import stat
import time
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from wan_loader.dtypes import ITEMSIZE
from wan_loader.errors import CheckpointError, MissingFileError
from wan_loader.sizes import format_bytes, format_count

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = [
    "Checkpoint",
    "FileFacts",
    "Quantised",
    "StorageFacts",
    "TensorFacts",
    "check_shape",
    "contiguous_strides",
    "stat_file",
]

_MAX_DIMENSIONS = 64
#: What file times are taken from (linux/time.h). It stands still between two ticks, for 1 to 10 ms.
_CLOCK_REALTIME_COARSE = 5
_LONGEST_TICK_NS = 10_000_000


@dataclass(frozen=True, slots=True)
class FileFacts:
    """A file and the identity that it had when its header was read."""

    path: str
    nbytes: int
    mtime_ns: int
    inode: int
    device: int
    ctime_ns: int
    """Time of the last change of its content, name or mode. No program can set it: it tells of a change whose mtime was
    put back. Stores through a mapping are told of late, when the system writes them to the disk, or never.
    """

    def check_unchanged(self) -> None:
        """Raise `CheckpointError` if the path now leads to another or a modified file. Costs one stat."""
        self._check(_stat_file(self.path))

    def check_opened(self, fd: int) -> None:
        """Raise `CheckpointError` unless a descriptor is of this very file, as it was. Costs one fstat."""
        self._check(_facts(self.path, os.fstat(fd)))

    def _check(self, now: FileFacts) -> None:
        if now != self:
            what = "replaced" if (now.inode, now.device) != (self.inode, self.device) else "modified"
            raise CheckpointError(
                f"{self.path} was {what} while it was being loaded "
                f"({self.nbytes} bytes before, {now.nbytes} now): nothing was handed out; load it again",
                path=self.path,
                remedy="load it again",
            )


class StorageFacts(NamedTuple):
    """Bytes `start` to `start + nbytes` of file number `file`."""

    file: int
    start: int
    nbytes: int


class TensorFacts(NamedTuple):
    """A tensor: a view of storage number `storage`. `stride` and `offset` count elements."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    storage: int
    stride: tuple[int, ...]
    offset: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's elements (not of the storage it may share)."""
        return math.prod(self.shape) * ITEMSIZE[self.dtype]


class Quantised(NamedTuple):
    """A tensor whose numbers are not in the file as such: what they are made of."""

    kind: str
    """The name of its type in GGUF, such as "Q4_K"; "scaled" for eight-bit floats that are multiplied by a scale."""
    raw: TensorFacts
    """The tensor as the file has it."""
    value: TensorFacts
    """The tensor of its numbers, in float32; it lies in the storage of `raw`."""
    scale: TensorFacts | None = None
    """The tensor that it is multiplied by."""
    problem: str | None = None
    """The reason why its numbers cannot be made here, as a predicate; None: they can."""


@dataclass(frozen=True, slots=True, repr=False)
class Checkpoint:
    """Facts about a checkpoint: names, dtypes, shapes, byte ranges. Holds no open file and no weight."""

    path: str
    format: str
    """"safetensors", "torch-zip", "gguf" or "torch-pickle" (which cannot be planned and goes through torch.load)."""
    files: tuple[FileFacts, ...]
    storages: tuple[StorageFacts, ...]
    tensors: tuple[TensorFacts, ...]
    """Facts of all tensors in file order: by file, then by position."""
    metadata: dict[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    part: str | None = None
    """The keys, joined by dots, of the nested dict that this is; None for a whole file."""
    quantised: Mapping[str, Quantised] = field(default_factory=dict, kw_only=True)
    """The quantised tensors by name, of a format that says which they are; scales are told by names (`with_values`)."""

    def __repr__(self) -> str:
        counts = f"{format_count(len(self.files), 'file')}, {format_count(len(self.tensors), 'tensor')}"
        return f"Checkpoint({self.path!r}, {self.format!r}, {counts}, {format_bytes(self.nbytes)})"

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all tensors, in file order."""
        return tuple(t.name for t in self.tensors)

    def names_in(self, number: int) -> list[str]:
        """Return names of the tensors that are taken from file number `number`, which may hold others beside them."""
        return [t.name for t in self.tensors if self.storages[t.storage].file == number]

    @property
    def nbytes(self) -> int:
        """Bytes of all storages, shared ones once."""
        return sum(s.nbytes for s in self.storages)

    @property
    def nbytes_file(self) -> int:
        """Bytes of all files, headers included."""
        return sum(f.nbytes for f in self.files)


def stat_file(path: str) -> FileFacts:
    """Return the identity of a regular file.

    A file that was changed a moment ago could be changed again within the same tick of the clock, and have the same
    times. So for such a file this waits for the next tick, some milliseconds: any later change shows.

    Raises:
        MissingFileError: There is none.
        CheckpointError: It is no regular file, or may not be looked at.
    """
    facts = _stat_file(path)
    if not _is_of_this_tick(facts.ctime_ns):
        return facts
    # the clock moves, the facts stay; a second stat at the end sees a change during the wait
    while _is_of_this_tick(facts.ctime_ns):
        time.sleep(0.001)
    return _stat_file(path)


def _is_of_this_tick(time_ns: int) -> bool:
    """Say whether a change now would be dated so; False also for what comes from a clock that is far ahead of ours."""
    return 0 <= time_ns - time.clock_gettime_ns(_CLOCK_REALTIME_COARSE) < _LONGEST_TICK_NS


def _stat_file(path: str) -> FileFacts:
    try:
        st = os.stat(path)
    except FileNotFoundError as error:
        raise MissingFileError.because(
            "does not exist", "check the path, or download the missing file", path=path
        ) from error
    except OSError as error:
        raise CheckpointError.because(f"cannot be read: {error.strerror}", path=path) from error
    if not stat.S_ISREG(st.st_mode):
        raise CheckpointError.because("is not a regular file", path=path)
    return _facts(path, st)


def _facts(path: str, st: os.stat_result) -> FileFacts:
    return FileFacts(path, st.st_size, st.st_mtime_ns, st.st_ino, st.st_dev, st.st_ctime_ns)


def check_shape(shape: Sequence[int], where: str) -> None:
    """Raise `CheckpointError` for shapes that no tensor can have: too many dimensions, or elements beyond 2**63."""
    if len(shape) > _MAX_DIMENSIONS or math.prod(max(size, 1) for size in shape) >= 2**63:
        raise CheckpointError(f"{where}: a shape of {len(shape)} dimensions is larger than any tensor: damaged file")


@lru_cache(maxsize=4096)
def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return row-major strides in elements, as torch counts them (a dimension of size 0 counts as 1)."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))
