"""The functions that join this package from above, which our own distribution names as entry points.

So a package that is installed with this one may bring further commands and what it knows of models, and nothing here
imports it. Entry points of other distributions are not looked at: they would be others' code in every start. Where
this package was not installed (it runs from a source tree), nothing joins, and everything else works.

    wan_loader.commands     further commands of `wan-loader`, under their names (see `cli.app`)
    wan_loader.models       what is known of a model's directory (see `formats.model_directory`)
    wan_loader.outlines     the cache entry of a whole model (see `cli.cache`)
    wan_loader.networks     the networks of a whole model, as its pipeline loads them (see `cli.keep`)
    wan_loader.standby      the modules that a program imports when it starts (see `standby.imports`)
    wan_loader.key_maps     which key map fits a module (see `loading.mismatch`)
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

__all__ = ["DISTRIBUTION", "entry_points", "first_answer"]

DISTRIBUTION = "wan-loader"


@cache
def entry_points(group: str) -> tuple[EntryPoint, ...]:
    """Return our own entry points of a group; nothing is imported yet. The first call costs about 20 ms."""
    from importlib import metadata

    try:
        # not metadata.entry_points(), which reads the files of every distribution that is installed
        own = metadata.distribution(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return ()
    return tuple(own.entry_points.select(group=group))


def first_answer(group: str, *arguments: object) -> Any:
    """Ask the functions that joined under a group in turn; return the first answer that is not None."""
    for entry in entry_points(group):
        if (answer := entry.load()(*arguments)) is not None:
            return answer
    return None
