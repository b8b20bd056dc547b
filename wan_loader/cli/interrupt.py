"""Ctrl-C ends a program of ours within a second, whatever it is doing.

Python raises KeyboardInterrupt at the next step of its own code in the main thread. That alone does not do: libraries
swallow it while they are imported, or stay half imported; a call into C may take seconds; and the interpreter's own end
takes long once torch is there. So, in a process that is ours:

* Until the command begins, and in the imports of libraries, SIGINT has its default action: nothing is to be cleaned up
  then, except while an entry of the cache is being written, or a command is `unhurried`.
* Otherwise KeyboardInterrupt is raised and commands clean up. Then the process ends without the interpreter's end.
* A thread ends the process if it is still there after `_GRACE_S`. What stays behind then is what a kill would leave,
  which every command copes with the next time.

Nothing of this happens in a process that merely calls our `main`, or where SIGINT is ignored. Imports little.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from contextlib import contextmanager, suppress
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import PathFinder
from typing import TYPE_CHECKING, NoReturn

from wan_loader.cli.output import flush_output, say

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

__all__ = [
    "INTERRUPTED",
    "begin_work",
    "end_interrupted",
    "unhurried",
    "was_interrupted",
]

#: Exit code after Ctrl-C.
INTERRUPTED = 130

#: How long after Ctrl-C a command may clean up.
_GRACE_S = 0.6
#: What a terminal is told that may have been left without a cursor, by a progress bar.
_SHOW_CURSOR = b"\x1b[?25h"

_was_interrupted = threading.Event()
_unhurried = threading.Event()


def begin_work() -> None:
    """Let Ctrl-C raise KeyboardInterrupt from here on, except in imports. Does nothing unless `begin_program` ran."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_DFL:
        return
    ours, pythons = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    # for the thread that reads; what Python writes to must not block
    os.set_blocking(ours, True)
    with suppress(RuntimeError):  # no thread is allowed here: Ctrl-C then takes what it takes
        threading.Thread(target=_end_in_time, args=(ours,), name="ctrl-c", daemon=True).start()
    signal.set_wakeup_fd(pythons, warn_on_full_buffer=False)
    signal.signal(signal.SIGINT, _interrupt)
    # before Python's own finders, of which it asks one
    sys.meta_path.insert(0, _GuardedImports())


def was_interrupted() -> bool:
    """Return True if Ctrl-C raised KeyboardInterrupt, which something else may have been made of since."""
    return _was_interrupted.is_set()


@contextmanager
def unhurried() -> Iterator[None]:
    """Take the time that is needed after Ctrl-C in the body: there are results to show, or much to remove."""
    _unhurried.set()
    try:
        yield
    finally:
        _unhurried.clear()


def end_interrupted() -> NoReturn:
    """End what is left of an interrupted command: now, in a process that is ours."""
    _stop_builds()
    if was_interrupted():
        say("interrupted")
    if signal.getsignal(signal.SIGINT) is _interrupt:
        # the interpreter's own end would do it, which is left out
        flush_output()
        os._exit(INTERRUPTED)
    sys.exit(INTERRUPTED)


def _stop_builds() -> None:
    """End cache entries that are being written: the interpreter would wait for them. Imports nothing."""
    module = sys.modules.get("wan_loader.cache.build")
    if module is not None:
        module.stop_builds()


def _is_building() -> bool:
    """Return True if cache entries are being written, which are to be removed. Imports nothing, as above."""
    return bool(getattr(sys.modules.get("wan_loader.cache.build"), "is_building", bool)())


def _interrupt(*_: object) -> None:
    _was_interrupted.set()
    raise KeyboardInterrupt


def _end_in_time(signals: int) -> None:
    """Wait for SIGINT, of which Python's own handler in C tells here at once, and see to it that the process ends."""
    while numbers := os.read(signals, 64):
        is_meant = signal.getsignal(signal.SIGINT) in (_interrupt, signal.SIG_DFL)
        if signal.SIGINT in numbers and is_meant and not _unhurried.is_set():
            time.sleep(_GRACE_S)
            if os.isatty(2):
                os.write(2, _SHOW_CURSOR)
            os._exit(INTERRUPTED)


@contextmanager
def _default_action() -> Iterator[None]:
    """Give SIGINT its default action in the body."""
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # else what is imported has set a handler of its own
            signal.signal(signal.SIGINT, before)


class _GuardedImports(MetaPathFinder):
    """A finder that gives SIGINT its default action while a library is imported, with all that it imports."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Find a module as Python does, if its import is to be guarded."""
        if signal.getsignal(signal.SIGINT) is not _interrupt:
            return None  # guarded already, or another's
        package = name.partition(".")[0]
        if package in sys.stdlib_module_names or package.startswith("wan_"):
            return None
        if threading.current_thread() is not threading.main_thread() or _is_building() or _unhurried.is_set():
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return None
        spec.loader = _GuardedLoader(spec.loader)
        return spec


class _GuardedLoader(Loader):
    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        with _default_action():
            return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            # a module must not know of the guard: others look at its loader for source and data
            module.__spec__.loader = module.__loader__ = self._loader
        with _default_action():
            self._loader.exec_module(module)
