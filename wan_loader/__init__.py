"""Huge generative models, started as fast as the hardware allows.

Importing this package does not import torch; the first call that needs it does.

Public are the names in `__all__` here, and those in the `__all__` of these submodules; all others may change:

    arguments      checks of what callers pass
    cache          the converted cache: what an entry holds, and what one source has to do with it
    cli            how our programs speak, show progress and end
    distributed    the processes that torchrun starts: who they are, how they meet, how they notice that one is gone
    documents      JSON documents of ours, read strictly
    dtypes         names of dtypes
    formats        what a checkpoint consists of, from its headers
    sizes          bytes, rates and counts as people read and write them
    system         this machine: its memory, threads, files
"""

from __future__ import annotations

import atexit
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from wan_loader._version import __version__
from wan_loader.system.forks import is_forked, without_forks

if TYPE_CHECKING:
    from wan_loader.api import bind, iter_file, load, load_file, load_into, open_file
    from wan_loader.cancel import CancelToken
    from wan_loader.devices.driver import start_device
    from wan_loader.devices.resolve import resolve_device
    from wan_loader.errors import (
        CacheError,
        CheckpointError,
        DeviceError,
        DeviceMemoryError,
        DistributedError,
        HostMemoryError,
        HubError,
        KeepError,
        KeyMismatchError,
        LoadCancelledError,
        MissingFileError,
        OptionError,
        OutputError,
        WanLoaderError,
    )
    from wan_loader.events import Observer, Recorder, Span, clock_ns, span
    from wan_loader.fastpath.process import accelerate, install, uninstall
    from wan_loader.formats import Checkpoint, open_checkpoint
    from wan_loader.formats.model_directory import MissingFile, ModelDirectory, ModelPart
    from wan_loader.keeper.attach import kept_nbytes, verify_kept
    from wan_loader.keeper.keeping import Kept, keep
    from wan_loader.loading.empty_weights import empty_weights
    from wan_loader.loading.match import match, module_slots
    from wan_loader.loading.report import LoadReport
    from wan_loader.loading.result import LoadResult
    from wan_loader.plan.dtype_policy import DtypePolicy
    from wan_loader.plan.plan import LoadPlan
    from wan_loader.plan.request import LoadRequest
    from wan_loader.profiler.in_process import profile
    from wan_loader.spans import summarize
    from wan_loader.streaming.handle import StreamedBlocks
    from wan_loader.streaming.report import StreamReport
    from wan_loader.streaming.stream_blocks import stream_blocks
    from wan_loader.system.interpreter import paused_gc
    from wan_loader.types import IoMode, StrPath
    from wan_loader.warming.evict import resident_bytes
    from wan_loader.warming.prewarm import Prewarm, prewarm, prewarm_files

_LAZY = {
    "CacheError": "wan_loader.errors",
    "CancelToken": "wan_loader.cancel",
    "Checkpoint": "wan_loader.formats",
    "CheckpointError": "wan_loader.errors",
    "DeviceError": "wan_loader.errors",
    "DeviceMemoryError": "wan_loader.errors",
    "DistributedError": "wan_loader.errors",
    "DtypePolicy": "wan_loader.plan.dtype_policy",
    "HostMemoryError": "wan_loader.errors",
    "HubError": "wan_loader.errors",
    "IoMode": "wan_loader.types",
    "KeepError": "wan_loader.errors",
    "Kept": "wan_loader.keeper.keeping",
    "KeyMismatchError": "wan_loader.errors",
    "LoadReport": "wan_loader.loading.report",
    "LoadCancelledError": "wan_loader.errors",
    "LoadPlan": "wan_loader.plan.plan",
    "LoadRequest": "wan_loader.plan.request",
    "LoadResult": "wan_loader.loading.result",
    "MissingFile": "wan_loader.formats.model_directory",
    "MissingFileError": "wan_loader.errors",
    "ModelDirectory": "wan_loader.formats.model_directory",
    "ModelPart": "wan_loader.formats.model_directory",
    "Observer": "wan_loader.events",
    "OptionError": "wan_loader.errors",
    "OutputError": "wan_loader.errors",
    "Prewarm": "wan_loader.warming.prewarm",
    "Recorder": "wan_loader.events",
    "Span": "wan_loader.events",
    "StrPath": "wan_loader.types",
    "StreamReport": "wan_loader.streaming.report",
    "StreamedBlocks": "wan_loader.streaming.handle",
    "WanLoaderError": "wan_loader.errors",
    "accelerate": "wan_loader.fastpath.process",
    "bind": "wan_loader.api",
    "clock_ns": "wan_loader.events",
    "empty_weights": "wan_loader.loading.empty_weights",
    "install": "wan_loader.fastpath.process",
    "iter_file": "wan_loader.api",
    "keep": "wan_loader.keeper.keeping",
    "kept_nbytes": "wan_loader.keeper.attach",
    "load": "wan_loader.api",
    "load_file": "wan_loader.api",
    "load_into": "wan_loader.api",
    "match": "wan_loader.loading.match",
    "module_slots": "wan_loader.loading.match",
    "open_checkpoint": "wan_loader.formats",
    "open_file": "wan_loader.api",
    "paused_gc": "wan_loader.system.interpreter",
    "prewarm": "wan_loader.warming.prewarm",
    "prewarm_files": "wan_loader.warming.prewarm",
    "profile": "wan_loader.profiler.in_process",
    "resident_bytes": "wan_loader.warming.evict",
    "resolve_device": "wan_loader.devices.resolve",
    "span": "wan_loader.events",
    "start_device": "wan_loader.devices.driver",
    "stream_blocks": "wan_loader.streaming.stream_blocks",
    "summarize": "wan_loader.spans",
    "uninstall": "wan_loader.fastpath.process",
    "verify_kept": "wan_loader.keeper.attach",
}

__all__ = [
    "CacheError",
    "CancelToken",
    "Checkpoint",
    "CheckpointError",
    "DeviceError",
    "DeviceMemoryError",
    "DistributedError",
    "DtypePolicy",
    "HostMemoryError",
    "HubError",
    "IoMode",
    "KeepError",
    "Kept",
    "KeyMismatchError",
    "LoadCancelledError",
    "LoadPlan",
    "LoadReport",
    "LoadRequest",
    "LoadResult",
    "MissingFile",
    "MissingFileError",
    "ModelDirectory",
    "ModelPart",
    "Observer",
    "OptionError",
    "OutputError",
    "Prewarm",
    "Recorder",
    "Span",
    "StrPath",
    "StreamReport",
    "StreamedBlocks",
    "WanLoaderError",
    "__version__",
    "accelerate",
    "bind",
    "clock_ns",
    "empty_weights",
    "install",
    "iter_file",
    "keep",
    "kept_nbytes",
    "load",
    "load_file",
    "load_into",
    "match",
    "module_slots",
    "open_checkpoint",
    "open_file",
    "paused_gc",
    "prewarm",
    "prewarm_files",
    "profile",
    "resident_bytes",
    "resolve_device",
    "span",
    "start_device",
    "stream_blocks",
    "summarize",
    "uninstall",
    "verify_kept",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        with without_forks():
            return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__


def _at_exit() -> None:
    """Leave a note for the others of a distributed run, who may wait for this process; nobody waits for forked ones."""
    if "torch.distributed" in sys.modules and not is_forked():
        from wan_loader.distributed.exit_note import leave_exit_note

        leave_exit_note()


atexit.register(_at_exit)
