"""The converted cache: a checkpoint that was converted once is read in its final dtypes from then on.

    outline         what an entry holds, decided from headers alone; and the key that says which source it was made from
    manifest        what an entry says about itself: sizes, checksums, source
    entry           one entry: being read, being written, or being looked at
    store           the directory of entries: found, built, pruned by any number of processes at once
    loaded_tensors  weights for an entry, from tensors that were just loaded or from the source
    build           writes an entry in the background
    checksums       compares an entry with what lies on the disk
    use             the state machine of one source: hit, building, or source
    cached_load     a load through the cache, wrapped around a load of the source

Public are the names below, for those who cache more than single checkpoints; they are imported when first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from wan_loader.system.lazy import lazy_names

if TYPE_CHECKING:
    from wan_loader.cache.cached_load import read_segments
    from wan_loader.cache.checksums import check_entry
    from wan_loader.cache.entry import Entry
    from wan_loader.cache.outline import CachedFile, Outline, outline_file
    from wan_loader.cache.use import CacheUse
    from wan_loader.loading.report import CacheReport
    from wan_loader.loading.result import EntryBuild

__all__ = [
    "CacheReport",
    "CacheUse",
    "CachedFile",
    "Entry",
    "EntryBuild",
    "Outline",
    "check_entry",
    "outline_file",
    "read_segments",
]

__getattr__ = lazy_names(
    __name__,
    {
        "CacheReport": "wan_loader.loading.report",
        "CacheUse": "wan_loader.cache.use",
        "CachedFile": "wan_loader.cache.outline",
        "Entry": "wan_loader.cache.entry",
        "EntryBuild": "wan_loader.loading.result",
        "Outline": "wan_loader.cache.outline",
        "check_entry": "wan_loader.cache.checksums",
        "outline_file": "wan_loader.cache.outline",
        "read_segments": "wan_loader.cache.cached_load",
    },
)


def __dir__() -> list[str]:
    return __all__
