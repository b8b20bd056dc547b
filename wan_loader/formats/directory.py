"""The checkpoints that a directory holds: by its indexes first, then by the numbers of shards, then file by file.

    an index            owns the files that it lists, whatever they are called
    a set of shards     NAME-00001-of-00003.safetensors and its like, where no index owns them
    a file              with weights by its name or, where no name speaks of weights, by its content

Hidden files and what a training keeps beside the weights do not count. Of what is called alike (`model.safetensors`
and `pytorch_model.bin`), safetensors count; GGUF counts where there is nothing else. What is left out is said.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections import defaultdict
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import TYPE_CHECKING

from wan_loader.errors import CheckpointError, MissingFileError
from wan_loader.formats.file_names import (
    GGUF,
    SAFETENSORS,
    is_index_name,
    is_training_state,
    is_unfinished,
    is_weight_name,
    parse_shard,
    slices_in,
    stem_of,
)
from wan_loader.formats.foreign_files import other_format, read_head, stand_in
from wan_loader.formats.index import read_index, shards_of
from wan_loader.formats.known_formats import holds_weights, recognise_format

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

__all__ = ["Candidate", "Holding", "examined", "look_into", "missing_error"]

_MAX_NAMED = 8
_MAX_SNIFFED = 64
_MAX_MISSING = 10_000


@dataclass(frozen=True, slots=True)
class Candidate:
    """One checkpoint in a directory."""

    name: str
    """The name to give for it, below the directory: an index, a file, or a pattern for a set of shards."""
    files: tuple[str, ...]
    """Names of its files, of a set of shards those that are there; none for an index that cannot be read."""
    weight_map: dict[str, str] | None = field(default=None, repr=False)
    """The file of each tensor, as an index says; None for anything else."""
    missing: tuple[str, ...] = ()
    """Names of its files that are not there, ten thousand at most."""
    problem: CheckpointError | None = None
    """The reason why it cannot be opened, as far as that is known."""

    @property
    def stem(self) -> str:
        """The name without its format."""
        return stem_of(self.name if "*" not in self.name or not self.files else self.files[0])

    @property
    def is_safetensors(self) -> bool:
        """True if it is safetensors, by name."""
        return any(SAFETENSORS in name.lower() for name in self.files or (self.name,))

    @property
    def is_damaged_index(self) -> bool:
        """True if it is an index that cannot be read."""
        return not self.files

    @property
    def is_absent(self) -> bool:
        """True if it is an index of which no file is there."""
        return self.weight_map is not None and len(self.missing) == len(self.files)


@dataclass(frozen=True, slots=True)
class Holding:
    """The checkpoints in a directory, and what lies beside them."""

    candidates: tuple[Candidate, ...]
    training_state: tuple[str, ...]
    """Names of files with what a training keeps beside the weights."""
    notes: tuple[str, ...]
    """The names that do not count, and why: for the user."""


def look_into(directory: str, pattern: str | None = None, *, by_content: bool = True) -> Holding:
    """Find the checkpoints that lie directly in a directory.

    Args:
        directory: The directory; its subdirectories are not looked at.
        pattern: Look at the names that it matches only; `*` is the number of a shard or, if nothing matches, any text.
        by_content: Where no name speaks of weights, read the first bytes of some files.
    """
    names = _matching(_files(directory), pattern)
    indexes = _indexes(directory, names)
    owned = {file for index in indexes for file in index.files}
    loose = [n for n in names if n not in owned and is_weight_name(n)]
    slices = slices_in(loose)
    loose = [n for n in loose if n not in slices]
    training = tuple(n for n in loose if is_training_state(n))
    candidates = [index for index in indexes if not is_training_state(index.name)]
    candidates += _sets_and_files(directory, [n for n in loose if n not in training])
    candidates, notes = _preferred(candidates)
    candidates, quantised = _without_gguf(candidates)
    notes += [f"left out: {_some(quantised)}: GGUF counts where there is nothing else"] if quantised else []
    candidates, others = _without_others(directory, candidates)
    if by_content and not candidates:
        candidates = [Candidate(name, (name,)) for name in _weights_by_content(directory, names)]
    notes += [f"left out: {_some(others)}: not a checkpoint by content"] if others else []
    notes += [f"left out: {_some(sorted(slices))}: slices of every tensor"] if slices else []
    notes += [f"left out: {_some(training)}: what a training keeps beside the weights"] if training else []
    return Holding(tuple(sorted(candidates, key=lambda c: c.name)), training, tuple(notes))


def missing_error(directory: str, name: str, n_missing: int, n_files: int) -> MissingFileError:
    """Return the error for a checkpoint of which files are not there, `name` the first of them."""
    more = f" (and {n_missing - 1} more of {n_files} files)" if n_missing > 1 else ""
    path = os.path.join(directory, name)
    return MissingFileError.because(f"does not exist{more}", "check the path, or finish the download", path=path)


def _files(directory: str) -> list[str]:
    """Return names of what may be files: no directories, and nothing hidden."""
    with os.scandir(directory) as entries:
        return [entry.name for entry in entries if not entry.name.startswith(".") and not _is_directory(entry)]


def _is_directory(entry: os.DirEntry[str]) -> bool:
    with contextlib.suppress(OSError):  # a circle of links, for instance
        return entry.is_dir()
    return False


def _matching(names: Iterable[str], pattern: str | None) -> list[str]:
    if pattern is None:
        return sorted(names)
    # numbers first: model-*.safetensors means model-1 and model-2, not the model-lora beside them
    for star in (r"\d+", r".*"):
        expression = re.compile(star.join(map(re.escape, pattern.split("*"))), re.DOTALL)
        if found := [name for name in names if expression.fullmatch(name)]:
            return sorted(found)
    return []


def _indexes(directory: str, names: Sequence[str]) -> list[Candidate]:
    """Return the indexes; of those that say the same, one."""
    held = set(names)
    found: dict[object, Candidate] = {}
    # of indexes that say the same, the one with the shortest name: without a variant
    for name in sorted(filter(is_index_name, names), key=lambda name: (len(name), name)):
        path = os.path.join(directory, name)
        try:
            weight_map = read_index(path)
            files = tuple(shards_of(path, weight_map))
        except CheckpointError as problem:
            if is_weight_name(name.lower().partition(".index.")[0]):  # others are indexes of something else
                found[name] = Candidate(name, (), problem=problem)
            continue
        missing = tuple(f for f in files if f not in held and not os.path.lexists(os.path.join(directory, f)))
        lacks = missing_error(directory, missing[0], len(missing), len(files)) if missing else None
        found.setdefault(frozenset(weight_map.items()), Candidate(name, files, weight_map, missing, lacks))
    return list(found.values())


def _sets_and_files(directory: str, names: Sequence[str]) -> Iterator[Candidate]:
    """Sort what no index owns: sets of shards by their numbers, and single files."""
    sets: dict[str, dict[int, str]] = defaultdict(dict)
    for name in names:
        shard = parse_shard(name)
        if shard is None or shard.number in sets[shard.pattern]:
            yield Candidate(name, (name,))
        else:
            sets[shard.pattern][shard.number] = name
    for pattern, numbers in sets.items():
        yield _shard_set(directory, pattern, numbers)


def _shard_set(directory: str, pattern: str, numbers: dict[int, str]) -> Candidate:
    """Make a candidate of a set of shards, which count from 0 or from 1."""
    first = min(numbers)
    shard = parse_shard(numbers[first])
    assert shard is not None
    # transformers and diffusers count from 1, some count from 0
    expected = range(min(first, 1), min(first, 1) + shard.count)
    files = tuple(numbers[number] for number in sorted(numbers))
    strays = [name for number, name in numbers.items() if number not in expected]
    missing: tuple[str, ...] = ()
    problem: CheckpointError | None = None
    if strays:
        path = os.path.join(directory, strays[0])
        problem = CheckpointError.because(
            f"has a number that its set of {shard.count} files does not have", "remove it", path=path
        )
    elif n_missing := shard.count - len(numbers):
        width = len(numbers[first]) - len(shard.head) - len(shard.tail)
        absent = (shard.sibling(number, width) for number in expected if number not in numbers)
        missing = tuple(islice(absent, _MAX_MISSING))
        problem = missing_error(directory, missing[0], n_missing, shard.count)
    return Candidate(pattern if shard.count > 1 else files[0], files, None, missing, problem)


def _preferred(candidates: Iterable[Candidate]) -> tuple[list[Candidate], list[str]]:
    """Return what counts of what is called alike, and notes about the rest."""
    alike: dict[str, list[Candidate]] = defaultdict(list)
    for candidate in candidates:
        alike[candidate.stem].append(candidate)
    kept: list[Candidate] = []
    notes: list[str] = []
    for group in alike.values():
        # in this order: what is there, what is safetensors; a damaged index hides its files and must be said
        best = [c for c in group if not c.is_absent] or group
        best = [c for c in best if c.is_safetensors] or best
        best = [c for c in best if c.is_damaged_index] or best
        kept += best
        if left := [c.name for c in group if c not in best]:
            notes.append(f"left out: {_some(left)}: {best[0].name}, which is called alike, comes first")
    return kept, notes


def _without_gguf(candidates: list[Candidate]) -> tuple[list[Candidate], list[str]]:
    """Drop quantised copies beside anything else, which is what they were made of; return their names as well."""
    others = [c for c in candidates if not c.name.lower().endswith(GGUF)]
    return (others, [c.name for c in candidates if c not in others]) if others else (candidates, [])


def _without_others(directory: str, candidates: list[Candidate]) -> tuple[list[Candidate], list[str]]:
    """Drop single files that are none of ours by content, where there are several; return the names of these as well.

    What stands in the place of weights (a pointer, an empty file) still counts, but has a problem.
    """
    if len(candidates) < 2:
        return candidates, []
    # first bytes of every file: only where a choice hangs on them
    candidates = [examined(directory, candidate) for candidate in candidates]
    others = [c.name for c in candidates if c.problem is None and _is_other(directory, c)]
    kept = [c for c in candidates if c.name not in others]
    return (kept, others) if kept else (candidates, [])


def examined(directory: str, candidate: Candidate) -> Candidate:
    """Return a candidate with what keeps its files from being opened, as far as their first bytes tell."""
    if candidate.problem is not None:
        return candidate
    problem = next(filter(None, (_problem(os.path.join(directory, name)) for name in candidate.files)), None)
    return replace(candidate, problem=problem)


def _problem(path: str) -> CheckpointError | None:
    try:
        foreign = stand_in(read_head(path))
    except CheckpointError as error:
        return error
    except OSError as error:
        return CheckpointError.because(f"cannot be read: {error.strerror}", path=path)
    return CheckpointError.because(*foreign, path=path) if foreign else None


def _is_other(directory: str, candidate: Candidate) -> bool:
    """Say whether it is a single file that is called like a torch checkpoint and is something else."""
    if candidate.files != (candidate.name,) or candidate.is_safetensors:
        return False
    return recognise_format(read_head(os.path.join(directory, candidate.name))) is None


def _weights_by_content(directory: str, names: Sequence[str]) -> list[str]:
    """Return names of files that are checkpoints by their first bytes, though no name says so."""
    unknown = [n for n in names if not (is_weight_name(n) or is_unfinished(n) or is_training_state(n))]
    return [n for n in unknown[:_MAX_SNIFFED] if _holds_weights(os.path.join(directory, n))]


def _holds_weights(path: str) -> bool:
    with contextlib.suppress(OSError, CheckpointError):
        head = read_head(path)
        return holds_weights(head) and other_format(path, head) is None
    return False


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
    return ", ".join(names[:_MAX_NAMED]) + more
