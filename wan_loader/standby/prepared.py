"""What a server knows once it has imported everything; its forks have a copy."""

from __future__ import annotations

import gc
import os
import stat
import sys
import time
from binascii import crc32
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import wan_loader
from wan_loader.standby.imports import import_all
from wan_loader.standby.variables import NOT_COMPARED, recorded_reads
from wan_loader.standby.world import identity
from wan_loader.system.interpreter import freeze_all

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__all__ = ["Prepared", "prepare"]

Fingerprint = tuple[int, int, int]
"""Of a file: time, size and number. Of a directory: the names in it, but for what imports write there."""
_OUTDATED = (0, 0, 0)
#: By so much the clock of files is behind at most.
_COARSE_NS = 50_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A process that has imported everything."""

    environ: Mapping[str, str]
    """The environment that imports have found."""
    reads: set[str]
    """The variables that they have looked at, or have set."""
    set_by_imports: Mapping[str, str | None]
    """Those that have another value since, or none."""
    modules: frozenset[str]
    failed: Mapping[str, str]
    """Module -> why it could not be imported."""
    files: Mapping[str, Fingerprint]
    """What changes when the environment does: files of modules, directories of what is installed, the interpreter."""
    identity: Mapping[str, Any]
    seconds: float

    def changed(self) -> str:
        """Name a file that is not what it was when it was imported; nothing if all are."""
        return next((path for path, known in self.files.items() if _fingerprint(path) != known), "")


def prepare(names: list[str], environ: Mapping[str, str]) -> Prepared:
    """Import modules, and all that they import.

    Args:
        names: Modules; those that cannot be imported are left out.
        environ: The environment of this process.

    Raises:
        Unforkable: No process may be forked after one of them.
    """
    begin, begun_ns = time.monotonic(), time.time_ns()
    installed = _fingerprints(path for path in sys.path if path.endswith(("site-packages", "dist-packages")))
    gc.disable()
    with recorded_reads() as reads:
        failed = import_all(names)
    if "torch" in sys.modules:  # in a fork this would take longer than all the rest
        wan_loader.install()
    gc.collect()
    freeze_all()  # nothing of it is looked at again, and so copied into a fork
    now = dict(os.environ)
    return Prepared(
        environ=environ,
        reads=reads,
        set_by_imports={
            name: now.get(name) for name in {*environ, *now} - NOT_COMPARED if environ.get(name) != now.get(name)
        },
        modules=frozenset(sys.modules),
        failed=failed,
        files=installed | _files(begun_ns),
        identity=identity(),
        seconds=time.monotonic() - begin,
    )


def _files(begun_ns: int) -> dict[str, Fingerprint]:
    paths = {os.path.realpath(sys.executable), os.path.join(sys.prefix, "pyvenv.cfg")}
    for module in list(sys.modules.values()):
        origin = getattr(getattr(module, "__spec__", None), "origin", None)
        if isinstance(origin, str) and os.path.isabs(origin):
            paths.add(origin)
    found, now_ns = _fingerprints(paths), time.time_ns()
    # what was written meanwhile may be another than was imported
    return {path: _OUTDATED if begun_ns - _COARSE_NS < mark[0] < now_ns else mark for path, mark in found.items()}


def _fingerprints(paths: Iterable[str]) -> dict[str, Fingerprint]:
    """Look at files and directories; those that are not there are left out."""
    return {path: mark for path in paths if (mark := _fingerprint(path))}


def _fingerprint(path: str) -> Fingerprint | tuple[()]:
    with suppress(OSError):
        facts = os.stat(path)
        if stat.S_ISDIR(facts.st_mode):
            names = sorted({*os.listdir(path)} - {"__pycache__"})
            return (crc32(chr(0).join(names).encode("utf-8", "surrogateescape")), len(names), facts.st_ino)
        return (facts.st_mtime_ns, facts.st_size, facts.st_ino)
    return ()
