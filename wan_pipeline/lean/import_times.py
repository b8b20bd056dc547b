"""The time that each package takes to be imported: what its own modules run, without what they import."""

from __future__ import annotations

import threading
from collections import defaultdict
from contextlib import contextmanager
from importlib.machinery import SourceFileLoader
from typing import TYPE_CHECKING

from wan_loader import clock_ns

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from types import ModuleType

__all__ = ["Import", "import_seconds", "imports_timed"]

#: A module, and when its code began and ended to run.
Import = tuple[str, int, int]


@contextmanager
def imports_timed() -> Iterator[list[Import]]:
    """Record which modules are run in this thread in the body, and when."""
    found: list[Import] = []
    thread, before = threading.get_ident(), SourceFileLoader.exec_module

    def exec_module(loader: SourceFileLoader, module: ModuleType) -> None:
        start_ns = clock_ns()
        try:
            before(loader, module)
        finally:
            if threading.get_ident() == thread:
                found.append((module.__name__, start_ns, clock_ns()))

    SourceFileLoader.exec_module = exec_module  # type: ignore[method-assign, assignment]
    try:
        yield found
    finally:
        SourceFileLoader.exec_module = before  # type: ignore[method-assign]


def import_seconds(imports: Iterable[Import], *, least_s: float = 0.05) -> dict[str, float]:
    """Return the seconds of each package by its name, the longest first.

    A module's time is its package's, without that of the modules which it imports meanwhile.

    Args:
        imports: The modules of one thread, in any order.
        least_s: Packages that take less are "others" together.
    """
    own_ns: dict[str, int] = defaultdict(int)
    running: list[tuple[str, int]] = []
    for name, start_ns, end_ns in sorted(imports, key=lambda found: (found[1], -found[2])):
        while running and running[-1][1] <= start_ns:
            running.pop()
        package = name.partition(".")[0]
        own_ns[package] += end_ns - start_ns
        if running:
            own_ns[running[-1][0]] -= end_ns - start_ns
        running.append((package, end_ns))
    long = {package: ns / 1e9 for package, ns in own_ns.items() if ns >= least_s * 1e9}
    short = sum(own_ns.values()) / 1e9 - sum(long.values())
    named = dict(sorted(long.items(), key=lambda item: -item[1]))
    return named | {"others": short} if own_ns else {}
