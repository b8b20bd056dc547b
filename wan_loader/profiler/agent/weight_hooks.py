"""Hooks on safetensors, transformers and diffusers: which file, how many bytes, how much of it was cached."""

from __future__ import annotations

import ctypes
import functools
import os
import sys

from .recorder import MIN_BYTES
from .wrap import drop_frame, patch, timed

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

__all__ = ["cached_bytes", "hook_gguf", "hook_pretrained", "hook_safetensors", "hook_safetensors_torch"]

_SYS_CACHESTAT = 451


def cached_bytes(path: Any) -> Any:
    """Return (bytes, bytes in the page cache or None where the kernel cannot say) of a file."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = os.fstat(fd).st_size
        # struct cachestat_range and struct cachestat; the first field of the answer counts cached pages
        window, stat = (ctypes.c_uint64 * 2)(0, size), (ctypes.c_uint64 * 5)()
        failed = ctypes.CDLL(None).syscall(_SYS_CACHESTAT, fd, window, stat, 0)
        return size, None if failed else min(size, stat[0] * os.sysconf("SC_PAGE_SIZE"))
    finally:
        os.close(fd)


def hook_safetensors(recorder: Any, module: Any) -> None:
    """Put a class of the same behaviour in the place of `safe_open`."""
    original = module.safe_open
    opener = _opener(recorder, original)
    patch(recorder, module, "safe_open", lambda _: opener)
    for other in list(sys.modules.values()):
        # what was imported before has the name for itself
        if getattr(other, "__dict__", {}).get("safe_open") is original:
            patch(recorder, other, "safe_open", lambda _: opener)
    recorder.undo.append(lambda: _put_back(opener, original))


def _put_back(opener: Any, original: Any) -> None:
    """Give modules that were imported meanwhile the name that they would have: the next recording looks for that."""
    for other in list(sys.modules.values()):
        names = getattr(other, "__dict__", {})
        if names.get("safe_open") is opener:
            names["safe_open"] = original


def hook_safetensors_torch(recorder: Any, module: Any) -> None:
    """Wrap `load_file` as a whole, what happens inside it is recorded too; and `load`, which copies bytes in memory."""
    patch(recorder, module, "load_file", lambda f: timed(recorder, f, "read", "safetensors.torch.load_file"))
    patch(recorder, module, "load", lambda f: _loads(recorder, f))


def _loads(recorder: Any, original: Any) -> Any:
    @functools.wraps(original)
    def load(data: Any) -> Any:
        if not recorder.on:
            return original(data)
        recorder.begin("h2d", "copy in host memory, by safetensors.torch.load")
        try:
            return original(data)
        except BaseException as error:
            drop_frame(error)
            raise
        finally:
            recorder.end(len(data))

    return load


def hook_gguf(recorder: Any, module: Any) -> None:
    """Wrap the conversion of quantised blocks to numbers."""
    patch(recorder, module, "dequantize", lambda f: timed(recorder, f, "cast", "gguf.dequantize"))


def hook_pretrained(recorder: Any, owner: Any) -> None:
    """Wrap `from_pretrained` as a frame around what is recorded inside it."""
    method = vars(owner).get("from_pretrained")
    if isinstance(method, classmethod):
        wrapped = timed(recorder, method.__func__, "other", lambda args, kwargs: args[0].__name__ + ".from_pretrained")
        owner.from_pretrained = classmethod(wrapped)
        recorder.undo.append(lambda: setattr(owner, "from_pretrained", method))


def _opener(recorder: Any, original: Any) -> Any:
    class safe_open:
        __doc__ = original.__doc__

        def __init__(self, filename: Any, *args: Any, **kwargs: Any) -> None:
            recorder.begin("header", "safe_open")
            try:
                self._file = original(filename, *args, **kwargs)
            except BaseException as error:
                drop_frame(error)
                raise
            finally:
                recorder.end()
            device = kwargs.get("device", args[1] if len(args) > 1 else "cpu")
            self._device = str(device)
            recorder.file(os.fspath(filename), "safetensors", kwargs.get("backend", "mmap") == "mmap")

        def __enter__(self) -> Any:
            self._file.__enter__()
            return self

        def __exit__(self, *args: Any) -> Any:
            return self._file.__exit__(*args)

        def __getattr__(self, name: Any) -> Any:
            return getattr(self._file, name)

        def get_tensor(self, name: Any) -> Any:
            return _fetch(recorder, self._device, self._file.get_tensor, name)

        def get_tensors(self, *args: Any, **kwargs: Any) -> Any:
            return _fetch(recorder, self._device, self._file.get_tensors, *args, **kwargs)

        def get_slice(self, name: Any) -> Any:
            return _Slice(recorder, self._device, self._file.get_slice(name))

    safe_open.__module__, safe_open.__qualname__ = original.__module__, original.__qualname__
    # older versions: what the program asks for with hasattr must come out the same
    if not hasattr(original, "get_tensors"):
        del safe_open.get_tensors
    return safe_open


class _Slice:
    def __init__(self, recorder: Any, device: Any, inner: Any) -> None:
        self._recorder, self._device, self._inner = recorder, device, inner

    def __getattr__(self, name: Any) -> Any:
        return getattr(self._inner, name)

    def __getitem__(self, index: Any) -> Any:
        return _fetch(self._recorder, self._device, self._inner.__getitem__, index)


def _fetch(recorder: Any, device: Any, method: Any, *args: Any, **kwargs: Any) -> Any:
    """Get tensors out of a file: on the CPU often a mapping that is read later, elsewhere a copy."""
    if not recorder.on:
        return method(*args, **kwargs)
    on_cpu = device in ("cpu", "-1")
    before = recorder.counters()
    recorder.begin("read", "safetensors")
    result: Any = ()
    try:
        result = method(*args, **kwargs)
        return result
    except BaseException as error:
        drop_frame(error)
        raise
    finally:
        if on_cpu:
            read, called = recorder.io()
            fetched = max(read - before[0], called - before[1])
            # a view of the mapping reads nothing now: its bytes count where they are touched
            recorder.end(fetched if fetched >= MIN_BYTES else 0)
        else:
            tensors = result.values() if isinstance(result, dict) else (result,)
            nbytes = sum(getattr(t, "nbytes", 0) for t in tensors)
            label = "pageable host to " + device.partition(":")[0] + ", by safetensors"
            recorder.end(nbytes, ("h2d", label), before)
