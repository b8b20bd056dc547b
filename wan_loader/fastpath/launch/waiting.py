"""The fast path in a process that may never load a model: nothing happens until torch has been imported.

This file is copied to where processes find it when they start, so it stands alone, works on any Python from 3.9,
imports nothing of wan_loader before torch has been, and never raises into the program. WAN_LOADER_ACCELERATE=0 turns it
off for a process and those that it starts; WAN_LOADER_KEEP=1 has it use weights that are kept.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

__all__ = ["begin", "is_off"]


def is_off() -> bool:
    """Say whether the environment turns the fast path off."""
    return os.environ.get("WAN_LOADER_ACCELERATE") == "0"


def begin(tallies: Any = None) -> None:
    """Install the fast path once torch has been imported.

    Args:
        tallies: A directory in which this process is to leave its counts when it ends.
    """
    if is_off():
        return
    if "torch" in sys.modules:
        _install(tallies)
    else:
        sys.meta_path.insert(0, _Torch(tallies))


class _Torch:
    """An entry of `sys.meta_path` that finds torch as the entries behind it do, and notices when it has been imported.

    Its loader stays what it is: its `exec_module` is replaced for one call.
    """

    def __init__(self, tallies: Any) -> None:
        self._tallies = tallies

    def find_spec(self, name: Any, path: Any = None, target: Any = None) -> Any:
        if name != "torch" or self not in sys.meta_path:
            return None
        for finder in sys.meta_path[sys.meta_path.index(self) + 1 :]:
            spec = finder.find_spec(name, path, target) if hasattr(finder, "find_spec") else None
            if spec is not None:
                if hasattr(spec.loader, "exec_module"):
                    self._notice(spec.loader)
                return spec
        return None

    def _notice(self, loader: Any) -> None:
        original = loader.exec_module

        def exec_module(module: Any) -> None:
            vars(loader).pop("exec_module", None)
            original(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
                _install(self._tallies)

        try:
            # the import system leaves frames of this name out of tracebacks
            exec_module.__code__ = exec_module.__code__.replace(co_filename="<frozen importlib._bootstrap>")
            loader.exec_module = exec_module
        except AttributeError:  # an older Python, a loader without attributes: then this process stays as it is
            return


def _install(tallies: Any) -> None:
    try:
        import wan_loader

        # collections, which the import would cause, look at all that torch has made: two thirds of the time
        with wan_loader.paused_gc():
            wan_loader.install(**({"keep": True} if os.environ.get("WAN_LOADER_KEEP") == "1" else {}))
        if tallies is not None:
            from wan_loader.fastpath.launch.tallies import leave_tally_at_exit

            leave_tally_at_exit(tallies)
    except Exception as error:  # another environment, another version: then this process stays as it is
        if tallies is not None:
            _leave(tallies, "everything in " + sys.executable + ": " + type(error).__name__ + ": " + str(error))


def _leave(tallies: Any, reason: Any) -> None:
    """Say in the place of a tally why there is none."""
    try:
        import json

        with open(os.path.join(tallies, str(os.getpid()) + ".json"), "x") as file:
            json.dump({"components": {}, "spared": {}, "spared_nbytes": {}, "left": {reason: 0}}, file)
    except OSError:
        return
