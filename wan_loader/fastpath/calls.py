"""Our loader in the place of `safetensors.torch.load_file` and `torch.load`, for programs that know nothing of it.

Only calls whose result is the same bit for bit take the fast path; everything else, and every call that fails there,
goes to the original, with its reason kept for the report:

    safetensors.torch.load_file(path, device="cuda")            also as diffusers calls it (`device_map="cuda"`)
    torch.load(path, map_location="cpu" or "cuda")              zip checkpoints that hold a dict of plain tensors;
                                                                weights_only left out or True, not mapped

`load_file` to the CPU stays with the original: it maps the file, which nothing is faster than. For a process of its
own (`wan-loader run`): names that were imported from those modules before keep the originals.
"""

from __future__ import annotations

import os
import threading
from collections import Counter, OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from wan_loader.api import load
from wan_loader.errors import WanLoaderError
from wan_loader.events import clock_ns
from wan_loader.fastpath.modes import why_not_now
from wan_loader.formats.foreign_files import read_head
from wan_loader.formats.known_formats import recognise_format
from wan_loader.formats.safetensors import SafetensorsFormat
from wan_loader.formats.torch_formats import TorchZipFormat
from wan_loader.formats.torch_zip import UnplannedError, read_torch_zip
from wan_loader.sizes import format_bytes, format_count, format_rate, format_seconds

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["FastPath"]


class _LeftAloneError(Exception):
    """A call is for the original; the message says why. Never leaves this module."""


@dataclass(slots=True)
class FastPath:
    """The replacement of both functions, and the counts of calls that took the fast path or did not. `install` once."""

    safetensors_devices: Sequence[str] = ("cuda",)
    """Kinds of devices for which `load_file` is replaced."""
    n_loads: int = 0
    nbytes: int = 0
    seconds: float = 0.0
    left: Counter[str] = field(default_factory=Counter)
    """Reasons for calls that went to the original."""
    _busy: threading.local = field(default_factory=threading.local, repr=False)

    def install(self) -> None:
        """Replace both functions in their modules. Imports torch and safetensors."""
        import safetensors.torch
        import torch

        safetensors.torch.load_file = self._instead_of(safetensors.torch.load_file, self._load_file)
        torch.load = torch.serialization.load = self._instead_of(torch.load, self._torch_load)

    def summary(self) -> str:
        """Sum up in one line for the user."""
        took = f"{format_count(self.n_loads, 'load')} took the fast path"
        if self.n_loads:
            rate = format_rate(self.nbytes / self.seconds) if self.seconds else "?"
            took += f": {format_bytes(self.nbytes)} in {format_seconds(self.seconds)} ({rate})"
        reasons = [f"{format_count(count, 'time')}: {reason}" for reason, count in self.left.most_common()]
        return took + (f"; left to the original {'; '.join(reasons)}" if reasons else "")

    def _instead_of(self, original: Callable[..., Any], ours: Callable[..., Any]) -> Callable[..., Any]:
        from functools import wraps

        @wraps(original)
        def replaced(*args: Any, **kwargs: Any) -> Any:
            if getattr(self._busy, "inside", False):  # our own loader, in this thread
                return original(*args, **kwargs)
            start_ns = clock_ns()
            # our loader calls torch.load itself for what it cannot plan
            self._busy.inside = True
            try:
                if (mode := why_not_now()) is not None:
                    raise _LeftAloneError(mode)
                tensors, nbytes = ours(original, *args, **kwargs)
            except TypeError:
                self.left["arguments that are not known here"] += 1
            except _LeftAloneError as reason:
                self.left[str(reason)] += 1
            except (WanLoaderError, OSError) as error:
                self.left[f"{type(error).__name__}: {error}".splitlines()[0]] += 1
            else:
                self.n_loads += 1
                self.nbytes += nbytes
                self.seconds += (clock_ns() - start_ns) / 1e9
                return tensors
            finally:
                self._busy.inside = False
            return original(*args, **kwargs)

        return replaced

    def _load_file(self, original: Any, filename: Any, device: Any = "cpu") -> tuple[dict[str, Any], int]:
        path, device = _path(filename), _device_name(device)
        if device.partition(":")[0] not in self.safetensors_devices:
            raise _LeftAloneError("load_file to the CPU only maps the file")
        if not isinstance(recognise_format(read_head(path)), SafetensorsFormat):
            raise _LeftAloneError("load_file of a file that is not safetensors")
        loaded = load([path], device=device)
        return loaded.tensors, loaded.report.nbytes_file

    def _torch_load(
        self, original: Any, f: Any, map_location: Any = None, *, weights_only: bool | None = None, mmap: Any = None
    ) -> tuple[Any, int]:
        path = _path(f)
        if weights_only is False:
            raise _LeftAloneError("torch.load with weights_only=False")
        if mmap or map_location is None:
            raise _LeftAloneError("torch.load with mmap=True, or without a map_location")
        device = _device_name(map_location)
        _check_planned(path)
        skeleton = _skeleton(original, path)
        loaded = load([path], device=device)
        # the file may have been replaced between the two looks
        if loaded.tensors.keys() != skeleton.keys():
            raise _LeftAloneError("torch.load of a file with other names than planned")
        made: dict[int, Any] = {}  # what is one object in the file stays one
        for name, empty in list(skeleton.items()):
            skeleton[name] = made.setdefault(id(empty), loaded.tensors[name])
        return skeleton, loaded.report.nbytes_file


def _check_planned(path: str) -> None:
    """Leave alone all that is not read from headers: our loader would leave it to torch.load, too."""
    if not isinstance(recognise_format(read_head(path)), TorchZipFormat):
        raise _LeftAloneError("torch.load of a legacy pickle")
    try:
        read_torch_zip(path)
    except UnplannedError as reason:
        raise _LeftAloneError(f"torch.load of a file that cannot be planned ({reason})") from reason


def _path(value: Any) -> str:
    if not isinstance(value, str | os.PathLike) or not isinstance(path := os.fspath(value), str):
        raise _LeftAloneError("the file is not given by its path")
    return path


def _device_name(value: Any) -> str:
    """Return cpu, cuda or cuda:N."""
    import torch

    if type(value) is int:
        return f"cuda:{value}"
    if not isinstance(value, str | torch.device):
        raise _LeftAloneError("map_location is no device")
    try:
        device = torch.device(value)
    except RuntimeError as error:
        raise _LeftAloneError("the device is not known to torch") from error
    if device.type not in ("cpu", "cuda"):
        raise _LeftAloneError(f"the device is a {device.type}")
    return "cpu" if device.type == "cpu" else str(device)


def _skeleton(original: Any, path: str) -> Any:
    """Return the result of torch.load without the weights: the container's own type and all it carries."""
    import torch

    try:
        # meta and mapped: nothing of the weights is read, and torch itself judges the pickle
        state = original(path, map_location="meta", weights_only=True, mmap=True)
    except Exception as error:  # the original will say it again
        raise _LeftAloneError("torch.load refuses the file") from error
    if type(state) not in (dict, OrderedDict):
        raise _LeftAloneError("torch.load of something else than a dict")
    if any(type(t) is not torch.Tensor or t.requires_grad for t in state.values()):
        raise _LeftAloneError("torch.load of a dict that holds more than plain tensors")
    if not _carries_only_versions(state):
        raise _LeftAloneError("torch.load of a dict with attributes of its own")
    return state


def _carries_only_versions(state: Any) -> bool:
    """Say whether a dict's only attribute is what `state_dict` notes: others may hold tensors, here without weights."""
    attributes = getattr(state, "__dict__", {})
    notes = attributes.get("_metadata", {})
    return attributes.keys() <= {"_metadata"} and all(
        isinstance(note, dict) and all(isinstance(value, int | float | str | None) for value in note.values())
        for note in (notes.values() if isinstance(notes, dict) else [None])
    )
