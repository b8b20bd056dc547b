"""Hooks on what opens files: every file of weights is noted, and what Python reads of it is timed.

`open` gives weight files a raw file of our own below the usual buffer, which times its reads.
"""

from __future__ import annotations

import functools
import io
import os

from .recorder import MIN_BYTES
from .wrap import drop_frame, patch, timed

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

__all__ = ["hook_numpy", "hook_open"]

_WEIGHTS = (".safetensors", ".gguf", ".pth", ".pt", ".bin", ".ckpt", ".pth.tar", ".npy", ".npz", ".h5", ".onnx")
#: Files of these names are parts of programs, however large.
_PROGRAMS = (".py", ".pyc", ".so", ".pyd", ".zip", ".whl", ".jsonl")
#: A file of another name counts as weights from this size on.
_LARGE_BYTES = 32 << 20
_WRITES = frozenset("wax")
_TO_WRITE = os.O_WRONLY | os.O_TRUNC | os.O_DIRECTORY


def hook_open(recorder: Any) -> None:
    """Replace `open` and `os.open` by ones that note weight files, of which the first times the reads.

    An audit hook would be told of each opening, but of all else that the interpreter does as well: that slows every
    program down.
    """
    import builtins

    original = io.open

    @functools.wraps(original)
    def open(file: Any, mode: Any = "r", buffering: Any = -1, *args: Any, **kwargs: Any) -> Any:
        try:
            reads = mode == "rb" or (isinstance(mode, str) and not _WRITES.intersection(mode))
            if recorder.on and reads and (name := _weights(file)):
                recorder.file(name, "open", False)
                if mode == "rb" and buffering == -1 and not args and not kwargs:
                    raw = _timed_file(recorder, os.fspath(file))
                    return io.BufferedReader(raw, max(io.DEFAULT_BUFFER_SIZE, getattr(raw, "_blksize", 0)))
            return original(file, mode, buffering, *args, **kwargs)
        except BaseException as error:
            drop_frame(error)
            raise

    patch(recorder, io, "open", lambda _: open)
    patch(recorder, builtins, "open", lambda _: open)
    patch(recorder, os, "open", lambda f: _noted(recorder, f))


def _noted(recorder: Any, original: Any) -> Any:
    @functools.wraps(original)
    def open(path: Any, flags: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            # beside another directory, it is another file
            reads = isinstance(flags, int) and not flags & _TO_WRITE and not kwargs
            if recorder.on and reads and (name := _weights(path)):
                recorder.file(name, "os.open", False)
            return original(path, flags, *args, **kwargs)
        except BaseException as error:
            drop_frame(error)
            raise

    # where it is asked whether `os.open` takes a directory, this one does
    if original in os.supports_dir_fd:
        os.supports_dir_fd.add(open)
        recorder.undo.append(lambda: os.supports_dir_fd.discard(open))
    return open


def hook_numpy(recorder: Any, numpy: Any) -> None:
    """Time what numpy reads by itself; `numpy.load` reads through this, too."""

    def nbytes_of(before: Any) -> Any:
        read, called = recorder.io()
        return max(read - before[0], called - before[1])

    patch(recorder, numpy, "fromfile", lambda f: timed(recorder, f, "read", "numpy.fromfile", nbytes_of))


def _weights(path: Any) -> Any:
    """Return the path of a file that may hold weights, as text; None for any other."""
    try:
        name = path if isinstance(path, str) else None if isinstance(path, int) else os.fsdecode(path)
        if name is None:
            return None
        end = name[-12:].lower()
        of_system = name.startswith(("/proc/", "/sys/", "/dev/")) and not name.startswith("/dev/shm/")
        if of_system or end.endswith(_PROGRAMS):
            return None
        size = os.stat(name).st_size
    except (OSError, ValueError, TypeError):  # what is wrong with it, `open` itself says
        return None
    least = 1 if end.endswith(_WEIGHTS[:2]) else MIN_BYTES if end.endswith(_WEIGHTS) else _LARGE_BYTES
    return name if size >= least else None


def _timed_file(recorder: Any, file: Any) -> Any:
    class FileIO(io.FileIO):
        def readall(self) -> Any:
            return self._timed(super().readall)

        def read(self, size: Any = -1, /) -> Any:
            return self._timed(super().read, size)

        def readinto(self, buffer: Any, /) -> Any:
            return self._timed(super().readinto, buffer) if len(buffer) >= MIN_BYTES else super().readinto(buffer)

        def _timed(self, call: Any, *args: Any) -> Any:
            around = recorder.around()
            # what reads through it, such as torch.load, counts the bytes itself
            if not recorder.on or (around is not None and around[0] == "read"):
                return call(*args)
            recorder.begin("read", "open().read")
            nbytes = 0
            try:
                result = call(*args)
                nbytes = result if isinstance(result, int) else len(result or ())
                return result
            finally:
                recorder.end(nbytes)

    FileIO.__module__, FileIO.__qualname__ = "_io", "FileIO"
    return FileIO(file, "rb")
