"""Pickles that cannot be planned: legacy (pre-1.6) files, and zips with more than dense tensors in them.

They are left to `torch.load(weights_only=True)`, which refuses everything but tensors and plain containers. This is
the slow, certain way; the warning says so and names the remedy.
"""

from __future__ import annotations

import pickle
import warnings
from typing import TYPE_CHECKING, Any

from wan_loader.errors import CheckpointError, MissingFileError
from wan_loader.formats.facts import Checkpoint, StorageFacts, TensorFacts, stat_file

if TYPE_CHECKING:
    import torch

__all__ = ["load_torch_pickle", "read_torch_pickle"]


def read_torch_pickle(path: str, reason: str) -> Checkpoint:
    """Facts by loading the file into host memory once: on the meta device torch forgets what shares a storage.

    Storages carry sizes, but no positions.
    """
    file = stat_file(path)
    with open(path, "rb") as f:
        first = f.read(2)
    if first[:1] != b"\x80" and first != b"PK":
        raise CheckpointError(f"{path} is neither safetensors nor a torch checkpoint, or it is damaged")
    state = load_torch_pickle(path, "cpu")
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
    return Checkpoint(path, "torch-pickle", (file,), tuple(storages.values()), tuple(tensors), {}, (note,))


def load_torch_pickle(path: str, device: str) -> dict[str, torch.Tensor]:
    """The file's tensors on `device`, as torch.load(weights_only=True) gives them."""
    import torch

    try:
        with warnings.catch_warnings(), open(path, "rb") as file:  # torch reads a path by its suffix
            warnings.simplefilter("ignore")  # torch warns about its own typed storages
            state: Any = torch.load(file, map_location=device, weights_only=True)
    except FileNotFoundError as error:
        raise MissingFileError(f"{path} vanished before it could be read") from error
    except pickle.UnpicklingError as error:
        lines = [line.strip() for line in str(error).splitlines() if "GLOBAL" in line or "nsupported" in line]
        detail = lines[0] if lines else str(error).splitlines()[0]
        raise CheckpointError(f"{path} is refused: it is damaged, or holds more than weights ({detail})") from error
    except Exception as error:  # torch raises nearly anything on damaged input
        raise CheckpointError(f"{path} is damaged: {type(error).__name__}: {error}") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds a {type(state).__name__}, not a dict of tensors: read it with torch.load")
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise CheckpointError(f"{path}: entry {name!r} is a {type(value).__name__}, not a tensor")
    return dict(state)
