"""wan-loader: huge generative models, started as fast as the hardware allows.

Importing this package does not import torch; the first call that needs it does.
"""

from __future__ import annotations

import atexit
import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from wan_loader._version import __version__
from wan_loader.system.forks import without_forks

if TYPE_CHECKING:
    from wan_loader.api import load, load_file, load_into
    from wan_loader.errors import (
        CacheError,
        CheckpointError,
        DeviceError,
        DeviceMemoryError,
        DistributedError,
        HostMemoryError,
        KeyMismatchError,
        MissingFileError,
        OptionError,
        OutputError,
        WanLoaderError,
    )
    from wan_loader.events import Observer, Recorder, Span
    from wan_loader.formats import Checkpoint, open_checkpoint
    from wan_loader.formats.several import MissingFile, ModelDirectory, ModelPart
    from wan_loader.loading.empty_weights import empty_weights
    from wan_loader.warming.prewarm import prewarm

_LAZY = {
    "CacheError": "wan_loader.errors",
    "Checkpoint": "wan_loader.formats",
    "CheckpointError": "wan_loader.errors",
    "DeviceError": "wan_loader.errors",
    "DeviceMemoryError": "wan_loader.errors",
    "DistributedError": "wan_loader.errors",
    "HostMemoryError": "wan_loader.errors",
    "KeyMismatchError": "wan_loader.errors",
    "MissingFile": "wan_loader.formats.several",
    "MissingFileError": "wan_loader.errors",
    "ModelDirectory": "wan_loader.formats.several",
    "ModelPart": "wan_loader.formats.several",
    "Observer": "wan_loader.events",
    "OptionError": "wan_loader.errors",
    "OutputError": "wan_loader.errors",
    "Recorder": "wan_loader.events",
    "Span": "wan_loader.events",
    "WanLoaderError": "wan_loader.errors",
    "empty_weights": "wan_loader.loading.empty_weights",
    "load": "wan_loader.api",
    "load_file": "wan_loader.api",
    "load_into": "wan_loader.api",
    "open_checkpoint": "wan_loader.formats",
    "prewarm": "wan_loader.warming.prewarm",
}

__all__ = [
    "CacheError",
    "Checkpoint",
    "CheckpointError",
    "DeviceError",
    "DeviceMemoryError",
    "DistributedError",
    "HostMemoryError",
    "KeyMismatchError",
    "MissingFile",
    "MissingFileError",
    "ModelDirectory",
    "ModelPart",
    "Observer",
    "OptionError",
    "OutputError",
    "Recorder",
    "Span",
    "WanLoaderError",
    "__version__",
    "empty_weights",
    "load",
    "load_file",
    "load_into",
    "open_checkpoint",
    "prewarm",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        with without_forks():
            return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__


def _at_exit(pid: int) -> None:
    """Other processes of a distributed run may wait for this one; forked ones are none of them."""
    if "torch.distributed" in sys.modules and os.getpid() == pid:
        from wan_loader.distributed.exit_note import leave_note

        leave_note()


atexit.register(_at_exit, os.getpid())
