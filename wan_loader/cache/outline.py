"""The outline of an entry: what it will hold, decided from headers alone; and its key. Pure, but for the source's stat.

An entry is a directory of ordinary safetensors files, each with its data section at a multiple of 4096 bytes, and of
small files beside them. Tensors lie in the order of first use; only those whose size would misalign what follows them
come last, largest elements first, because safetensors allows no gap between tensors.

The key covers everything that the bytes of an entry depend on: the identity of the source's files, each tensor's name,
dtype and place there, its name and dtype in the entry, and the format's version. Another key map, dtype policy or
source is another key.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from wan_loader.dtypes import ITEMSIZE
from wan_loader.errors import CacheError
from wan_loader.formats.checkpoint_facts import contiguous_strides, stat_file
from wan_loader.formats.known_formats import is_planned
from wan_loader.formats.safetensors import SAFETENSORS_NAMES
from wan_loader.system.posix import PAGE

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from wan_loader.formats.checkpoint_facts import Checkpoint, TensorFacts
    from wan_loader.plan.dtype_policy import DtypePolicy

__all__ = [
    "ENTRY_FILE",
    "FORMAT_VERSION",
    "CachedFile",
    "CachedTensor",
    "Outline",
    "SourceIdentity",
    "outline_checkpoint",
    "outline_file",
    "safetensors_header",
    "why_not",
    "why_source",
]

FORMAT_VERSION = 1
#: The one file of an entry that was made from one checkpoint.
ENTRY_FILE = "model.safetensors"
_ALIGNMENT = 8  # the largest element that safetensors knows


@dataclass(frozen=True, eq=False)
class CachedTensor:
    """One tensor of an entry: its name and dtype there, and the tensor of the source that it is made from."""

    name: str
    dtype: str
    source: TensorFacts

    @property
    def nbytes(self) -> int:
        """Bytes in the entry."""
        return math.prod(self.source.shape) * ITEMSIZE[self.dtype]


@dataclass(frozen=True, slots=True)
class CachedFile:
    """One safetensors file of an entry."""

    path: str
    """The path relative to the entry, with `/`."""
    checkpoint: Checkpoint = field(repr=False)
    tensors: tuple[CachedTensor, ...] = field(repr=False)
    """The tensors, in the order in which they lie in the file."""

    @property
    def nbytes(self) -> int:
        """Bytes of tensor data."""
        return sum(t.nbytes for t in self.tensors)


@dataclass(frozen=True, slots=True)
class SourceIdentity:
    """A file of the source, and what tells whether it is still the same."""

    path: str
    nbytes: int
    mtime_ns: int
    ctime_ns: int
    inode: int


@dataclass(frozen=True, slots=True)
class Outline:
    """The content of an entry that is to be."""

    label: str
    """The name that people call the source by: its path."""
    dtype: str | None
    files: tuple[CachedFile, ...]
    small_files: Mapping[str, bytes] = field(default_factory=dict, repr=False)
    """Configurations and the like, by relative path."""

    @property
    def nbytes(self) -> int:
        """Bytes of the whole entry, near enough to plan for."""
        return sum(f.nbytes for f in self.files) + sum(map(len, self.small_files.values()))

    @property
    def sources(self) -> tuple[SourceIdentity, ...]:
        """The identity that the source's files have now. One stat a file; `CheckpointError` if one is gone."""
        paths = dict.fromkeys(file.path for cached in self.files for file in cached.checkpoint.files)
        return tuple(_source_identity(path) for path in paths)

    def key(self, sources: Sequence[SourceIdentity]) -> str:
        """Return the entry's name: 32 hexadecimal digits. Costs about 5 microseconds a tensor."""
        digest = hashlib.blake2b(digest_size=16)
        digest.update(repr((FORMAT_VERSION, PAGE)).encode())
        for s in sources:
            # the name alone: a directory that was moved as a whole is the same source
            digest.update(repr((Path(s.path).name, s.nbytes, s.mtime_ns, s.ctime_ns, s.inode)).encode())
        for file in self.files:
            digest.update(repr(file.path).encode())
            for t in file.tensors:
                facts, place = t.source, file.checkpoint.storages[t.source.storage]
                digest.update(
                    repr(
                        (t.name, t.dtype, facts.name, facts.dtype, facts.shape, place.file, place.start, place.nbytes)
                    ).encode()
                )
        for name, content in sorted(self.small_files.items()):
            digest.update(repr((name, hashlib.blake2b(content).hexdigest())).encode())
        return digest.hexdigest()


def _source_identity(path: str) -> SourceIdentity:
    stat_file(path)
    st = os.stat(path)
    return SourceIdentity(os.path.abspath(path), st.st_size, st.st_mtime_ns, st.st_ctime_ns, st.st_ino)


def outline_file(
    path: str,
    checkpoint: Checkpoint,
    target: Callable[[str, str], str],
    *,
    rename: Callable[[str], str | None] | None = None,
    order: Mapping[str, int] | None = None,
) -> CachedFile:
    """Decide one file of an entry: every tensor of a checkpoint.

    Args:
        path: The path relative to the entry, with `/`.
        checkpoint: The source.
        target: Name and dtype in the source -> dtype in the entry.
        rename: Name in the source -> name in the entry; None leaves a tensor out.
        order: The rank of first use, by name in the entry; others follow, in file order.
    """
    tensors = []
    for facts in checkpoint.tensors:
        name = facts.name if rename is None else rename(facts.name)
        if name is not None:
            tensors.append(CachedTensor(name, target(facts.name, facts.dtype), facts))
    ranks = order or {}
    # sorts are stable: what has no rank stays in file order
    tensors.sort(key=lambda t: ranks.get(t.name, len(ranks)))
    # a tensor whose size is no multiple of 8 would misalign all that follow it
    whole = [t for t in tensors if t.nbytes % _ALIGNMENT == 0]
    odd = [t for t in tensors if t.nbytes % _ALIGNMENT]
    odd.sort(key=lambda t: -ITEMSIZE[t.dtype])
    return CachedFile(path, checkpoint, (*whole, *odd))


def outline_checkpoint(checkpoint: Checkpoint, policy: DtypePolicy) -> Outline:
    """Outline an entry of a checkpoint: all of its tensors under their names, in the dtypes of the policy."""
    label = checkpoint.path if checkpoint.part is None else f"{checkpoint.path}, part {checkpoint.part}"
    return Outline(label, policy.dtype, (outline_file(ENTRY_FILE, checkpoint, policy.target),))


def why_not(file: CachedFile) -> str | None:
    """Explain why a checkpoint cannot be kept in the cache with what its tensors share and are; None if it can."""
    checkpoint = file.checkpoint
    if not is_planned(checkpoint):
        return "only torch.load can read the file"
    if checkpoint.quantised:
        return "it is quantised, and smaller than its numbers"
    users = Counter(t.storage for t in checkpoint.tensors)
    for cached in file.tensors:
        facts = cached.source
        if users[facts.storage] > 1:
            return f"{facts.name!r} shares its memory with another tensor, which safetensors cannot express"
        if facts.stride != contiguous_strides(facts.shape) or facts.offset:
            return f"{facts.name!r} is not contiguous, which safetensors cannot express"
        if checkpoint.storages[facts.storage].nbytes != facts.nbytes:
            return f"{facts.name!r} is part of a larger storage, which safetensors cannot express"
        if cached.dtype not in SAFETENSORS_NAMES:
            return f"{facts.name!r} is {cached.dtype}, which safetensors cannot express"
        if cached.dtype == "float4_e2m1fn_x2" and not facts.shape:
            return f"{facts.name!r} is a single pair of {cached.dtype}, which safetensors cannot express"
    return None


def why_source(outline: Outline) -> str | None:
    """Explain why a load has nothing to gain from an entry, or cannot have one; None if it is worth one."""
    if all(t.dtype == t.source.dtype for file in outline.files for t in file.tensors):
        return "nothing is converted: the source is as fast"
    return next((reason for file in outline.files if (reason := why_not(file)) is not None), None)


def safetensors_header(tensors: Sequence[CachedTensor]) -> bytes:
    """Return length and JSON of a safetensors file, filled with spaces so that the data begins at a multiple of `PAGE`.

    Raises:
        CacheError: Two tensors would have one name.
    """
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for t in tensors:
        if t.name in entries:
            raise CacheError(f"two tensors would be called {t.name!r} in the cache", tensor=t.name)
        shape = list(t.source.shape)
        # torch counts pairs of 4-bit numbers, safetensors the numbers
        if t.dtype == "float4_e2m1fn_x2" and shape:
            shape[-1] *= 2
        entries[t.name] = {
            "dtype": SAFETENSORS_NAMES[t.dtype],
            "shape": shape,
            "data_offsets": [position, position + t.nbytes],
        }
        position += t.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % PAGE)
    return len(text).to_bytes(8, "little") + text
