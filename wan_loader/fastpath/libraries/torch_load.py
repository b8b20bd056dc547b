"""The seam of `torch.load`: to a GPU by one plan, to the CPU as a mapping of the file.

    torch.load(path, map_location="cuda")      one load straight to the device
    torch.load(path, map_location="cpu")       the original, with the file mapped: nothing is copied, and whoever moves
                                               the weights on finds the bytes of a file

Both for zip files that hold a dict of plain tensors; everything else is the original's, and so is what fails here. The
original's tensors own their memory, so that a program may do anything with the file afterwards, save over it above
all. With a mapping that stays so by a lease (`system/leases.py`); where none is to be had, nothing is mapped.
"""

from __future__ import annotations

import os
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from wan_loader.events import clock_ns
from wan_loader.fastpath.libraries.left_alone import LeftAloneError, device_name, plain_path
from wan_loader.fastpath.modes import why_not_now
from wan_loader.fastpath.ours import ours

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from wan_loader.fastpath.patches import Patches
    from wan_loader.fastpath.tally import Tally
    from wan_loader.system.leases import Leases

__all__ = ["ALIGNMENT", "TorchLoad"]

_MIN_BYTES = 16 << 20
#: Torch's own memory is aligned so, and results of some kernels depend on it. Its zip files are written so, too.
ALIGNMENT = 64


class TorchLoad:
    """The replacement of `torch.load`. The tally counts what was fetched, and which copies were spared.

    Args:
        tally: Told of all that happens.
        leases: For files that are mapped; None: to the CPU nothing is mapped, and all is the original's.
        kinds: The kinds of devices that loads are planned to.
        min_nbytes: Less than this is read sooner than it is planned or leased.
    """

    def __init__(
        self, tally: Tally, leases: Leases | None, kinds: Sequence[str] = ("cuda",), min_nbytes: int = _MIN_BYTES
    ) -> None:
        self._tally = tally
        self._leases = leases
        self._kinds = kinds
        self._min_nbytes = min_nbytes
        self._mapping = _Mapping()

    def install(self, patches: Patches) -> None:
        """Replace the function, under the names of both modules that have it."""
        parameters = ("f", "map_location", "pickle_module", "weights_only", "mmap")
        patches.replace("torch.serialization", "load", self._instead_of, parameters)

    def _instead_of(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def loaded(f: Any, map_location: Any = None, pickle_module: Any = None, **options: Any) -> Any:
            try:
                with ours():
                    self._check(f, pickle_module, options)
                    device = "cpu" if map_location is None else device_name(map_location)
                    if device == "cpu" and self._leases is not None:
                        return self._mapped(original, self._leases, f, options | {"map_location": map_location})
                    if device.partition(":")[0] in self._kinds:
                        return self._planned(original, plain_path(f), device, options)
            except LeftAloneError as reason:
                if str(reason):
                    self._tally.leave(f"torch.load: {reason}")
            except Exception as error:  # the original will say it again, if it is not ours alone
                self._tally.leave_after(error, doing="torch.load: ")
            return original(f, map_location, pickle_module, **options)

        return loaded

    def _check(self, f: Any, pickle_module: Any, options: dict[str, Any]) -> None:
        """Leave alone what is small, what was asked for in a way of its own, and what is not read from headers."""
        path = plain_path(f)
        if os.stat(path).st_size < self._min_nbytes or path.endswith(".safetensors"):
            raise LeftAloneError("")  # the latter becomes a load_file
        if options.get("mmap") is not None or _maps_by_default():
            raise LeftAloneError("")  # the program has decided by itself
        if pickle_module is not None or options.keys() - {"mmap", "weights_only", "encoding"}:
            raise LeftAloneError("with a pickle module or pickle arguments of its own")
        if (mode := why_not_now()) is not None:
            raise LeftAloneError(mode)

    def _planned(self, original: Callable[..., Any], path: str, device: str, options: dict[str, Any]) -> Any:
        """Load straight to a device."""
        if options.get("weights_only") is False:
            raise LeftAloneError("weights_only=False")
        # with all that they import: not before there is something to load
        from wan_loader.fastpath.libraries.torch_files import check_planned, skeleton_of
        from wan_loader.fastpath.moving.loads import load
        from wan_loader.plan.dtype_policy import DtypePolicy

        start_ns = clock_ns()
        check_planned(path)
        skeleton = skeleton_of(original, path)
        loaded = load([path], device, policy=DtypePolicy())
        # the file may have been replaced between the two looks
        if loaded.tensors.keys() != skeleton.keys():
            raise LeftAloneError("the file has other names than planned")
        made: dict[int, Any] = {}  # what is one object in the file stays one
        for name, empty in list(skeleton.items()):
            skeleton[name] = made.setdefault(id(empty), loaded.tensors[name])
        self._tally.served("torch.load", loaded.report.nbytes_file, (clock_ns() - start_ns) / 1e9)
        return skeleton

    def _mapped(self, original: Callable[..., Any], leases: Leases, f: Any, options: dict[str, Any]) -> Any:
        """Have the original map the file."""
        path = plain_path(f)
        try:
            file = leases.lease(path)
        except OSError as error:
            raise LeftAloneError(f"the file is not mapped: {error.strerror or error}") from error
        from wan_loader.fastpath.libraries.torch_files import check_aligned, fetch_pages

        # from here on nobody writes to it without our knowledge
        check_aligned(path, ALIGNMENT)
        fetch_pages(path, file)
        nbytes = file.facts.st_size
        memory = file.map(0, nbytes)
        try:
            with self._mapping.shows(memory):
                state = original(f, **options, mmap=True)
        except Exception as error:  # the original will say it again
            raise LeftAloneError("the original refuses the file") from error
        if not os.path.samestat(os.stat(path), file.facts):
            raise LeftAloneError("the file was replaced meanwhile")
        self._tally.saved("copies of files into memory", nbytes=nbytes)
        return state


def _maps_by_default() -> bool:
    """Say whether the program has told torch to map files; older versions cannot be told."""
    import torch

    serialization = getattr(torch.utils, "serialization", None)
    return serialization is not None and bool(serialization.config.load.mmap)


class _Mapping:
    """What `torch.UntypedStorage.from_file` returns in a thread, while the original maps a file for us."""

    def __init__(self) -> None:
        self._thread = threading.local()
        self._lock = threading.Lock()
        self._n_users = 0

    @contextmanager
    def shows(self, memory: Any) -> Iterator[None]:
        """Have the function return this memory in this thread. Others that call it meanwhile get what they ask for."""
        import torch

        with self._lock:
            self._n_users += 1
            if self._n_users == 1:
                self._put_in(torch.UntypedStorage)
        self._thread.memory = memory
        try:
            yield
        finally:
            self._thread.memory = None
            with self._lock:
                self._n_users -= 1
                if not self._n_users:
                    self._take_out(torch.UntypedStorage)

    def _put_in(self, owner: Any) -> None:
        import torch

        self._before = vars(owner).get("from_file")
        original = owner.from_file

        def from_file(*args: Any, **kwargs: Any) -> Any:
            if (memory := getattr(self._thread, "memory", None)) is None:
                return original(*args, **kwargs)
            return torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()

        owner.from_file = staticmethod(from_file)

    def _take_out(self, owner: Any) -> None:
        if self._before is None:
            del owner.from_file
        else:
            owner.from_file = self._before
