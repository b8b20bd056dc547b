"""The index of a sharded checkpoint: which tensor lies in which file. Untrusted: a file is a plain name beside it."""

from __future__ import annotations

import os

from wan_loader.errors import CheckpointError
from wan_loader.formats.checkpoint_facts import stat_file
from wan_loader.formats.foreign_files import stand_in
from wan_loader.formats.strict_json import parse_object

__all__ = ["read_index", "shards_of"]

_MAX_INDEX_BYTES = 100_000_000
_HEAD_BYTES = 512
#: The largest models have some hundred.
_MAX_SHARDS = 10_000


def read_index(path: str) -> dict[str, str]:
    """Return tensor name -> file name, as the index says.

    Raises:
        CheckpointError: It is anything else than an index.
    """
    file = stat_file(path)
    if file.nbytes > _MAX_INDEX_BYTES:
        raise CheckpointError.because(f"is larger than {_MAX_INDEX_BYTES} bytes: not a checkpoint index", path=path)
    with open(path, "rb") as f:
        content = f.read()
    if foreign := stand_in(content[:_HEAD_BYTES]):
        raise CheckpointError.because(*foreign, path=path)
    index = parse_object(content, path=path, what="the index")
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError.because("has no weight_map of tensor names to files: not a checkpoint index", path=path)
    return weight_map


def shards_of(path: str, weight_map: dict[str, str]) -> list[str]:
    """Return the names of an index's files, sorted.

    Raises:
        CheckpointError: A name leads out of the index's directory, or there are too many.
    """
    shards = sorted(set(weight_map.values()))
    if len(shards) > _MAX_SHARDS:
        raise CheckpointError.because(
            f"names {len(shards)} files, more than any checkpoint has: damaged or hostile", path=path
        )
    for shard in shards:
        # not printable: a line break in a name could forge a line of a log
        if os.path.basename(shard) != shard or shard in (".", "..", "") or not shard.isprintable():
            name = next(n for n, s in weight_map.items() if s == shard)
            raise CheckpointError(
                f"{path}: tensor {name!r} points to {shard!r}: not a plain file name, or outside its directory",
                path=path,
                tensor=name,
            )
    return shards
