"""A fork of the server becomes the program that it is for, and runs it to its end."""

from __future__ import annotations

import atexit
import gc
import importlib
import os
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NoReturn

import wan_loader
from wan_loader.standby.ending import run_to_end
from wan_loader.standby.variables import watch_writes
from wan_loader.standby.world import assume
from wan_loader.system.forks import begin_anew

if TYPE_CHECKING:
    from wan_loader.standby.learned import Learned
    from wan_loader.standby.prepared import Prepared

__all__ = ["run"]


def run(prepared: Prepared, learned: Learned, given: dict[str, Any], fds: list[int]) -> NoReturn:
    """Run a program in this process.

    Args:
        prepared: What has been imported.
        learned: Where to leave what the program imports and sets.
        given: What `world.capture` has described, and what `client.hand_over` wants.
        fds: The descriptors that came with it.
    """
    assume(given, fds, prepared.environ, prepared.set_by_imports)
    gc.enable()  # what is frozen stays so: looking at it would copy all of it
    begin_anew(given["pid"])
    importlib.invalidate_caches()
    if "torch" in prepared.modules:
        _adapt_fast_path(given["fast_path"])
    _watch(prepared, learned, given["program"])
    module, _, function = given["entry"].partition(":")
    run_to_end(getattr(importlib.import_module(module), function), prepared.modules)


def _adapt_fast_path(wanted: bool) -> None:
    """Take the fast path out, which is in place, or have it use weights that are kept, as `waiting` would."""
    if not wanted:
        wan_loader.uninstall()
    elif os.environ.get("WAN_LOADER_KEEP") == "1":
        wan_loader.accelerate(keep=True)


def _watch(prepared: Prepared, learned: Learned, program: str) -> None:
    """Learn what this process imports, and which variables it sets too late; not those that are forked from it."""
    pid, told = os.getpid(), set[str]()

    def learn() -> None:
        if os.getpid() == pid:
            learned.learn(program, prepared.modules)

    def tell(name: str) -> None:
        if name not in told and os.getpid() == pid:
            told.add(name)
            _say(f"{name} is set after imports have read it: start this program with --no-standby")
            learned.learn_variable(program, name)

    atexit.register(learn)
    watch_writes(prepared.reads, tell)


def _say(line: str) -> None:
    with suppress(OSError, ValueError, AttributeError):
        sys.stderr.write(f"wan-loader: {line}\n")
