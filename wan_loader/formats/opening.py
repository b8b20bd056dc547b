"""Opening of one checkpoint: a file, an index, a directory that holds one, or a list of files.

Decides what a path means and joins the facts of its files. The content of a file says what it is, its name only what
it is called; which of a directory's files are one checkpoint is for `directory` and `choosing`.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING

from wan_loader.arguments import check_part, checked_paths
from wan_loader.errors import CheckpointError, MissingFileError
from wan_loader.formats.checkpoint_facts import Checkpoint, FileFacts, StorageFacts, TensorFacts
from wan_loader.formats.choosing import choose
from wan_loader.formats.directory import missing_error
from wan_loader.formats.file_names import SAFETENSORS, is_dcp_name, is_unfinished, is_weight_name
from wan_loader.formats.foreign_files import Foreign, is_json, other_file, read_head, text_of
from wan_loader.formats.hub_cache import locate
from wan_loader.formats.index import read_index, shards_of
from wan_loader.formats.known_formats import format_of, recognise_format
from wan_loader.formats.safetensors import SafetensorsFormat
from wan_loader.sizes import format_count

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from wan_loader.types import StrPath

__all__ = ["open_checkpoint"]


def open_checkpoint(path: StrPath | Sequence[StrPath], *, part: str | None = None) -> Checkpoint:
    """Read the headers of a checkpoint and return its facts; no weight is read.

    Costs a few small reads per file (about 1 ms for 1000 tensors). Does not import torch, except for pickles that only
    torch can read (legacy ones, tensor subclasses).

    Args:
        path: A file of safetensors, of torch.save or GGUF, whatever it is called; a *.index.json; a directory holding
            exactly one checkpoint, or a repository of the Hugging Face Hub as OWNER/NAME, if it lies in the local
            cache; or a list of files that together are one. A file is that file, also where it is one of a set of
            shards: the set is meant by its index, its directory or, where that holds other checkpoints too, by `*` in
            the place of the number (`model-*-of-00002.safetensors`).
        part: The part to read of a torch file that nests dicts, by its keys joined by dots: "state_dict", "model.ema".

    Returns:
        The facts of all files, joined.

    Raises:
        CheckpointError: Anything is damaged, foreign or unsafe.
        MissingFileError: Something is not there (also a `FileNotFoundError`).
        OptionError: `path` is no path, such as an open file.
    """
    path = checked_paths(path)
    check_part(part)
    try:
        return _open(path, part)
    except CheckpointError:
        raise
    except OSError as error:
        reason = "does not exist" if isinstance(error, FileNotFoundError) else f"cannot be read: {error.strerror}"
        kind = MissingFileError if isinstance(error, FileNotFoundError) else CheckpointError
        raise kind.because(reason, path=error.filename or str(path)) from error


def _open(path: StrPath | Sequence[StrPath], part: str | None) -> Checkpoint:
    if isinstance(path, str | os.PathLike):
        place = locate(os.fspath(path))
        directory, name = os.path.split(place)
        if os.path.isdir(place):
            return _open_directory(place, place, None, part)
        # a file may be called so, and is then that file
        if "*" in name and not os.path.lexists(place):
            return _open_directory(place, directory or ".", name, part)
        return _open_single(place, part)
    files = [os.fspath(p) for p in path]
    if not files:
        raise CheckpointError("an empty list of files is no checkpoint")
    # a path to show: the files may lie anywhere
    return _join(files[0] if len(files) == 1 else os.path.dirname(files[0]) or ".", files, part)


def _open_directory(path: str, directory: str, pattern: str | None, part: str | None) -> Checkpoint:
    """Open the checkpoint in a directory, or among the names in it that match a pattern; `path` is what was named."""
    chosen, notes = choose(directory, pattern)
    if chosen.weight_map is not None:
        checkpoint = _open_index(os.path.join(directory, chosen.name), chosen.weight_map, part)
    else:
        files = [os.path.join(directory, name) for name in chosen.files]
        checkpoint = _join(path if len(files) > 1 else files[0], files, part)
    return replace(checkpoint, warnings=(*checkpoint.warnings, *notes)) if notes else checkpoint


def _open_single(path: str, part: str | None) -> Checkpoint:
    """Open a file, or an index: JSON that is not called like weights, or what is called so and is nothing we know."""
    _check_there([path])
    head = read_head(path)
    if recognise_format(head) is None:
        is_called_so = path.lower().endswith(".json") and not other_file(path, head)
        if not is_weight_name(path) if is_json(head) else is_called_so:
            return _open_index(path, read_index(path), part)
    return _open_file(path, head, part)


def _open_index(path: str, weight_map: dict[str, str], part: str | None) -> Checkpoint:
    """Open the files that an index lists.

    The index is the list of contents, as it is for transformers and diffusers: a tensor that stands in two files
    belongs where the index says, and one that it does not list is left out.
    """
    shards = shards_of(path, weight_map)
    paths = [os.path.join(os.path.dirname(path) or ".", shard) for shard in shards]
    checkpoint = _join(path, paths, part, weight_map)
    held = set(checkpoint.names)
    if (lacking := next((name for name in weight_map if name not in held), None)) is not None:
        raise CheckpointError(
            f"{path}: tensor {lacking!r} should be in {weight_map[lacking]}, which lacks it", path=path, tensor=lacking
        )
    return checkpoint


def _join(path: str, paths: list[str], part: str | None, weight_map: dict[str, str] | None = None) -> Checkpoint:
    """Join files to one checkpoint. Every tensor name may stand in one file only, unless a `weight_map` decides."""
    _check_there(paths)
    if len(paths) == 1 and weight_map is None:
        return replace(_open_file(paths[0], read_head(paths[0]), part), path=path)
    files: list[FileFacts] = []
    storages: list[StorageFacts] = []
    tensors: list[TensorFacts] = []
    shards: list[Checkpoint] = []
    for number, name in enumerate(paths):
        shard = _open_file(name, read_head(name), part, number, len(storages))
        shards.append(shard)
        files += shard.files
        storages += shard.storages
        tensors += shard.tensors if weight_map is None else _listed(shard, weight_map)
    formats = {shard.format for shard in shards}
    # archives beside legacy pickles, for instance: torch.load reads both
    formats = formats.difference(*(format_of(shard).reads_too for shard in shards))
    if len(formats) > 1:
        raise CheckpointError(f"{path}: its files are of different formats: {', '.join(sorted(formats))}", path=path)
    warnings = [w for shard in shards for w in shard.warnings]
    if weight_map is None:
        _check_unique(shards)
    else:
        warnings += _unlisted(shards, weight_map)
    (kind,), metadata = formats, shards[0].metadata
    quantised = {name: one for shard in shards for name, one in shard.quantised.items()}
    return Checkpoint(
        path, kind, tuple(files), tuple(storages), tuple(tensors), metadata, tuple(warnings), part, quantised=quantised
    )


def _listed(shard: Checkpoint, weight_map: dict[str, str]) -> list[TensorFacts]:
    """Return the tensors of a file that the index puts into it."""
    name = os.path.basename(shard.path)
    return [tensor for tensor in shard.tensors if weight_map.get(tensor.name) == name]


def _unlisted(shards: list[Checkpoint], weight_map: dict[str, str]) -> Iterator[str]:
    """Warn of tensors that were left out, because the index does not list them, or lists them elsewhere."""
    names = [tensor.name for shard in shards for tensor in shard.tensors]
    if extra := sorted({name for name in names if name not in weight_map}):
        count = format_count(len(extra), "tensor")
        yield f"in the shards but not in the index, and left out: {count}, first {extra[0]!r}"
    if len(names) > len(weight_map) and (again := _repeated(name for name in names if name in weight_map)):
        yield f"in several shards, and taken from where the index says: {again!r}"


def _check_unique(shards: list[Checkpoint]) -> None:
    name = _repeated(tensor.name for shard in shards for tensor in shard.tensors)
    if name is not None:
        first, second, *_ = (shard.path for shard in shards if name in shard.names)
        raise CheckpointError(f"tensor {name!r} stands in both {first} and {second}", path=second, tensor=name)


def _repeated(names: Iterable[str]) -> str | None:
    """Return the first name that comes a second time."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None


def _check_there(paths: list[str]) -> None:
    if missing := [path for path in paths if _is_missing(path)]:
        raise missing_error(os.path.dirname(missing[0]), os.path.basename(missing[0]), len(missing), len(paths))


def _is_missing(path: str) -> bool:
    """Say whether a path leads nowhere, as `not os.path.exists`, but what may not be looked at is an error."""
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return True
    return False


def _open_file(path: str, head: bytes, part: str | None, number: int = 0, n_storages: int = 0) -> Checkpoint:
    """Open a file that begins with `head`, as file `number` of a checkpoint, after files with `n_storages` storages."""
    _check_ours(path, head)
    by_content = recognise_format(head) or SafetensorsFormat()  # called so: what is wrong with it, its reader says
    return by_content.read(path, part, number, n_storages)


def _check_ours(path: str, head: bytes) -> None:
    """Raise `CheckpointError` for what is none of our formats, and for what is still being downloaded."""
    is_ours, foreign = recognise_format(head) is not None, None
    if os.path.exists(f"{path}.aria2"):  # the file has its full length from the start
        reason = f"is still being downloaded, as {path}.aria2 says"
        foreign = Foreign(reason, "let aria2c end; if it has, remove that file")
    elif not is_ours or is_unfinished(path) or is_dcp_name(path):
        foreign = other_file(path, head)
    if foreign is None and not is_ours:
        foreign = _unknown(path, head)
    if foreign is not None:
        raise CheckpointError.because(*foreign, path=path)


def _unknown(path: str, head: bytes) -> Foreign | None:
    """Say what a file is that is none of our formats, and nothing that is known; None if its name says safetensors."""
    if is_json(head):
        reason = "is JSON, perhaps a server's message, and holds no weights"
        return Foreign(reason, "download it again, or name an index alone")
    if (text := text_of(head)) is not None:
        reason = f"is a text, and neither safetensors nor a torch checkpoint; it begins with {text!r}"
        return Foreign(reason, "download it again")
    if path.lower().endswith(SAFETENSORS):
        return None
    return Foreign("is neither safetensors nor a torch checkpoint nor GGUF, or it is damaged", None)
