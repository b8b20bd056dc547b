"""Quantised tensors as the numbers that they stand for: which of a checkpoint's can be made, and out of what.

GGUF says so in its header. Scaled eight-bit floats are told by names, in the two spellings of public files:

    X.weight, X.scale_weight, and scaled_fp8 once in the file     ComfyUI
    X.weight, X.weight_scale, and perhaps X.comfy_quant           ComfyUI, later; compressed-tensors

where the number is float32(weight) * float32(scale), and the scale is one for the tensor or one for each row. What has
a scale of its inputs as well, or another kind in `comfy_quant`, has a `problem` that says so. Reads headers, and the
few bytes of `comfy_quant`; no weight.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from wan_loader.errors import CheckpointError
from wan_loader.formats.checkpoint_facts import Checkpoint, Quantised, TensorFacts, contiguous_strides
from wan_loader.formats.known_formats import is_planned
from wan_loader.formats.scales import FLOAT8
from wan_loader.formats.strict_json import parse_object

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__all__ = ["with_values"]

_WEIGHT, _MARK, _NOTE = "weight", "scaled_fp8", "comfy_quant"
_SCALES = ("scale_weight", "weight_scale")
_INPUT_SCALES = ("scale_input", "input_scale")
_CODES = FLOAT8 | {"uint8", "int8"}
_SCALE_DTYPES = frozenset({"float32", "float16", "bfloat16"})
#: Where ComfyUI keeps what else stands in `comfy_quant`.
_METADATA = "_quantization_metadata"
_MAX_NOTE_BYTES = 4096
#: What a note may say beside the format without changing the numbers.
_HARMLESS = frozenset({"format", "full_precision_matrix_mult"})


def with_values(checkpoint: Checkpoint) -> Checkpoint:
    """Return the checkpoint with numbers in the place of quantised tensors, as far as those can be made.

    `Checkpoint.quantised` says what they are made of. Scales and marks that are used up are left out. A checkpoint
    without quantised tensors, or with numbers in their places already, is returned as it is.

    Raises:
        CheckpointError: A file cannot be read any more.
    """
    if not is_planned(checkpoint):
        return checkpoint
    quantised, used = checkpoint.quantised, set[str]()
    if not quantised:
        quantised, used = _scaled(checkpoint)
    made = {name: one.value for name, one in quantised.items() if one.problem is None}
    if not quantised:
        return checkpoint
    tensors = tuple(made.get(tensor.name, tensor) for tensor in checkpoint.tensors if tensor.name not in used)
    return replace(checkpoint, tensors=tensors, quantised=quantised)


class _Names(NamedTuple):
    """What a file calls the companions of one weight."""

    base: str
    by_name: Mapping[str, TensorFacts]

    def those_of(self, ends: Iterable[str]) -> list[TensorFacts]:
        """Return the companions that are there, of these ends of names."""
        return [self.by_name[self.base + end] for end in ends if self.base + end in self.by_name]


def _scaled(checkpoint: Checkpoint) -> tuple[dict[str, Quantised], set[str]]:
    """Return the scaled tensors by name, and the names of what is used up with them."""
    if not any(tensor.dtype in _CODES for tensor in checkpoint.tensors):
        return {}, set()
    by_name = {tensor.name: tensor for tensor in checkpoint.tensors}
    marks = {name for name in by_name if name.rpartition(".")[2] == _MARK}
    noted = _noted_in_metadata(checkpoint)
    users = Counter(tensor.storage for tensor in checkpoint.tensors)
    found: dict[str, Quantised] = {}
    used: set[str] = set()
    for tensor in checkpoint.tensors:
        name = tensor.name
        if name.rpartition(".")[2] != _WEIGHT or tensor.dtype not in _CODES:
            continue
        names = _Names(name.removesuffix(_WEIGHT), by_name)
        scales, notes = names.those_of(_SCALES), names.those_of([_NOTE])
        note = _note(checkpoint, notes[0]) if notes else noted.get(names.base.removesuffix("."))
        if tensor.dtype not in FLOAT8 and note is None:
            continue
        if not scales and not marks and note is None:
            continue
        problem = (
            _bad_note(note, tensor)
            or _bad_scales(tensor, names, scales)
            or next((reason for one in (tensor, *scales) if (reason := _bad_place(checkpoint, one, users))), None)
        )
        value = tensor._replace(dtype="float32", stride=contiguous_strides(tensor.shape))
        found[name] = Quantised("scaled", tensor, value, scales[0] if scales else None, problem)
        if problem is None:
            used |= {one.name for one in (*scales, *notes)}
    return found, used | marks if used else used


def _bad_scales(tensor: TensorFacts, names: _Names, scales: list[TensorFacts]) -> str | None:
    """Say what is wrong with the scales of a weight; None if it can be multiplied by the one that is there."""
    spelled = [names.base + end for end in _SCALES]
    if not scales:
        return f"lacks its scale: the file has neither {spelled[0]!r} nor {spelled[1]!r}"
    if len(scales) > 1:
        return f"has two scales, {spelled[0]!r} and {spelled[1]!r}"
    if inputs := names.those_of(_INPUT_SCALES):
        return f"has a scale of its inputs, {inputs[0].name!r}, for arithmetic in eight bits, which is not done here"
    scale = scales[0]
    if scale.dtype not in _SCALE_DTYPES:
        return f"has the scale {scale.name!r} of {scale.dtype}, which is none of {', '.join(sorted(_SCALE_DTYPES))}"
    by_row = tensor.shape[:1] == scale.shape[:1] and math.prod(scale.shape[1:]) == 1
    if math.prod(scale.shape) != 1 and not by_row:
        rows = tensor.shape[0] if tensor.shape else 1
        wrong = f"which is neither one number nor one for each of {rows} rows"
        return f"has the scale {scale.name!r} of shape {list(scale.shape)}, {wrong}"
    return None


def _bad_place(checkpoint: Checkpoint, tensor: TensorFacts, users: Counter[int]) -> str | None:
    """Say what keeps a tensor from being read by itself."""
    whole = tensor.offset == 0 and tensor.stride == contiguous_strides(tensor.shape)
    if users[tensor.storage] > 1 or not whole or checkpoint.storages[tensor.storage].nbytes != tensor.nbytes:
        return f"is scaled, but {tensor.name!r} shares its memory with another tensor, or is not contiguous"
    return None


def _bad_note(note: dict[str, Any] | None, tensor: TensorFacts) -> str | None:
    """Say why a kind of ComfyUI's is not made here; None without a note, and for scaled floats."""
    if note is None:
        return None
    kind = note.get("format")
    if kind != tensor.dtype or tensor.dtype not in FLOAT8:
        return f"is of the kind {kind!r:.60} of {_NOTE}, whose numbers are not made here"
    if more := sorted(note.keys() - _HARMLESS):
        return f"is of the kind {kind!r:.60} of {_NOTE} with {more[0]!r:.60}, whose numbers are not made here"
    return None


def _note(checkpoint: Checkpoint, facts: TensorFacts) -> dict[str, Any]:
    """Read what a layer's `comfy_quant` says; what is no JSON says nothing, and is no kind that is known."""
    file, start, nbytes = checkpoint.storages[facts.storage]
    if facts.dtype != "uint8" or nbytes > _MAX_NOTE_BYTES:
        return {}
    path = checkpoint.files[file].path
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return _object(os.pread(fd, nbytes, start), path)
        finally:
            os.close(fd)
    except OSError as error:
        raise CheckpointError.because(f"cannot be read: {error.strerror}", path=path) from error


def _noted_in_metadata(checkpoint: Checkpoint) -> dict[str, dict[str, Any]]:
    """Return the notes that the file's metadata has, by layer."""
    if (text := checkpoint.metadata.get(_METADATA)) is None:
        return {}
    layers = _object(text.encode(errors="replace"), checkpoint.path).get("layers")
    if not isinstance(layers, dict):
        return {}
    return {name: note if isinstance(note, dict) else {} for name, note in layers.items()}


def _object(content: bytes, path: str) -> dict[str, Any]:
    """Return a JSON object, empty for anything else."""
    try:
        return parse_object(content, path=path, what="what it says of its quantisation")
    except CheckpointError:
        return {}
