"""One input, read by wan_loader and by the reference: torch.load, safetensors, the latter behind an index, or gguf.

Where both accept, names, dtypes, shapes, strides and bits must be equal. Errors that are not wan_loader's own, too much
time or memory are failures too; what the reference does then does not matter.
"""

from __future__ import annotations

import json
import os
import re
import resource
import time
import warnings
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from inputs import make
from safetensors.torch import load_file as load_safetensors

import wan_loader

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

OUTCOMES = (
    "both accept",
    "both refuse",
    "only ours refuses",
    "only reference refuses",
    "different",
    "foreign",
    "greedy",
)
FAILURES = ("different", "foreign", "greedy", "crashed", "hung")
_MAX_SECONDS, _MAX_GROWTH_KB = 1.0, 256 << 10
_COMPARED = 100_000


@dataclass
class Tally:
    """How often each outcome came, why one side alone refused, and which inputs failed."""

    outcomes: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    examples: dict[str, int] = field(default_factory=dict)
    failures: list[dict[str, Any]] = field(default_factory=list)

    def add(self, kind: str, number: int, outcome: str, reason: str) -> None:
        self.outcomes[outcome] += 1
        if outcome.startswith("only"):
            reason = f"{outcome}: {_general(reason)}"
            self.reasons[reason] += 1
            self.examples.setdefault(reason, number)
        if outcome in FAILURES:
            self.failures.append({"kind": kind, "number": number, "outcome": outcome, "reason": reason[:500]})


def run(
    kind: str,
    seed: int,
    numbers: range,
    directory: Path,
    tally: Tally,
    observe: Callable[[int, str], None] | None = None,
) -> None:
    """Judge inputs. `directory` is used for their files; `observe` is told the number and whose turn it is."""
    for number in numbers:
        main = _place(make(kind, seed, number), directory)
        if observe:
            observe(number, "ours")
        ours, greed = _ours(main)
        if observe:
            observe(number, "reference")
        # that of GGUF believes every count in a header, and does not come to an end
        asked = kind != "gguf" or not isinstance(ours, str)
        tally.add(kind, number, *judge(ours, greed, _reference(kind, main) if asked else "not asked"))


def judge(ours: Any, greed: str, reference: Any) -> tuple[str, str]:
    """The outcome and its reason. Results are dicts of tensors, or texts of errors."""
    if greed:
        return "greedy", greed
    if isinstance(ours, BaseException):
        return "foreign", f"{type(ours).__name__}: {ours}"
    if isinstance(ours, str) or isinstance(reference, str):
        if isinstance(ours, str) and isinstance(reference, str):
            return "both refuse", ours
        return ("only ours refuses", ours) if isinstance(ours, str) else ("only reference refuses", reference)
    difference = _difference(ours, reference)
    return ("different", difference) if difference else ("both accept", "")


def _place(files: dict[str, bytes], directory: Path) -> str:
    for name in os.listdir(directory):
        if name not in files:
            os.unlink(directory / name)
    for name, content in files.items():
        (directory / name).write_bytes(content)
    return str(directory / next(iter(files)))


def _ours(path: str) -> tuple[Any, str]:
    """What wan_loader gives: tensors, the text of its own error or a foreign exception; and what it took too much."""
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.thread_time()
    result: Any
    try:
        wan_loader.open_checkpoint(path)
        result = wan_loader.load_file(path, io="buffered")
    except wan_loader.WanLoaderError as error:
        result = str(error).replace(path, "FILE")
    except Exception as error:
        result = error
    seconds, grown = time.thread_time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    if seconds > _MAX_SECONDS or grown > _MAX_GROWTH_KB:
        return result, f"took {seconds:.1f} s and {grown >> 10} MiB"
    return result, ""


def _reference(kind: str, path: str) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if kind == "index":
                return _load_index(path)
            if kind == "gguf":
                return _load_gguf(path)
            if kind == "safetensors":
                return load_safetensors(path)
            return _flat(torch.load(path, map_location="cpu", weights_only=True))
    except BaseException as error:  # a panic in Rust is no Exception
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        lines = str(error).splitlines() or [""]
        telling = [line for line in lines if line.startswith(("Unsupported", "Can only", "Trying"))]
        return f"{type(error).__name__}: {(telling or lines)[0]}"


def _flat(state: Any) -> Any:
    """A flat dict of dense tensors, or why it is none: such files are not for us to load whole."""
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in dict.keys(state)):
        return "not a dict of names"
    for tensor in dict.values(state):
        if not isinstance(tensor, torch.Tensor):
            return "not a flat dict of tensors"
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.layout is not torch.strided:
            return "not dense tensors"
        if tensor.is_nested or tensor.is_quantized or tensor.is_meta:
            return "not dense tensors"
    return dict(dict.items(state))


def _load_gguf(path: str) -> dict[str, torch.Tensor]:
    """As the gguf package reads it: arrays of elements, of blocks, and of bfloat16 as bytes."""
    import gguf

    held = {}
    for tensor in gguf.GGUFReader(path).tensors:
        found = torch.from_numpy(tensor.data.copy())
        if tensor.tensor_type == gguf.GGMLQuantizationType.BF16:
            found = found.view(torch.bfloat16)
        held[tensor.name] = found
    return held


def _load_index(path: str) -> dict[str, torch.Tensor]:
    """As transformers does it: the tensors that the index lists, from the files that it says."""
    with open(path, encoding="utf-8") as f:
        weight_map = json.load(f)["weight_map"]
    shards = {}
    for shard in sorted(set(weight_map.values())):
        if shard != os.path.basename(shard):
            raise ValueError("a shard outside the directory")
        shards[shard] = load_safetensors(os.path.join(os.path.dirname(path), shard))
    return {name: shards[shard][name] for name, shard in weight_map.items()}


def _difference(ours: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]) -> str:
    if ours.keys() != reference.keys():
        return f"names {sorted(ours)} are {sorted(reference)}"
    for name, expected in reference.items():
        tensor = ours[name]
        for what in ("dtype", "shape"):
            if getattr(tensor, what) != getattr(expected, what):
                return f"{name!r}: {what} {getattr(tensor, what)} is {getattr(expected, what)}"
        if tensor.numel() and tensor.stride() != expected.stride():
            return f"{name!r}: stride {tensor.stride()} is {expected.stride()}"
        if 0 < expected.numel() <= _COMPARED and _bits(tensor) != _bits(expected):
            return f"{name!r}: other bits"
    return ""


def _bits(tensor: torch.Tensor) -> bytes:
    tensor = tensor.detach().resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)
    return tensor.view(-1).view(torch.uint8).numpy().tobytes()


def _general(reason: str) -> str:
    """A reason without what differs from input to input."""
    reason = re.sub(r"(['\"`]).*?\1", "'...'", reason.splitlines()[0] if reason else "")
    return re.sub(r"0x[0-9a-f]+|-?\d+", "N", reason)[:110]
