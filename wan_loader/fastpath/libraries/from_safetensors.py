"""The seam of safetensors: files that are read straight to a GPU.

    safetensors.torch.load_file(path, device="cuda")    by one plan
    safetensors.safe_open(path, "pt", device="cuda")    tensors one by one, some ahead; slices: only their bytes

To the CPU both only map the file, which nothing is faster than: those calls are the originals'. `safe_open` is a class
written in Rust, which can be neither extended nor changed, so a class of its own stands in its place. Calling that
gives the original's objects, or ours for a GPU; `isinstance` says yes to both.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from wan_loader.fastpath.libraries.left_alone import LeftAloneError, device_name, plain_path
from wan_loader.fastpath.libraries.open_on_device import OpenOnDevice
from wan_loader.fastpath.modes import why_not_now
from wan_loader.fastpath.ours import is_ours, ours

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from wan_loader.fastpath.patches import Patches
    from wan_loader.fastpath.tally import Tally

__all__ = ["SafetensorsLoads"]


class SafetensorsLoads:
    """The replacements of `load_file` and `safe_open`. The tally counts what was fetched."""

    def __init__(self, tally: Tally, kinds: Sequence[str] = ("cuda",)) -> None:
        self._tally = tally
        self._kinds = kinds
        self._thread = threading.local()

    def install(self, patches: Patches) -> None:
        """Replace both, wherever they are known."""
        patches.replace("safetensors", "safe_open", lambda original: self._stand_in(original, patches))
        patches.replace("safetensors.torch", "load_file", self._instead_of_load_file, ("filename", "device"))

    def _instead_of_load_file(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def loaded(*args: Any, **kwargs: Any) -> Any:
            self._thread.whole = True  # the original opens the file, and asks for each tensor
            try:
                return original(*args, **kwargs)
            finally:
                self._thread.whole = False

        return loaded

    def _stand_in(self, original: type, patches: Patches) -> type:
        """Return the class that stands in the place of `safe_open`."""

        class Kind(type):
            def __call__(cls, *args: Any, **kwargs: Any) -> Any:
                handle = original(*args, **kwargs)
                return handle if is_ours() or not patches.active else self._on_device(handle, *args, **kwargs)

            def __instancecheck__(cls, instance: object) -> bool:
                return isinstance(instance, original | OpenOnDevice)

            def __subclasscheck__(cls, subclass: type) -> bool:
                return issubclass(subclass, original | OpenOnDevice)

        attributes = {"__doc__": original.__doc__, "__module__": original.__module__, "__wrapped__": original}
        return Kind(original.__name__, (), attributes)

    def _on_device(
        self, handle: Any, filename: Any = None, framework: Any = None, device: Any = "cpu", **options: Any
    ) -> Any:
        """Return our handle for a file that was opened for a GPU, else the original's."""
        if framework not in ("pt", "torch", "pytorch"):
            return handle
        try:
            with ours():
                name = device_name(device)
                if name.partition(":")[0] not in self._kinds:
                    return handle
                if (why := why_not_now()) is not None:
                    raise LeftAloneError(why)
                # with all that it imports: not before there is something to load
                from wan_loader.api import open_file
                from wan_loader.formats import open_checkpoint

                checkpoint = open_checkpoint([plain_path(filename)])
                if checkpoint.format != "safetensors":
                    raise LeftAloneError("the file is not known to be of safetensors")
                sizes = {facts.name: facts.nbytes for facts in checkpoint.tensors}
                file = open_file(checkpoint, name)
        except LeftAloneError as reason:
            self._tally.leave(f"safe_open: {reason}")
            return handle
        except Exception as error:  # the original has opened the file
            self._tally.leave_after(error, doing="safe_open: ")
            return handle
        return OpenOnDevice(handle, file, sizes, self._tally, whole=getattr(self._thread, "whole", False))
