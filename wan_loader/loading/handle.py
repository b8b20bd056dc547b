"""A checkpoint that stays open, whose tensors are loaded one at a time: the twin of `safetensors.safe_open`.

Headers are read once. A large tensor that may stay in the mapped file is a view of it; a small one is read here, with a
call or two; every other is a load of its own, planned and carried out as all are.
"""

from __future__ import annotations

import ctypes
import os
import weakref
from contextlib import ExitStack
from dataclasses import replace
from numbers import Integral
from typing import TYPE_CHECKING, Any

from wan_loader.arguments import checked_strings
from wan_loader.devices.resolve import check_tensors_are_real, resolve_device
from wan_loader.dtypes import ITEMSIZE, torch_dtype
from wan_loader.engine.open_files import OpenFiles
from wan_loader.errors import CheckpointError, DeviceMemoryError, KeyMismatchError, OptionError
from wan_loader.formats.checkpoint_facts import Checkpoint, contiguous_strides
from wan_loader.formats.known_formats import is_planned
from wan_loader.formats.safetensors import SAFETENSORS_NAMES
from wan_loader.formats.scales import find_scales
from wan_loader.loading.allocate import OWN_MAP_BYTES, compact, view_storage
from wan_loader.loading.load_session import LoadSession
from wan_loader.plan.plan import may_view
from wan_loader.plan.slices import alone, view
from wan_loader.sizes import format_count
from wan_loader.system.forks import is_forked

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

    import torch

    from wan_loader.formats.checkpoint_facts import StorageFacts, TensorFacts
    from wan_loader.plan.request import LoadRequest

__all__ = ["CheckpointHandle", "SliceHandle"]

#: Up to so many bytes, a plan and a pinned ring take longer than a plain read and a copy from pageable memory.
_SMALL_BYTES = 4 << 20


class CheckpointHandle:
    """An open checkpoint, whose tensors are loaded when they are asked for. `wan_loader.open_file` makes it.

    A context manager. It may be used by several threads. Tensors that it gave outlive it. A file that is changed or
    replaced while it is open is an error of whatever is asked for next.
    """

    def __init__(self, request: LoadRequest) -> None:
        """Read the headers, find the device, and open the files."""
        with LoadSession(keeps_peaks=True) as session:
            checkpoint = session.open(request)
        device = resolve_device(request.device)
        self._checkpoint = checkpoint
        self._device = device
        self._request = replace(request, source=checkpoint, device=device)
        self._facts = {facts.name: facts for facts in checkpoint.tensors}
        self._is_planned = is_planned(checkpoint)
        self._may_view = device.type == "cpu" and self._is_planned and may_view(request, checkpoint)
        self._scaled = find_scales(checkpoint.tensors) if request.policy.dtype is not None else {}
        stack = ExitStack()
        self._reader = stack.enter_context(OpenFiles(checkpoint.files))
        self._fds = self._reader.fds
        self._close = weakref.finalize(self, stack.close)

    def __enter__(self) -> CheckpointHandle:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        state = f"on {self._device}" if self._close.alive else "closed"
        return f"CheckpointHandle({self._checkpoint.path!r}, {format_count(len(self._facts), 'tensor')}, {state})"

    def close(self) -> None:
        """Close the files; nothing can be loaded any more. Tensors stay as they are. A second time does nothing."""
        self._close()

    def keys(self) -> list[str]:
        """Return the names of all tensors, in file order."""
        return list(self._facts)

    def offset_keys(self) -> list[str]:
        """Return the names of all tensors, in file order: what `keys` gives, too."""
        return self.keys()

    def metadata(self) -> dict[str, str] | None:
        """Return what the writer of a safetensors file left beside its tensors; None if that is nothing."""
        return dict(self._checkpoint.metadata) or None

    def get_tensor(self, name: str) -> torch.Tensor:
        """Load one tensor.

        Args:
            name: Its name.

        Returns:
            The tensor that `load_file` would return, but for memory that it would share with others: it has its own.
            Strides are those of the file.

        Raises:
            KeyMismatchError: It is not there.
            OptionError: The handle was closed.
            CheckpointError: The file was changed, or cannot be read.
            DeviceMemoryError: There is no room on the device.
            HostMemoryError: There is no room in the host's memory.
        """
        facts = self._facts_of(name)
        return self._load(facts) if self._is_read_alone(facts) else self.get_tensors((name,))[name]

    def get_tensors(self, names: Sequence[str]) -> dict[str, torch.Tensor]:
        """Load several tensors as one load: large ones, or those for a GPU, come faster than one after the other.

        Args:
            names: Their names.

        Returns:
            What `load_file` returns for these names, in their order.

        Raises:
            KeyMismatchError: Some are not there; other errors are those of `get_tensor`.
        """
        self._check_open()
        return self._load_planned(replace(self._request, names=checked_strings(names, "names")), self._checkpoint)

    def get_slice(self, name: str) -> SliceHandle:
        """Return a handle to parts of a tensor, which are loaded when they are picked: `get_slice(name)[100:200]`.

        Raises:
            KeyMismatchError: The tensor is not there.
            OptionError: The handle was closed.
        """
        return SliceHandle(self, self._facts_of(name))

    def _facts_of(self, name: str) -> TensorFacts:
        """Return what the header says of a tensor."""
        self._check_open()
        if (facts := self._facts.get(name)) is None:
            path = self._checkpoint.path
            raise KeyMismatchError(f"{path} lacks the tensor {name!r:.200}", missing=[name], path=path)
        return facts

    def _load_part(self, facts: TensorFacts, dims: tuple[Any, ...]) -> torch.Tensor:
        """Load the part of a tensor that numbers and slices pick, contiguous and with memory of its own."""
        part = view(facts, dims)
        self._check_open()
        if self._is_read_alone(facts):
            return compact(self._load(part, cut=part.stride != contiguous_strides(part.shape)))
        import torch

        return self.get_tensor(facts.name)[dims].clone(memory_format=torch.contiguous_format)

    def _is_read_alone(self, facts: TensorFacts) -> bool:
        """Return whether a tensor is the bytes of its own place in the file, and not made of several or of all."""
        quantised = self._checkpoint.quantised.get(facts.name)
        return self._is_planned and (quantised is None or facts != quantised.value)

    def _load(self, facts: TensorFacts, *, cut: bool = False) -> torch.Tensor:
        """Load a tensor, or a view of one.

        Args:
            facts: The tensor.
            cut: Some of its bytes will be left out, and the rest copied: it may not stay in a mapped file, which would
                end the process if it shrank.
        """
        if facts.name in self._scaled or facts.name in self._checkpoint.quantised:
            self._request.policy.check(self._checkpoint, [facts])
        storage, facts = alone(facts, self._checkpoint.storages[facts.storage], 0)
        converts = self._request.policy.target(facts.name, facts.dtype) != facts.dtype
        # small ones would share a mapping with others, and so what is written to them
        views = self._may_view and storage.nbytes >= OWN_MAP_BYTES and storage.start % ITEMSIZE[facts.dtype] == 0
        if views and not converts and not cut:
            return self._view(storage, facts)
        # torch's conversions may hang in a forked process, which a planned load knows about
        if storage.nbytes <= _SMALL_BYTES and self._request.io != "direct" and not (converts and is_forked()):
            return self._read(storage, facts)
        one = replace(
            self._checkpoint,
            files=(self._checkpoint.files[storage.file],),
            storages=(storage._replace(file=0),),
            tensors=(facts,),
        )
        request = replace(self._request, source=one, owned=self._request.owned or cut)
        return self._load_planned(request, one)[facts.name]

    def _view(self, storage: StorageFacts, facts: TensorFacts) -> torch.Tensor:
        check_tensors_are_real()
        file = self._checkpoint.files[storage.file]
        flat = view_storage(storage, file, torch_dtype(facts.dtype), self._fds, {})
        file.check_opened(self._fds[storage.file])
        return _shaped(flat, facts)

    def _read(self, storage: StorageFacts, facts: TensorFacts) -> torch.Tensor:
        """Read a small tensor with plain calls; convert it on the device."""
        import torch

        check_tensors_are_real()
        file, fd = self._checkpoint.files[storage.file], self._fds[storage.file]
        target, source = self._request.policy.target(facts.name, facts.dtype), torch_dtype(facts.dtype)
        stays = target == facts.dtype and self._device.type == "cpu"
        # what goes elsewhere is converted as all of its bytes, with what lies between its elements
        shape, stride = (facts.shape, facts.stride) if stays else ((storage.nbytes // source.itemsize,), (1,))
        tensor = torch.empty_strided(shape, stride, dtype=source, device="cpu")
        try:
            done = _read_into(fd, tensor.data_ptr(), storage)
        except OSError as error:
            raise self._reader.failed(storage.file, storage.start, storage.nbytes, error) from error
        file.check_opened(fd)
        if done < storage.nbytes:
            end = storage.start + storage.nbytes
            raise CheckpointError.because(f"ends at byte {storage.start + done}, {end} were expected", path=file.path)
        return tensor if stays else _shaped(self._moved(tensor, torch_dtype(target), facts.name), facts)

    def _moved(self, tensor: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
        """Return the tensor on the device, where it is converted."""
        import torch

        try:
            return tensor.to(self._device).to(dtype)
        except torch.OutOfMemoryError as error:
            raise DeviceMemoryError(
                f"{self._checkpoint.path}: {self._device} has no room for {name!r}: {error}",
                path=self._checkpoint.path,
                tensor=name,
            ) from error

    @staticmethod
    def _load_planned(request: LoadRequest, checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
        with LoadSession(keeps_peaks=True) as session:
            plan = session.plan(request, checkpoint)
            return session.result(plan, session.run(plan)).tensors

    def _check_open(self) -> None:
        if not self._close.alive:
            raise OptionError.because(
                "was closed: nothing can be loaded from it any more",
                "open it again, or load within the with block",
                path=self._checkpoint.path,
            )


class SliceHandle:
    """A tensor of an open checkpoint, of which parts are loaded: `handle[100:200]`. Rows alone are read alone."""

    def __init__(self, handle: CheckpointHandle, facts: TensorFacts) -> None:
        self._handle = handle
        self._facts = facts

    def __repr__(self) -> str:
        return f"SliceHandle({self._facts.name!r}, {self.get_dtype()}, {self.get_shape()})"

    def get_shape(self) -> list[int]:
        """Return the shape of the whole tensor."""
        return list(self._facts.shape)

    def get_dtype(self) -> str:
        """Return the dtype in the file, by its name in safetensors: "F32", "BF16"; torch's name where that has none."""
        return SAFETENSORS_NAMES.get(self._facts.dtype, self._facts.dtype)

    def __getitem__(self, index: Any) -> torch.Tensor:
        """Load the part of the tensor that an index picks, as torch understands it.

        Args:
            index: Slices, numbers and `...`: from the first to the last element that they pick, the file is read.
                Everything else that torch takes (lists, masks, None) has the whole tensor loaded first.

        Returns:
            The part, contiguous; with slices and numbers it owns no memory beside its elements.

        Raises:
            IndexError: There are too many indices, or a number is out of bounds.
            OptionError: A step is not positive, the index is none, or the handle was closed; other errors are those of
                `get_tensor`.
        """
        dims = index if isinstance(index, tuple) else (index,)
        if any(isinstance(dim, str | bytes | float | dict | set) for dim in dims):
            reason = f"tensor {self._facts.name!r} cannot be indexed with {index!r:.60}"
            raise OptionError.because(reason, "use slices and numbers")
        if not all(dim is ... or isinstance(dim, slice) or _is_number(dim) for dim in dims) or dims.count(...) > 1:
            return self._handle.get_tensor(self._facts.name)[index].contiguous()
        if ... in dims:
            at, missing = dims.index(...), len(self._facts.shape) - len(dims) + 1
            dims = (*dims[:at], *[slice(None)] * missing, *dims[at + 1 :])
        return self._handle._load_part(self._facts, dims)


def _is_number(dim: object) -> bool:
    return isinstance(dim, Integral) and not isinstance(dim, bool)


def _shaped(flat: torch.Tensor, facts: TensorFacts) -> torch.Tensor:
    """Return the tensor on a storage of its own."""
    if facts.stride == contiguous_strides(facts.shape):
        return flat.view(facts.shape)
    return flat.as_strided(facts.shape, facts.stride)


def _read_into(fd: int, address: int, storage: StorageFacts) -> int:
    """Read a storage into memory; return how many bytes there were."""
    done = 0
    while done < storage.nbytes:
        left = (ctypes.c_char * (storage.nbytes - done)).from_address(address + done)
        if not (count := os.preadv(fd, [left], storage.start + done)):
            break
        done += count
    return done
