"""The names of files, read in one place: weights, indexes, shards, training state, unfinished downloads.

A name only decides which files of a directory are looked at. What a file is, its content says (`known_formats`,
`foreign_files`), and which files belong together, an index, where there is one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = [
    "GGUF",
    "SAFETENSORS",
    "WEIGHT_SUFFIXES",
    "ShardName",
    "is_dcp_name",
    "is_index_name",
    "is_training_state",
    "is_unfinished",
    "is_weight_name",
    "parse_shard",
    "slices_in",
    "stem_of",
]

SAFETENSORS = ".safetensors"
GGUF = ".gguf"
#: How the names of files with weights end, in any letter case.
WEIGHT_SUFFIXES = (SAFETENSORS, ".pth", ".pt", ".bin", ".ckpt", ".pth.tar", GGUF)
#: How programs that download name what is not complete yet.
_UNFINISHED = (".incomplete", ".part", ".partial", ".crdownload", ".download", ".opdownload", ".filepart", ".aria2")
#: `NAME.index.json`, and diffusers' older `NAME.index.VARIANT.json`.
_INDEX = re.compile(r"(?P<name>.+)\.index(?P<variant>\.[^.]+)?\.json", re.IGNORECASE | re.DOTALL)
_SHARD = re.compile(r"(?P<head>.*?)(?P<number>\d{1,9})(?P<of>[-_]of[-_](?P<count>\d{1,9})(?!\d).*)", re.I | re.DOTALL)
#: How the names of what a training keeps beside its weights end, apart from numbers and words that count.
_TRAINING_WORDS = frozenset({"optim", "scheduler", "schedulers", "scaler", "scalers", "sampler", "rng", "dataloader"})
_TRAINING_ENDS = frozenset(
    {
        ("dl", "state", "dict"),
        ("random", "state"),
        ("random", "states"),
        ("recipe", "state"),
        ("train", "args"),
        ("trainer", "state"),
        ("training", "args"),
        ("training", "state"),
    }
)
_COUNTS = frozenset({"best", "dict", "epoch", "final", "last", "latest", "rank", "state", "states", "step"})
#: Slices of every parameter: one file for each process of DeepSpeed's ZeRO-3, and of model parallelism where several.
_ZERO3 = re.compile(r"(bf16_)?zero_pp_rank_\d+_mp_rank_\d+_model_states\.pt")
_PARALLEL = re.compile(r"consolidated\.\d+\.(pth|pt|safetensors)|mp_rank_\d+_model_states\.pt")


def is_weight_name(name: str) -> bool:
    """Say whether a file's name ends as those of files with weights do."""
    return name.lower().endswith(WEIGHT_SUFFIXES)


def is_index_name(name: str) -> bool:
    """Say whether a file is called like the index of a checkpoint."""
    return _INDEX.fullmatch(name) is not None


def is_unfinished(name: str) -> bool:
    """Say whether a file is called like a download that has not ended."""
    return name.lower().endswith(_UNFINISHED)


def is_dcp_name(name: str) -> bool:
    """Say whether a file is called like a part of a DCP checkpoint: archives of torch.save, one behind the other."""
    return name.lower().endswith(".distcp")


def slices_in(names: Iterable[str]) -> set[str]:
    """Return the names of slices of every parameter: together these files are a model, alone nothing."""
    names = list(names)
    parallel = {name for name in names if _PARALLEL.fullmatch(name)}
    return {name for name in names if _ZERO3.fullmatch(name)} | (parallel if len(parallel) > 1 else set())


def is_training_state(name: str) -> bool:
    """Say whether a file is called like what Trainer, accelerate, DeepSpeed and others keep beside the weights.

    Whole words count, so that a `resampler.bin` is not one. A name that speaks of a model as well is one only where it
    speaks of an optimizer in full: Megatron's `model_optim_rng.pt` holds the weights.
    """
    words = re.findall(r"[a-z]+", stem_of(name).removesuffix(".pkl"))
    if "optimizer" in words or "optimizers" in words:
        return True
    if "model" in words:
        return False
    if not _TRAINING_ENDS.isdisjoint((tuple(words[-2:]), tuple(words[-3:]))):
        return True
    while words and words[-1] in _COUNTS:
        words.pop()
    return bool(words) and words[-1] in _TRAINING_WORDS


@dataclass(frozen=True, slots=True)
class ShardName:
    """A name like `model-00001-of-00002.safetensors`, taken apart."""

    head: str
    """All before the number."""
    number: int
    tail: str
    """All behind the number."""
    count: int

    @property
    def pattern(self) -> str:
        """The pattern that names all shards of the set."""
        return f"{self.head}*{self.tail}"

    def sibling(self, number: int, width: int) -> str:
        """Return the name of another shard of the set."""
        return f"{self.head}{number:0{width}d}{self.tail}"


def parse_shard(name: str) -> ShardName | None:
    """Take the name of a shard apart; None for any other name, and for sets of no files."""
    found = _SHARD.fullmatch(name)
    if found is None or not int(found["count"]):
        return None
    return ShardName(found["head"], int(found["number"]), found["of"], int(found["count"]))


def stem_of(name: str) -> str:
    """Return the name of a file, an index, or a shard without its format: the same for what holds the same model.

    `model.fp16.safetensors`, `pytorch_model.fp16.bin`, `model.safetensors.index.fp16.json` and the shard
    `model.fp16-00001-of-00002.safetensors` are all "model.fp16".
    """
    name = name.lower()
    if index := _INDEX.fullmatch(name):
        stem = _without_suffix(index["name"]) + (index["variant"] or "")
    elif (shard := parse_shard(name)) is not None:
        of, _, rest = shard.tail.partition(str(shard.count))
        stem = _without_suffix(shard.head.rstrip("-_.")) + _without_suffix(rest if of else "")
    else:
        stem = _without_suffix(name)
    return stem.removeprefix("pytorch_") if stem.startswith("pytorch_model") else stem


def _without_suffix(name: str) -> str:
    """Return the name without a suffix of weights, if it has one."""
    suffix = max((s for s in WEIGHT_SUFFIXES if name.endswith(s)), key=len, default="")
    return name.removesuffix(suffix)
