"""Hints for errors of `wan_loader` about names, where the names are those of a model of this family."""

from __future__ import annotations

from typing import TYPE_CHECKING, get_args

from wan_loader import KeyMismatchError
from wan_pipeline.keymap import MapName, keymap

if TYPE_CHECKING:
    from collections.abc import Collection

__all__ = ["hint"]


def hint(missing: Collection[str], unexpected: Collection[str]) -> str | None:
    """Say which key map makes the names of a file, all of them unexpected, those that a module misses."""
    wanted = set(missing)
    for name in get_args(MapName):
        try:
            if {keymap(name).to_diffusers(old) for old in unexpected} == wanted:
                return f'key_map=wan_pipeline.key_map("{name}")'
        except KeyMismatchError:  # not its names
            continue
    return None
