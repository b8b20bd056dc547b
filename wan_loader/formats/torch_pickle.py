"""Pickles that cannot be planned: legacy (pre-1.6) files, and zips with more than dense tensors in them.

They are left to `torch.load(weights_only=True)`, which refuses everything but tensors and plain containers. This is
slow and certain; the warning says so and names the remedy. Before torch sees a pickle, `facts_unpickler` has run it, so
that its memory and time are bounded here too. What comes back is checked to be dense tensors: torch also has sparse,
quantised, nested and meta tensors and subclasses, whose values are not the bytes of one storage.
"""

from __future__ import annotations

import os
import pickle
import warnings
from typing import TYPE_CHECKING, Any

from wan_loader.dtypes import ITEMSIZE
from wan_loader.errors import CheckpointError, DeviceMemoryError, HostMemoryError, MissingFileError
from wan_loader.formats.checkpoint_facts import Checkpoint, StorageFacts, TensorFacts, stat_file
from wan_loader.formats.facts_unpickler import read_pickle
from wan_loader.formats.nested_parts import choose_part, shown
from wan_loader.formats.pickle_calls import STORAGE_TYPES
from wan_loader.formats.pickle_values import Global, Other, PickledStorage, PickleError

if TYPE_CHECKING:
    import torch

__all__ = ["load_torch_pickle", "read_torch_pickle"]

_MAX_PICKLES_BYTES = 64 << 20
#: How the number that says so is written, behind the protocol and the frame, which some protocols have.
_LEGACY_MAGIC = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_MAX_BEFORE_MAGIC = 16
#: A legacy file begins with five pickles: a number that says what it is, a version, the system, the object, the keys.
_N_PICKLES = 5


def read_torch_pickle(path: str, reason: str, part: str | None = None) -> Checkpoint:
    """Read facts by loading the file into host memory once: on the meta device torch forgets what shares a storage.

    Args:
        path: The file.
        reason: The cause why the file cannot be planned, for the warning.
        part: The nested dict that is meant, by its keys joined by dots.

    Returns:
        Facts whose storages carry sizes, but no positions.

    Raises:
        CheckpointError: The file is damaged, or torch refuses it.
    """
    file = stat_file(path)
    with open(path, "rb") as f:
        first = f.read(2)
    if first[:1] != b"\x80" and first != b"PK":
        raise CheckpointError.because("is neither safetensors nor a torch checkpoint, or it is damaged", path=path)
    state = load_torch_pickle(path, "cpu", part)
    numbers: dict[int, int] = {}
    storages: list[StorageFacts] = []
    tensors: list[TensorFacts] = []
    for name, tensor in state.items():
        memory = tensor.untyped_storage()
        # the address of the StorageImpl: each access makes another Python object for it
        number = numbers.setdefault(memory._cdata, len(storages))
        if number == len(storages):
            storages.append(StorageFacts(0, 0, memory.nbytes()))
        dtype = str(tensor.dtype).removeprefix("torch.")
        shape, stride, offset = tuple(tensor.shape), tuple(tensor.stride()), int(tensor.storage_offset())
        tensors.append(TensorFacts(name, dtype, shape, number, stride, offset))
    note = f"{reason}: loaded through torch.load(weights_only=True), without planning; save it again to make it fast"
    return Checkpoint(path, "torch-pickle", (file,), tuple(storages), tuple(tensors), {}, (note,), part)


def load_torch_pickle(path: str, device: str, part: str | None = None) -> dict[str, torch.Tensor]:
    """Return the tensors of the file, or of one part of it, on `device`, as torch.load(weights_only=True) gives them.

    Raises:
        CheckpointError: The file is damaged, torch refuses it, or a tensor is not dense.
        DeviceMemoryError: The device has no room.
        HostMemoryError: This machine has no room.
    """
    import torch

    try:
        _check_legacy_pickles(path)
        # torch reads a path by its suffix, warns about its own typed storages, and leaves the indices of sparse tensors
        # unchecked.
        with (
            warnings.catch_warnings(),
            torch.sparse.check_sparse_tensor_invariants(enable=True),
            open(path, "rb") as file,
        ):
            warnings.simplefilter("ignore")
            state: Any = torch.load(file, map_location=device, weights_only=True)
    except FileNotFoundError as error:
        raise MissingFileError.because("vanished before it could be read", path=path) from error
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        # the line that names the culprit; torch's own text is a page of advice
        lines = [line.strip() for line in str(error).splitlines() if "GLOBAL" in line or "nsupported" in line]
        detail = [*lines, *str(error).splitlines(), "no reason given"][0]
        raise CheckpointError(
            f"{path} is refused: it is damaged, or holds more than weights ({detail}); if you trust it, read it once "
            "with torch.load(path, weights_only=False), and save the dict of tensors alone",
            path=path,
        ) from error
    except torch.OutOfMemoryError as error:
        raise DeviceMemoryError(f"{path}: {device} has no room for what it holds: {error}", path=path) from error
    except MemoryError as error:
        raise HostMemoryError.because("needs more memory than can be had", "free some memory", path=path) from error
    except Exception as error:  # torch raises nearly anything on damaged input
        raise CheckpointError.because(f"is damaged: {type(error).__name__}: {error}", path=path) from error
    chosen = choose_part(state, part, path=path, is_tensor=lambda value: isinstance(value, torch.Tensor))
    for name, tensor in dict.items(chosen):
        if kind := _odd_kind(tensor):
            raise CheckpointError(
                f"{path}: tensor {shown(name)} is {kind}, whose values are not the bytes of one storage: "
                "read it with torch.load(weights_only=True), and save it again as a plain tensor",
                path=path,
                tensor=name,
            )
    return {name: _ordinary(tensor) for name, tensor in dict.items(chosen)}


def _ordinary(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor alone: no parameter, no gradient, and no view that is conjugated or negated when it is read.

    A conversion works on the bytes of a storage, and would leave that out.
    """
    return tensor.detach().resolve_conj().resolve_neg()


def _odd_kind(tensor: torch.Tensor) -> str | None:
    """Say what a tensor is that is not dense, or return None."""
    import torch

    if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        return f"a {type(tensor).__name__}"
    if tensor.is_nested:
        return "a nested tensor"
    if tensor.layout is not torch.strided:
        return f"a {str(tensor.layout).removeprefix('torch.').replace('_', ' ')} tensor"
    if tensor.is_quantized:
        return "a quantised tensor"
    if tensor.is_meta:
        return "a meta tensor, which has no values"
    return None if str(tensor.dtype).removeprefix("torch.") in ITEMSIZE else f"of dtype {tensor.dtype}"


def _check_legacy_pickles(path: str) -> None:
    """Run the pickles of a legacy file as facts: what is damaged or takes too much is refused before torch runs it."""
    with open(path, "rb") as f:
        if f.read(2) == b"PK":
            return  # the pickle in the archive was run when it was planned
        f.seek(0)
        data = f.read(_MAX_PICKLES_BYTES)
    if data.find(_LEGACY_MAGIC, 0, _MAX_BEFORE_MAGIC + len(_LEGACY_MAGIC)) < 0:
        raise CheckpointError.because(
            "is a pickle, but not one of torch.save",
            "if you trust it, read it with pickle.load, and save the dict of tensors in it with torch.save or as "
            "safetensors",
            path=path,
        )
    storages: dict[str, int] = {}
    keys, end = None, 0
    try:
        for _ in range(_N_PICKLES):
            keys, end, *_ = read_pickle(data, lambda pid: _legacy_storage(pid, storages), end)
        if type(keys) is not list or not storages.keys() <= {key for key in keys if type(key) is str}:
            raise PickleError("it names storages that the file does not hold")  # torch would leave them uninitialised
    except PickleError as error:
        raise CheckpointError(
            f"{path}: its pickle is truncated or damaged ({error}); download it again",
            path=path,
            remedy="download it again",
        ) from None
    # torch would allocate first and notice at the end of the file
    if sum(storages.values()) > os.path.getsize(path):
        raise CheckpointError(
            f"{path} is truncated: its storages need more bytes than it has; download it again",
            path=path,
            remedy="download it again",
        )


def _legacy_storage(pid: Any, storages: dict[str, int]) -> PickledStorage | Global | Other:
    """Return the storage, or the class, of a legacy persistent id; `storages` collects the sizes of all."""
    if type(pid) is tuple and len(pid) == 4 and pid[0] == "module" and type(pid[1]) is Global:
        return pid[1]  # a class, with its source: torch refuses to call it
    if type(pid) is not tuple or len(pid) != 6 or pid[0] != "storage":
        raise PickleError("a persistent id makes no sense")
    _, storage_type, key, _location, numel, _view = pid
    if type(storage_type) is not Global or type(key) is not str or type(numel) is not int or numel < 0:
        raise PickleError("a persistent id makes no sense")
    dtype = STORAGE_TYPES.get(storage_type.name)
    nbytes = numel * ITEMSIZE[dtype] if dtype else numel
    storages.setdefault(key, nbytes)
    return PickledStorage(key, nbytes, dtype) if dtype else Other(storage_type.name)
