"""The error tree. Every error that wan_loader raises on purpose is one of these.

    WanLoaderError
    ├── CheckpointError(ValueError)            a file is damaged, foreign, unsafe, or changed while it was read
    │   └── MissingFileError(FileNotFoundError)  a checkpoint, a shard or a directory is not there
    ├── KeyMismatchError(KeyError)             checkpoint and module disagree about names or shapes
    ├── DeviceError(ValueError)                the device does not exist or cannot be used
    ├── DeviceMemoryError(MemoryError)         the weights do not fit on the device
    ├── HostMemoryError(MemoryError)           the machine or its cgroup cannot give the memory asked for
    ├── CacheError(OSError)                    the converted cache cannot be used
    │   └── NewerFormatError                   an entry was written by a newer version of wan-loader
    ├── HubError(OSError)                      the hub cannot be reached, refuses, or sends other than it promised
    ├── SessionError(ValueError)               a saved session or measurement is damaged or foreign
    ├── LoadCancelledError                     a load was stopped through its `CancelToken`
    ├── DistributedError(RuntimeError)         another process of a distributed load failed, or they disagree
    ├── UnmeasuredError                        something could not be measured
    ├── OutputError(OSError)                   a result cannot be written where it was asked for
    └── OptionError(ValueError)                a setting that makes no sense

A message says what happened, to which file or tensor, and what to do. An error is also the builtin that a
caller would catch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    Shape = tuple[int, ...]

__all__ = [
    "CacheError",
    "CheckpointError",
    "DeviceError",
    "DeviceMemoryError",
    "DistributedError",
    "HostMemoryError",
    "HubError",
    "KeyMismatchError",
    "LoadCancelledError",
    "MissingFileError",
    "NewerFormatError",
    "OptionError",
    "OutputError",
    "SessionError",
    "UnmeasuredError",
    "WanLoaderError",
]


class WanLoaderError(Exception):
    """Root of all expected errors."""

    has_lines: ClassVar[bool] = False
    """Whether line breaks in the message are ours: else they are shown as escapes, as other controls in names."""


class CheckpointError(WanLoaderError, ValueError):
    """A checkpoint file is damaged, foreign, unsafe, or changed while it was read."""


class MissingFileError(CheckpointError, FileNotFoundError):
    """A checkpoint, one of its shards, or its directory is not there."""


class KeyMismatchError(WanLoaderError, KeyError):
    """Checkpoint and module disagree about names or shapes; the message shows a few of them, the fields hold all."""

    def __init__(
        self,
        message: str,
        *,
        missing: Sequence[str] = (),
        unexpected: Sequence[str] = (),
        misshaped: Mapping[str, tuple[Shape, Shape]] | None = None,
        on_meta: Sequence[str] = (),
    ) -> None:
        super().__init__(message)
        self.missing = tuple(missing)
        """Names of the module, or names that were asked for, that the checkpoint lacks."""
        self.unexpected = tuple(unexpected)
        """Names of the checkpoint that the module lacks."""
        self.misshaped = dict(misshaped or {})
        """Names of the checkpoint whose shapes differ, with the shape in the file and that in the module."""
        self.on_meta = tuple(on_meta)
        """Names of the module's tensors that would stay on the meta device."""

    has_lines = True

    __str__ = Exception.__str__  # KeyError would show the message in quotes, newlines escaped


class DeviceError(WanLoaderError, ValueError):
    """The device does not exist or cannot be used."""


class DeviceMemoryError(WanLoaderError, MemoryError):
    """The weights do not fit into what is free on the device."""


class HostMemoryError(WanLoaderError, MemoryError):
    """The machine, or the cgroup this process runs in, cannot give the memory asked for."""


class CacheError(WanLoaderError, OSError):
    """The converted cache cannot be read or written."""


class NewerFormatError(CacheError):
    """An entry of the cache was written by a newer version of wan-loader, which can use it."""


class HubError(WanLoaderError, OSError):
    """The hub cannot be reached, refuses, or sends other than it promised."""

    def __init__(self, message: str, *, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status
        """The HTTP status, where there is one."""


class SessionError(WanLoaderError, ValueError):
    """A saved session or a cached measurement is damaged or foreign."""


class LoadCancelledError(WanLoaderError):
    """A load was stopped through its `CancelToken`; nothing was handed out."""


class DistributedError(WanLoaderError, RuntimeError):
    """Another process of a distributed load failed or is gone, or the processes do not agree on what to load."""


class UnmeasuredError(WanLoaderError):
    """Something could not be measured; the message says why."""


class OutputError(WanLoaderError, OSError):
    """A result cannot be written where it was asked for."""


class OptionError(WanLoaderError, ValueError):
    """A setting that makes no sense, alone or with the others."""
