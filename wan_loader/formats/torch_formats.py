"""The formats of torch.save: zip archives, whose tensors are planned, and pickles that only torch can read.

An archive that cannot be planned (sparse tensors and the like in it) is opened as such a pickle. What reads the files
is imported when there is one: most loads are of safetensors, and every import is part of a start.
"""

from __future__ import annotations

import pickle
import warnings
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from wan_loader.errors import CheckpointError
from wan_loader.formats.checkpoint_facts import Checkpoint, StorageFacts, TensorFacts
from wan_loader.formats.checkpoint_format import Likeness
from wan_loader.formats.file_names import SAFETENSORS
from wan_loader.formats.foreign_files import other_archive

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["TorchPickleFormat", "TorchZipFormat"]

_ZIP = b"PK\x03\x04"
#: How a pickle of torch.save begins that is no zip: protocol 2 and torch's magic number.
_LEGACY_TORCH = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."


class TorchZipFormat:
    """The archives that torch.save has written since torch 1.6."""

    name = "torch-zip"
    stays_mapped = False
    reads_too: frozenset[str] = frozenset()
    load_whole = None

    def likeness(self, head: bytes) -> Likeness:
        """Judge an archive by its signature, and torch's by the name of its first record."""
        if not head.startswith(_ZIP):
            return Likeness.NONE
        # the local header: its 27th and 28th byte are the length of the name that follows at 30
        length = int.from_bytes(head[26:28], "little")
        return Likeness.CERTAIN if head[30 : 30 + length].endswith(b"/data.pkl") else Likeness.LIKELY

    def read(self, path: str, part: str | None, number: int = 0, n_storages: int = 0) -> Checkpoint:
        """Read the facts of an archive; through torch if they cannot be read from its records."""
        from wan_loader.formats.torch_pickle import read_torch_pickle
        from wan_loader.formats.torch_zip import UnplannedError, read_torch_zip

        try:
            file, storages, tensors = read_torch_zip(path, part)
        except UnplannedError as reason:
            # as torch-pickle from here on: format_of gives what loads it
            shard = read_torch_pickle(path, f"{path} cannot be planned ({reason})", part)
        except CheckpointError as error:
            if foreign := other_archive(path):
                raise CheckpointError.because(*foreign, path=path) from error
            raise
        else:
            shard = Checkpoint(path, self.name, (file,), tuple(storages), tuple(tensors), part=part)
        return _numbered(shard, number, n_storages)

    def reference_tensors(self, path: str, names: Sequence[str], part: str | None) -> Iterator[tuple[str, Any]]:
        """Read tensors as torch.load maps them."""
        return _by_torch(path, names, part, mmap=True)


class TorchPickleFormat:
    """The pickles that torch.save wrote before, and archives that cannot be planned.

    torch.load(weights_only=True) reads both.
    """

    name = "torch-pickle"
    stays_mapped = False
    reads_too = frozenset({"torch-zip"})

    def likeness(self, head: bytes) -> Likeness:
        """Judge a pickle by its protocol, and torch's by its magic number."""
        if head.startswith(_LEGACY_TORCH):
            return Likeness.CERTAIN
        is_pickle = head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")
        return Likeness.LIKELY if is_pickle else Likeness.NONE

    def read(self, path: str, part: str | None, number: int = 0, n_storages: int = 0) -> Checkpoint:
        """Read the facts by loading the file once."""
        from wan_loader.formats.torch_pickle import read_torch_pickle

        shard = read_torch_pickle(path, f"{path} is a legacy pickle, not a zip checkpoint", part)
        return _numbered(shard, number, n_storages)

    def load_whole(self, path: str, device: str, part: str | None) -> dict[str, Any]:
        """Read the tensors of a file, as torch.load(weights_only=True) gives them."""
        from wan_loader.formats.torch_pickle import load_torch_pickle

        return load_torch_pickle(path, device, part)

    def reference_tensors(self, path: str, names: Sequence[str], part: str | None) -> Iterator[tuple[str, Any]]:
        """Read tensors as torch.load does, which maps no legacy file."""
        return _by_torch(path, names, part, mmap=False)


def _numbered(shard: Checkpoint, number: int, n_storages: int) -> Checkpoint:
    """Return the facts of a file among others. By constructors: `replace` of each costs five times as much."""
    if number == n_storages == 0:
        return shard
    return replace(
        shard,
        storages=tuple(StorageFacts(number, s.start, s.nbytes) for s in shard.storages),
        tensors=tuple(
            TensorFacts(t.name, t.dtype, t.shape, t.storage + n_storages, t.stride, t.offset) for t in shard.tensors
        ),
    )


def _by_torch(path: str, names: Sequence[str], part: str | None, *, mmap: bool) -> Iterator[tuple[str, Any]]:
    import torch

    from wan_loader.formats.nested_parts import choose_part

    held = choose_part(_torch_load(path, mmap=mmap), part, path=path, is_tensor=torch.is_tensor)
    yield from ((name, held[name]) for name in names)


def _torch_load(path: str, *, mmap: bool) -> Any:
    import torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if mmap and not path.endswith(SAFETENSORS):
                return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            with open(path, "rb") as file:  # torch reads a path by its suffix, and maps nothing else than a path
                return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # torch does not know all opcodes that are read as facts
        raise CheckpointError(
            f"{path} can be loaded, but not verified: torch.load(weights_only=True), to compare with, refuses it; "
            "save it again with torch.save and its own pickle_protocol",
            path=path,
            remedy="save it again with torch.save and its own pickle_protocol",
        ) from error
