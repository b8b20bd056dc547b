"""The converted cache as the source of streamed blocks: its entry in the place of the checkpoint, if there is one.

Streaming brings bytes again and again: of an entry in half the dtype, half of them. None is built here, since a
streamed module never has all of its tensors.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from wan_loader.cache.cached_load import open_entry
from wan_loader.cache.checksums import check_entry
from wan_loader.cache.outline import outline_checkpoint, why_source
from wan_loader.cache.store import Store
from wan_loader.errors import CacheError, CheckpointError, MissingFileError
from wan_loader.loading.report import CacheReport

if TYPE_CHECKING:
    from contextlib import ExitStack

    from wan_loader.cache.outline import Outline
    from wan_loader.formats import Checkpoint
    from wan_loader.plan.dtype_policy import DtypePolicy
    from wan_loader.types import StrPath

__all__ = ["find_converted"]


def find_converted(
    source: Checkpoint, policy: DtypePolicy, directory: StrPath | None, resources: ExitStack
) -> tuple[Checkpoint, CacheReport]:
    """Return the checkpoint to stream from: the entry of a source where there is a sound one, else the source.

    Args:
        source: The checkpoint that was asked for.
        policy: The dtypes that its tensors get in the module.
        directory: The directory of the cache; None is the user's.
        resources: Keeps the entry open, which nobody removes meanwhile.

    Raises:
        MissingFileError: A file of the source is gone.
    """
    outline = outline_checkpoint(source, policy)
    if (reason := why_source(outline)) is not None:
        return source, CacheReport("source", reason)
    try:
        return _open(outline, directory, resources)
    except MissingFileError:
        raise
    except (CacheError, CheckpointError) as error:
        return source, CacheReport("source", f"the entry cannot be used: {error}")
    except OSError as error:
        return source, CacheReport("source", f"the cache cannot be used: {error}")


def _open(outline: Outline, directory: StrPath | None, resources: ExitStack) -> tuple[Checkpoint, CacheReport]:
    (outlined,) = outline.files
    source = outlined.checkpoint
    entry = Store(directory).find(outline.key(outline.sources))
    if entry is None:
        why = "no entry yet: converted each time, until wan-loader cache build, or load_into with cache=True, makes one"
        return source, CacheReport("source", why)
    resources.callback(entry.close)
    checkpoint, as_left = open_entry(entry, outlined)
    if not as_left and (wrong := check_entry(entry.path, entry.manifest)):
        raise CacheError("; ".join(wrong), path=entry.path)
    # reports name what was asked for, not the file in the cache
    named = replace(checkpoint, path=source.path, part=source.part)
    return named, CacheReport("hit", "the source is unchanged", str(entry.path))
