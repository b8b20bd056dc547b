"""The seam of functions that write checkpoints: what is mapped of their file, or waits to be cast, is saved before.

A writer is kept waiting by the lease on a file until its mappings are settled (`system/leases.py`), and that takes the
interpreter. These keep it to themselves while they open the file, so they would wait for themselves. All that opens
files as Python does (`open`, `os.open`, numpy, shutil), and every other process, needs nothing of this.

Casts that wait for the file are done before as well: a program that has its own copies may write over the file.
"""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from wan_loader.errors import CheckpointError
from wan_loader.fastpath.deferral.deferred import settle_file

if TYPE_CHECKING:
    from collections.abc import Callable

    from wan_loader.fastpath.patches import Patches
    from wan_loader.system.leases import Leases

__all__ = ["Rewrites"]

#: Module, function, and its second argument: the file.
_WRITERS = (
    ("torch.serialization", "save", "f"),
    ("torch.jit._script", "RecursiveScriptModule.save", "f"),
    ("safetensors", "serialize_file", "filename"),
)


class Rewrites:
    """Writers of checkpoints, with the mappings of the file that they write to settled before."""

    def __init__(self, leases: Leases) -> None:
        self._leases = leases

    def install(self, patches: Patches) -> None:
        """Replace the functions."""
        for module, name, argument in _WRITERS:
            patches.replace(module, name, partial(self._instead_of, argument), (argument,))

    def _instead_of(self, argument: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def saved(*args: Any, **kwargs: Any) -> Any:
            file = args[1] if len(args) > 1 else kwargs.get(argument)
            # an open file was settled when it was opened
            if file is not None and not hasattr(file, "write"):
                with suppress(CheckpointError):  # whoever looks at what is left will be told
                    settle_file(file)
                self._leases.settle(file)
            return original(*args, **kwargs)

        return saved
