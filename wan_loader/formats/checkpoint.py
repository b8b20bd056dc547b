"""From a path to one checkpoint: a file, an index, a directory that holds one, or a list of files.

Decides what the path means and joins the facts of its files. Paths inside an index are untrusted: a shard must lie
in the index's own directory.
"""

from __future__ import annotations

import contextlib
import os
import re
from dataclasses import replace
from typing import TYPE_CHECKING

from wan_loader.arguments import check_part, checked_paths
from wan_loader.errors import CheckpointError, MissingFileError
from wan_loader.formats.facts import Checkpoint, FileFacts, StorageFacts, TensorFacts, stat_file
from wan_loader.formats.safetensors import read_safetensors
from wan_loader.formats.strict_json import parse_object
from wan_loader.formats.torchpickle import read_torch_pickle
from wan_loader.formats.torchzip import UnplannedError, is_zip, read_torch_zip
from wan_loader.sizes import format_count

if TYPE_CHECKING:
    from collections.abc import Sequence

    from wan_loader.types import StrPath

__all__ = ["WEIGHT_SUFFIXES", "open_checkpoint"]

_MAX_INDEX_BYTES = 100_000_000
_INDEX_SUFFIXES = (".safetensors.index.json", ".bin.index.json")
#: How the names of files with weights end.
WEIGHT_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")
#: What a directory is that holds one of these.
_MODELS = {
    "high_noise_model": "is a WAN2.2 model's directory",
    "low_noise_model": "is a WAN2.2 model's directory",
    "model_index.json": "is a diffusers model's directory",
}
_MAX_NAMED = 8
_MAX_SEEN = 1000
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.\w+)")


def open_checkpoint(path: StrPath | Sequence[StrPath], *, part: str | None = None) -> Checkpoint:
    """Read the headers of a checkpoint and return its facts; no weight is read.

    path: a .safetensors, .pth, .pt or .bin file, a *.index.json, a directory holding exactly one checkpoint, or a
    list of files that together are one. A file is that file, also where it is one of a set of shards: the set is
    meant by its index or its directory.
    part: of a torch file that nests dicts, the one to read, by its keys joined by dots: "state_dict", "model.ema".

    Costs a few small reads per file (about 1 ms for 1000 tensors). Does not import
    torch, except for pickles that only torch can read (legacy ones, tensor subclasses).

    Raises `CheckpointError` for anything damaged, foreign or unsafe, `MissingFileError` (also a `FileNotFoundError`)
    for what is not there, `OptionError` for what is no path, such as an open file.
    """
    path = checked_paths(path)
    check_part(part)
    try:
        return _open(path, part)
    except CheckpointError:
        raise
    except OSError as error:
        what = "does not exist" if isinstance(error, FileNotFoundError) else f"cannot be read: {error.strerror}"
        kind = MissingFileError if isinstance(error, FileNotFoundError) else CheckpointError
        raise kind(f"{error.filename or path} {what}") from error


def _open(path: StrPath | Sequence[StrPath], part: str | None) -> Checkpoint:
    if isinstance(path, str | os.PathLike):
        target = os.fspath(path)
        shards = [target]
        if os.path.isdir(target):
            shards = _complete_shards(_only_checkpoint(target))
            target = target if len(shards) > 1 else shards[0]
        return _open_index(target, part) if target.endswith(".json") else _join(target, shards, part)
    files = [os.fspath(p) for p in path]
    if not files:
        raise CheckpointError("an empty list of files is no checkpoint")
    return _join(files[0] if len(files) == 1 else os.path.dirname(files[0]) or ".", files, part)


def _only_checkpoint(directory: str) -> str:
    """The one checkpoint in a directory: an index, a file, or the first of a set of shards."""
    names = sorted(os.listdir(directory))
    found = {n for n in names if n.endswith(_INDEX_SUFFIXES)}
    indexed = {n.removesuffix(".index.json") for n in found}
    for name in names:
        if not name.endswith(WEIGHT_SUFFIXES):
            continue
        shard = _SHARD.fullmatch(name)
        if shard is None:
            found.add(name)
        elif shard["stem"] + shard["suffix"] not in indexed:
            found.add(f"{shard['stem']}-00001-of-{shard['count']}{shard['suffix']}")
    if len(found) == 1:
        return os.path.join(directory, found.pop())
    raise _not_one(directory, names, sorted(found))


def _not_one(directory: str, names: Sequence[str], found: Sequence[str]) -> CheckpointError:
    """The error that names the checkpoints in a directory, and in its subdirectories, when it holds not just one."""
    parts = [*_directories_with_weights(directory, names), *found]
    if not parts:
        suffixes = ", ".join(f"*{suffix}" for suffix in WEIGHT_SUFFIXES)
        return MissingFileError(f"{directory} holds no checkpoint (*.index.json, {suffixes})")
    what = f"holds {len(found)} checkpoints" if found else "holds checkpoints in subdirectories only"
    what = next((kind for mark, kind in _MODELS.items() if mark in names), what)
    paths = [os.path.join(directory, part) for part in parts[:_MAX_NAMED]]
    paths += [f"and {len(parts) - _MAX_NAMED} more"] if len(parts) > _MAX_NAMED else []
    return (CheckpointError if found else MissingFileError)(
        f"{directory} {what}: name one of its parts: {', '.join(paths)}"
    )


def _directories_with_weights(directory: str, names: Sequence[str]) -> list[str]:
    """Some of the subdirectories that directly hold files with weights."""
    held = []
    for name in names[:_MAX_SEEN]:
        with contextlib.suppress(OSError):  # a file, or not for us to read
            if any(n.endswith(WEIGHT_SUFFIXES) for n in os.listdir(os.path.join(directory, name))):
                held.append(name)
    return held


def _complete_shards(path: str) -> list[str]:
    """All files of the shard set that `path` is the first of; otherwise the file alone."""
    directory, name = os.path.split(path)
    shard = _SHARD.fullmatch(name)
    if shard is None or int(shard["number"]) != 1 or not 1 <= int(shard["count"]) <= 10_000:
        return [path]
    count, stem, suffix = shard["count"], shard["stem"], shard["suffix"]
    return [os.path.join(directory, f"{stem}-{i + 1:05d}-of-{count}{suffix}") for i in range(int(count))]


def _open_index(path: str, part: str | None) -> Checkpoint:
    weight_map = _read_index(path)
    directory = os.path.dirname(path) or "."
    shards = sorted(set(weight_map.values()))
    for shard in shards:
        if os.path.basename(shard) != shard or shard in (".", "..", "") or not shard.isprintable():
            name = next(n for n, s in weight_map.items() if s == shard)
            raise CheckpointError(
                f"{path}: tensor {name!r} points to {shard!r}: not a plain file name, or outside its directory"
            )
    checkpoint = _join(path, [os.path.join(directory, shard) for shard in shards], part)
    held = {t.name: shards[checkpoint.storages[t.storage].file] for t in checkpoint.tensors}
    if held == weight_map:
        return checkpoint
    for name, shard in weight_map.items():
        if held.get(name) != shard:
            raise CheckpointError(f"{path}: tensor {name!r} should be in {shard}, which lacks it")
    extra = sorted(set(held) - set(weight_map))
    # The index is the list of contents (as it is for transformers and diffusers): others are not part of it.
    note = f"in the shards but not in the index, and left out: {format_count(len(extra), 'tensor')}, first {extra[0]!r}"
    return replace(
        checkpoint,
        tensors=tuple(t for t in checkpoint.tensors if t.name in weight_map),
        warnings=(*checkpoint.warnings, note),
    )


def _read_index(path: str) -> dict[str, str]:
    file = stat_file(path)
    if file.nbytes > _MAX_INDEX_BYTES:
        raise CheckpointError(f"{path} is larger than {_MAX_INDEX_BYTES} bytes: not a checkpoint index")
    with open(path, "rb") as f:
        index = parse_object(f.read(), path=path, what="the index")
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(f"{path} has no weight_map of tensor names to files: not a checkpoint index")
    return weight_map


def _join(path: str, paths: list[str], part: str | None) -> Checkpoint:
    """One checkpoint of several files; every tensor name may stand in one file only."""
    if missing := [p for p in paths if _is_missing(p)]:
        more = f" (and {len(missing) - 1} more of {len(paths)} files)" if len(missing) > 1 else ""
        raise MissingFileError(f"{missing[0]} does not exist{more}: check the path, or finish the download")
    if len(paths) == 1:
        return replace(_open_file(paths[0], part), path=path)
    files: list[FileFacts] = []
    storages: list[StorageFacts] = []
    tensors: list[TensorFacts] = []
    owner: dict[str, str] = {}
    shards: list[Checkpoint] = []
    for number, name in enumerate(paths):
        shard = _open_file(name, part, number, len(storages))
        for tensor in shard.tensors:
            if other := owner.get(tensor.name):
                raise CheckpointError(f"tensor {tensor.name!r} stands in both {other} and {shard.path}")
            owner[tensor.name] = shard.path
        shards.append(shard)
        files += shard.files
        storages += shard.storages
        tensors += shard.tensors
    if len({shard.format for shard in shards}) > 1:
        raise CheckpointError(f"{path}: its files are of different formats: {', '.join({s.format for s in shards})}")
    warnings = tuple(w for shard in shards for w in shard.warnings)
    kind, metadata = shards[0].format, shards[0].metadata
    return Checkpoint(path, kind, tuple(files), tuple(storages), tuple(tensors), metadata, warnings, part)


def _is_missing(path: str) -> bool:
    """As `not os.path.exists`, but what may not be looked at is an error."""
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return True
    return False


def _open_file(path: str, part: str | None, number: int = 0, n_storages: int = 0) -> Checkpoint:
    """A file, as number `number` of its checkpoint, after files with `n_storages` storages."""
    if path.endswith(".safetensors") or not path.endswith(WEIGHT_SUFFIXES):
        if part is not None:
            raise CheckpointError(f"{path} is a safetensors file, which has no parts: load it without part")
        file, storages, tensors, metadata = read_safetensors(path, number, n_storages)
        return Checkpoint(path, "safetensors", (file,), tuple(storages), tuple(tensors), metadata)
    shard = _open_torch(path, part)
    if number == n_storages == 0:
        return shard
    return replace(  # constructors: `replace` of each costs five times as much
        shard,
        storages=tuple(StorageFacts(number, s.start, s.nbytes) for s in shard.storages),
        tensors=tuple(
            TensorFacts(t.name, t.dtype, t.shape, t.storage + n_storages, t.stride, t.offset) for t in shard.tensors
        ),
    )


def _open_torch(path: str, part: str | None) -> Checkpoint:
    stat_file(path)
    if is_zip(path):
        try:
            file, storages, tensors = read_torch_zip(path, part)
            return Checkpoint(path, "torch-zip", (file,), tuple(storages), tuple(tensors), part=part)
        except UnplannedError as reason:
            return read_torch_pickle(path, f"{path} cannot be planned ({reason})", part)
    return read_torch_pickle(path, f"{path} is a legacy pickle, not a zip checkpoint", part)
