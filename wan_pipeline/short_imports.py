"""Shorter imports: once weights load beside them, they are what a start waits for.

It changes settings of the process for as long as the body runs, and puts each back. One more is the loader's: while it
loads, its threads wait for the interpreter for a short turn only. What a lean start left out stays a stand-in until it
is used (`wan_pipeline.lean`).
"""

from __future__ import annotations

import sys
from contextlib import contextmanager, nullcontext
from functools import cache
from importlib import metadata
from typing import TYPE_CHECKING

from wan_loader import paused_gc
from wan_pipeline.lean.import_times import imports_timed
from wan_pipeline.lean.installed import needed_by, packages_distributions
from wan_pipeline.lean.known import COMPILER, prepare
from wan_pipeline.lean.stand_ins import PutOff

if TYPE_CHECKING:
    from collections.abc import Iterator

    from wan_pipeline.lean.import_times import Import

__all__ = ["short_imports"]

#: What the networks and their loading are made with: these and what they require are imported, the rest may wait.
_LIBRARIES = ("torch", "transformers", "diffusers", "accelerate", "ftfy", "wan-loader")


@contextmanager
def short_imports(*, lean: bool = False) -> Iterator[list[Import]]:
    """Make the imports in the body shorter, which are of large libraries while other threads load.

    Args:
        lean: Let packages wait until they are used that are neither these libraries nor required by them.

    Yields:
        The modules that this thread has imported in the body, a list that grows.
    """
    waits = lean and not sys.modules.keys() >= {"transformers", "diffusers"}  # a fork of stand-by has them
    with (
        paused_gc(),
        _packages_listed_once(),
        _put_off().active() if waits else nullcontext(),
        imports_timed() as found,
    ):
        yield found


@cache
def _put_off() -> PutOff:
    may_wait = _packages().keys() - needed_by(_LIBRARIES) - sys.stdlib_module_names
    return PutOff([*may_wait, COMPILER], prepare=prepare)


_packages = cache(packages_distributions)


@contextmanager
def _packages_listed_once() -> Iterator[None]:
    """Read the records of all installed packages once and as text; transformers and diffusers each parse them all."""
    before = metadata.packages_distributions
    metadata.packages_distributions = _packages
    try:
        yield
    finally:
        metadata.packages_distributions = before
