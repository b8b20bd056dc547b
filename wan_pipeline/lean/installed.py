"""Facts from the records of installed distributions, read as text: what they need, and what they bring.

`importlib.metadata` answers the same, but parses whole documents for it: a second where hundreds are installed.
"""

from __future__ import annotations

import re
from collections import defaultdict
from importlib import metadata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__all__ = ["needed_by", "packages_distributions"]

_NAME = re.compile(r"[A-Za-z0-9._-]+")


def needed_by(roots: Iterable[str]) -> set[str]:
    """Name the packages that distributions bring and that they require, whose requirements are followed.

    Extras are left out, and what is not installed counts for nothing.
    """
    waiting, seen = list(roots), set[str]()
    packages = set[str]()
    while waiting:
        name = _normalised(waiting.pop())
        if name in seen:
            continue
        seen.add(name)
        try:
            found = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        waiting += _requirements(found)
        # also its own name: an old record may say nothing of what it brings
        packages |= {name.replace("-", "_"), *_packages(found)}
    return packages


def packages_distributions() -> dict[str, list[str]]:
    """Return which distributions bring each package, as `importlib.metadata.packages_distributions` does."""
    found: dict[str, list[str]] = defaultdict(list)
    for distribution in metadata.distributions():
        names = [line.partition(":")[2].strip() for line in _head(distribution) if line.startswith("Name:")]
        for package in _packages(distribution):
            found[package] += names[:1]
    return dict(found)


def _requirements(distribution: metadata.Distribution) -> Iterator[str]:
    for line in _head(distribution):
        if line.startswith("Requires-Dist:"):
            requirement, _, marker = line.partition(":")[2].partition(";")
            # other markers are of systems and versions: what they leave out is not installed, or does no harm
            if "extra" not in marker and (name := _NAME.match(requirement.strip())):
                yield name[0]


def _packages(distribution: metadata.Distribution) -> set[str]:
    if declared := (distribution.read_text("top_level.txt") or "").split():
        return set(declared)
    found = set()
    for line in (distribution.read_text("RECORD") or "").splitlines():
        path = line.partition(",")[0]
        top, slash, rest = path.partition("/")
        if (slash and rest.endswith((".py", ".so"))) or top.endswith((".py", ".so")):
            found.add(top.partition(".")[0] if not slash else top)
    return {name for name in found if name.isidentifier()}


def _head(distribution: metadata.Distribution) -> Iterator[str]:
    """Return the lines of a distribution's metadata before its description."""
    text = distribution.read_text("METADATA") or distribution.read_text("PKG-INFO") or ""
    return iter(text.partition("\n\n")[0].splitlines())


def _normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
