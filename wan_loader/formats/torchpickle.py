"""Pickles that cannot be planned: legacy (pre-1.6) files, and zips with more than dense tensors in them.

They are left to `torch.load(weights_only=True)`, which refuses everything but tensors and plain containers. This is
the slow, certain way; the warning says so and names the remedy.
"""

from __future__ import annotations

import os
import pickle
import warnings
from typing import TYPE_CHECKING, Any

from wan_loader.dtypes import ITEMSIZE
from wan_loader.errors import CheckpointError, MissingFileError
from wan_loader.formats.facts import Checkpoint, StorageFacts, TensorFacts, stat_file
from wan_loader.formats.parts import choose_part, shown

if TYPE_CHECKING:
    import torch

__all__ = ["load_torch_pickle", "read_torch_pickle"]


def read_torch_pickle(path: str, reason: str, part: str | None = None) -> Checkpoint:
    """Facts by loading the file into host memory once: on the meta device torch forgets what shares a storage.

    reason: why the file cannot be planned, for the warning.
    part: names a nested dict by its keys, joined by dots.

    Storages carry sizes, but no positions.
    """
    file = stat_file(path)
    with open(path, "rb") as f:
        first = f.read(2)
    if first[:1] != b"\x80" and first != b"PK":
        raise CheckpointError(f"{path} is neither safetensors nor a torch checkpoint, or it is damaged")
    state = load_torch_pickle(path, "cpu", part)
    storages: dict[int, StorageFacts] = {}
    tensors: list[TensorFacts] = []
    for name, tensor in state.items():
        memory = tensor.untyped_storage()
        storages.setdefault(memory._cdata, StorageFacts(0, 0, memory.nbytes()))
        index = list(storages).index(memory._cdata)
        dtype = str(tensor.dtype).removeprefix("torch.")
        shape, stride, offset = tuple(tensor.shape), tuple(tensor.stride()), int(tensor.storage_offset())
        tensors.append(TensorFacts(name, dtype, shape, index, stride, offset))
    note = f"{reason}: loaded through torch.load(weights_only=True), without planning; save it again to make it fast"
    return Checkpoint(path, "torch-pickle", (file,), tuple(storages.values()), tuple(tensors), {}, (note,), part)


def load_torch_pickle(path: str, device: str, part: str | None = None) -> dict[str, torch.Tensor]:
    """The tensors of the file, or of one part of it, on `device`, as torch.load(weights_only=True) gives them."""
    import torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about its own typed storages
            state: Any = torch.load(os.fspath(path), map_location=device, weights_only=True)
    except FileNotFoundError as error:
        raise MissingFileError(f"{path} vanished before it could be read") from error
    except pickle.UnpicklingError as error:
        lines = [line.strip() for line in str(error).splitlines() if "GLOBAL" in line or "nsupported" in line]
        detail = lines[0] if lines else str(error).splitlines()[0]
        raise CheckpointError(f"{path} is refused: it is damaged, or holds more than weights ({detail})") from error
    except Exception as error:  # torch raises nearly anything on damaged input
        raise CheckpointError(f"{path} is damaged: {type(error).__name__}: {error}") from error
    chosen = choose_part(state, part, path=path, is_tensor=lambda value: isinstance(value, torch.Tensor))
    return {name: _plain(tensor, f"{path}: tensor {shown(name)}") for name, tensor in dict.items(chosen)}


def _plain(tensor: torch.Tensor, where: str) -> torch.Tensor:
    """The tensor alone: no parameter, no gradient, no view that is negated or conjugated when it is read.

    Raises `CheckpointError` unless it is dense memory, for all that follows takes a tensor for the bytes that it shows:
    conversions and comparisons of others are wrong, or end the process.
    """
    if (kind := _odd_kind(tensor)) is not None:
        raise CheckpointError(
            f"{where} is {kind}: this loads plain dense tensors; read the file with torch.load(weights_only=True), and "
            "save dense ones (.to_dense(), .dequantize())"
        )
    return tensor.detach().resolve_conj().resolve_neg()


def _odd_kind(tensor: torch.Tensor) -> str | None:
    """What a tensor is, if it is not plain dense memory."""
    import torch

    if tensor.is_nested:
        return "a nested tensor"
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        return f"a {type(tensor).__module__}.{type(tensor).__qualname__}"
    if tensor.is_quantized:
        return f"quantised ({tensor.dtype})"
    if tensor.layout is not torch.strided:
        return f"sparse ({tensor.layout})"
    if tensor.is_meta:
        return "on the meta device, where there are no values"
    return f"of dtype {tensor.dtype}" if str(tensor.dtype).removeprefix("torch.") not in ITEMSIZE else None
