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
    ├── KeepError(OSError)                     the keeper cannot be reached, or cannot keep what it is given
    ├── HubError(OSError)                      the hub cannot be reached, refuses, or sends other than it promised
    ├── SessionError(ValueError)               a saved session or measurement is damaged or foreign
    ├── LoadCancelledError                     a load was stopped through its `CancelToken`
    ├── DistributedError(RuntimeError)         another process of a distributed load failed, or they disagree
    ├── UnmeasuredError                        something could not be measured
    ├── OutputError(OSError)                   a result cannot be written where it was asked for
    └── OptionError(ValueError)                a setting that makes no sense

A message says what happened, to which file or tensor, and what to do. Parts of it are fields, too: `path`, `tensor`,
`reason`, `remedy`. An error is also the builtin that a caller would catch.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, ClassVar, Self, TypedDict, Unpack

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from wan_loader.types import StrPath

    Shape = tuple[int, ...]

__all__ = [
    "CacheError",
    "CheckpointError",
    "DeviceError",
    "DeviceMemoryError",
    "DistributedError",
    "HostMemoryError",
    "HubError",
    "KeepError",
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
    """The root of all expected errors.

    Args:
        *args: The message, whole: what `str()` gives. The fields repeat parts of it for programs and tests.
        path: The file or directory that the error is about.
        tensor: The tensor that it is about.
        reason: The cause in a few words, such as "No such file or directory".
        remedy: The advice to the reader, such as "check the path".

    Fields that are unknown, or that make no sense for an error, are None. They survive pickling, which is how errors
    travel between processes.
    """

    has_lines: ClassVar[bool] = False
    """True if line breaks in the message are ours: else they are shown as escapes, as other controls in names."""

    def __init__(
        self,
        *args: object,
        path: StrPath | None = None,
        tensor: str | None = None,
        reason: str | None = None,
        remedy: str | None = None,
    ) -> None:
        super().__init__(*args)
        self.path = None if path is None else os.fspath(path)
        self.tensor = tensor
        self.reason = reason
        self.remedy = remedy

    @classmethod
    def because(cls, reason: str, remedy: str | None = None, *, path: StrPath | None = None) -> Self:
        """Make an error whose message is made of its fields: "PATH REASON: REMEDY", without those that are None."""
        about = reason if path is None else f"{os.fspath(path)} {reason}"
        return cls(about if remedy is None else f"{about}: {remedy}", path=path, reason=reason, remedy=remedy)


class _Fields(TypedDict, total=False):
    """The keywords of `WanLoaderError`, for errors that have some more."""

    path: StrPath | None
    tensor: str | None
    reason: str | None
    remedy: str | None


class CheckpointError(WanLoaderError, ValueError):
    """A checkpoint file is damaged, foreign, unsafe, or changed while it was read."""


class MissingFileError(CheckpointError, FileNotFoundError):
    """A checkpoint, one of its shards, or its directory is not there."""


class KeyMismatchError(WanLoaderError, KeyError):
    """Checkpoint and module disagree about names or shapes.

    The message shows a few of the names, the fields hold all.

    Args:
        message: The whole message.
        missing: Names of the module, or names that were asked for, that the checkpoint lacks.
        unexpected: Names of the checkpoint that the module lacks.
        misshaped: Names of the checkpoint whose shapes differ, with the shape in the file and that in the module.
        on_meta: Names of the module's tensors that would stay on the meta device.
        **fields: The fields that every `WanLoaderError` has.
    """

    def __init__(
        self,
        message: str,
        *,
        missing: Sequence[str] = (),
        unexpected: Sequence[str] = (),
        misshaped: Mapping[str, tuple[Shape, Shape]] | None = None,
        on_meta: Sequence[str] = (),
        **fields: Unpack[_Fields],
    ) -> None:
        super().__init__(message, **fields)
        self.missing = tuple(missing)
        self.unexpected = tuple(unexpected)
        self.misshaped = dict(misshaped or {})
        self.on_meta = tuple(on_meta)

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


class KeepError(WanLoaderError, OSError):
    """The keeper cannot be reached, or cannot keep what it is given."""


class HubError(WanLoaderError, OSError):
    """The hub cannot be reached, refuses, or sends other than it promised.

    Args:
        message: The whole message.
        status: The HTTP status, where there is one.
        **fields: The fields that every `WanLoaderError` has.
    """

    def __init__(self, message: str, *, status: int | None = None, **fields: Unpack[_Fields]) -> None:
        super().__init__(message, **fields)
        self.status = status


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
    """A setting makes no sense, alone or with the others."""
