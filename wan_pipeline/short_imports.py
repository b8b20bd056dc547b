"""Shorter imports: once weights load beside them, they are what a start waits for.

It changes two settings of the process for as long as the body runs, and puts each back. A third is the loader's: while
it loads, its threads wait for the interpreter for a short turn only.
"""

from __future__ import annotations

from contextlib import contextmanager
from functools import cache
from importlib import metadata
from typing import TYPE_CHECKING

from wan_loader import paused_gc

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["short_imports"]


@contextmanager
def short_imports() -> Iterator[None]:
    """Make the imports in the body shorter, which are of large libraries while other threads load."""
    with paused_gc(), _packages_listed_once():
        yield


@contextmanager
def _packages_listed_once() -> Iterator[None]:
    """Read the records of all installed packages once: transformers and diffusers each do, for up to a second."""
    before = metadata.packages_distributions
    metadata.packages_distributions = cache(before)
    try:
        yield
    finally:
        metadata.packages_distributions = before
