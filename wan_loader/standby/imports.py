"""What the server imports, and whether a process may be forked then.

A process that is forked has one thread and no CUDA, whatever was begun before. So a module whose import begins either
is named and left out: the program imports it itself.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import sys
import time
from contextlib import closing

from wan_loader.entry_points import entry_points
from wan_loader.sizes import format_count
from wan_loader.standby.elsewhere import Elsewhere

__all__ = ["Unforkable", "import_all", "joined_modules"]

_GROUP = "wan_loader.standby"
_CUDA_ERROR_NOT_INITIALIZED = 3
#: How long a thread that has ended may still be listed.
_LINGERING_S = 0.1


class Unforkable(Exception):
    """A module's import has begun what a forked process cannot have."""

    def __init__(self, module: str, why: str) -> None:
        super().__init__(module, why)
        self.module, self.why = module, why


def joined_modules() -> list[str]:
    """Name the modules that programs of this distribution import when they start."""
    return [name for entry in entry_points(_GROUP) for name in entry.load()()]


def import_all(names: list[str]) -> dict[str, str]:
    """Import modules, each if it can be; return those that cannot, with the reason.

    Raises:
        Unforkable: No process may be forked after one of them.
    """
    failed: dict[str, str] = {}
    seen = {_top(name) for name in sys.modules}
    with closing(Elsewhere()) as elsewhere:
        for name in names:
            if name in sys.modules:
                continue
            try:
                importlib.import_module(name)
            except KeyboardInterrupt:
                raise
            except BaseException as error:
                failed[name] = f"{type(error).__name__}: {error}".splitlines()[0]
            if new := {_top(name) for name in sys.modules} - seen:
                seen |= new
                _check(name)
            elsewhere.begin()
        if names:
            _check(names[-1])
    return failed


def _top(name: str) -> str:
    return name.partition(".")[0]


def _check(name: str) -> None:
    """Fork, and look: libraries that know of forks end their threads before."""
    child = os.fork()
    if not child:
        os._exit(_cuda_refuses())
    n_threads = _lasting_threads()
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) or _cuda_has_begun():
        raise Unforkable(name, "it begins CUDA")
    if n_threads > 1:
        raise Unforkable(name, f"it starts {format_count(n_threads - 1, 'thread')}")


def _lasting_threads() -> int:
    end = time.monotonic() + _LINGERING_S
    while (n_threads := len(os.listdir("/proc/self/task"))) > 1 and time.monotonic() < end:
        time.sleep(0.005)
    return n_threads


def _cuda_refuses() -> bool:
    """Say whether torch does not begin CUDA in this process, as another has, or has merely counted devices."""
    torch = sys.modules.get("torch")
    return torch is not None and bool(getattr(torch._C, "_cuda_isInBadFork", bool)())


def _cuda_has_begun() -> bool:
    """Say whether the driver has begun in this process, whoever asked it to."""
    with open("/proc/self/maps") as maps:
        if "/libcuda.so" not in maps.read():
            return False
    context = ctypes.c_void_p()
    return bool(ctypes.CDLL("libcuda.so.1").cuCtxGetCurrent(ctypes.byref(context)) != _CUDA_ERROR_NOT_INITIALIZED)
