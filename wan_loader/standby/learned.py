"""What programs have imported: a small file for each of the last ones, so that the server imports it the next time.

Only modules that are installed count: what lies beside a program is its own.
"""

from __future__ import annotations

import os
import sys
from binascii import crc32
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from wan_loader.standby.place import environment_key, package_root

if TYPE_CHECKING:
    from collections.abc import Container

__all__ = ["Learned"]

#: So many programs are remembered.
_MOST_PROGRAMS = 8


class Learned:
    """The files of one environment."""

    def __init__(self) -> None:
        from platformdirs import user_cache_path

        self.directory = Path(user_cache_path("wan-loader"), "standby", environment_key())

    def modules(self) -> list[str]:
        """Name what the last programs have imported, each after what was imported before it."""
        names: dict[str, None] = {}
        for path in self._by_age()[-_MOST_PROGRAMS:]:
            with suppress(OSError, ValueError):
                names.update(dict.fromkeys(path.read_text().split()))
        return list(names)

    def changed_ns(self) -> int:
        """Return when something was learned last."""
        try:
            return self.directory.stat().st_mtime_ns
        except OSError:
            return 0

    def learn(self, program: str, known: Container[str]) -> None:
        """Remember what this process has imported beyond what is known."""
        names = [name for name in list(sys.modules) if name not in known and _counts(name)]
        self._add(f"{_key(program)}.modules", names)
        with suppress(OSError):
            for path in self._by_age()[:-_MOST_PROGRAMS]:
                path.unlink(missing_ok=True)

    def learn_variable(self, program: str, name: str) -> None:
        """Remember that a program sets a variable which must have its value before the imports."""
        self._add(f"{_key(program)}.variables", [name])

    def variables(self, program: str) -> set[str]:
        """Name the variables that a program has set, since it was written last."""
        path = self.directory / f"{_key(program)}.variables"
        with suppress(OSError, ValueError):
            if path.stat().st_mtime_ns > os.stat(program).st_mtime_ns:
                return set(path.read_text().split())
        return set()

    def _by_age(self) -> list[Path]:
        with suppress(OSError):
            return sorted(self.directory.glob("*.modules"), key=lambda path: path.stat().st_mtime_ns)
        return []

    def _add(self, name: str, words: list[str]) -> None:
        """Add words to a file; nothing where that cannot be."""
        from wan_loader.system.files import write_text

        path = self.directory / name
        with suppress(OSError, ValueError):
            before = path.read_text().split() if path.exists() else []
            if new := [word for word in words if word not in set(before)]:
                self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
                write_text(path, "\n".join([*before, *new, ""]))


def _key(program: str) -> str:
    return f"{crc32(os.path.realpath(program).encode('utf-8', 'surrogateescape')):08x}"


def _counts(name: str) -> bool:
    """Say whether a module is one that is installed, under its own name."""
    spec = getattr(sys.modules.get(name), "__spec__", None)
    origin = getattr(spec, "origin", None)
    if spec is None or spec.name != name or not isinstance(origin, str) or name.endswith("__main__"):
        return False
    own = os.path.join(package_root(), "wan_loader", "")
    return origin.startswith(own) or "/site-packages/" in origin or "/dist-packages/" in origin
