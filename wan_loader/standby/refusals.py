"""Why a program is started directly: something that imports have seen would be different for it."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from importlib.machinery import all_suffixes
from typing import TYPE_CHECKING, Any

from wan_loader.standby.variables import comes_late, different, names_set
from wan_loader.standby.world import assume_limits, different_identity

if TYPE_CHECKING:
    from wan_loader.standby.learned import Learned
    from wan_loader.standby.prepared import Prepared

__all__ = ["refusal"]


def refusal(prepared: Prepared, learned: Learned, given: dict[str, Any]) -> str:
    """Say why there is no fork for a program; nothing if there is one.

    Args:
        prepared: What has been imported.
        learned: What is known of programs.
        given: What `world.capture` has described. This process takes on its limits, to see whether that can be.
    """
    if name := different(prepared.reads, prepared.environ, given["environ"]):
        return f"{name} is another than when the server's imports read it"
    return (
        different_identity(prepared.identity, given["identity"])
        or assume_limits(given)
        or _own_modules(prepared, given["first"])
        or _own_variables(prepared, learned, given["program"])
    )


def _own_modules(prepared: Prepared, directory: str) -> str:
    """Say whether a program has modules of its own in place of those that were imported."""
    for name in _modules_in(directory):
        file = getattr(sys.modules.get(name) if name in prepared.modules else None, "__file__", None)
        if file and name != "__main__" and not _lies_in(file, directory, name):
            return f"{name} beside the program takes the place of the installed one"
    return ""


def _modules_in(directory: str) -> list[str]:
    """Name the modules and packages in a directory. What has no __init__ comes after those of that name which have."""
    suffixes = tuple(all_suffixes())
    names = []
    with suppress(OSError), os.scandir(directory) as entries:
        for entry in entries:
            is_package = entry.is_dir() and any(os.path.exists(f"{entry.path}/__init__{end}") for end in suffixes)
            if is_package or entry.name.endswith(suffixes):
                names.append(entry.name.partition(".")[0])
    return sorted(names)


def _lies_in(file: str, directory: str, name: str) -> bool:
    """Say whether a module's file is the one of that name in a directory."""
    path = os.path.join(os.path.realpath(directory), name)
    return os.path.realpath(file).startswith((f"{path}.", f"{path}{os.sep}"))


def _own_variables(prepared: Prepared, learned: Learned, program: str) -> str:
    """Say whether a program sets variables that imports have read."""
    names: list[str] = []
    with suppress(OSError, UnicodeDecodeError):
        if os.path.isfile(program):
            names = sorted(learned.variables(program))
            with open(program, encoding="utf-8") as file:
                names += names_set(file.read())
    late = next((name for name in names if comes_late(name, prepared.reads)), "")
    return late and f"the program sets {late}, which the server's imports have read"
