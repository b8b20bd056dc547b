"""Zip files of torch.save as the seam of `torch.load` needs them: what is in them, and where."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Any

from wan_loader.fastpath.libraries.left_alone import LeftAloneError
from wan_loader.formats.foreign_files import read_head
from wan_loader.formats.known_formats import recognise_format
from wan_loader.formats.torch_formats import TorchZipFormat
from wan_loader.formats.torch_zip import UnplannedError, read_torch_zip
from wan_loader.system.page_cache import cached
from wan_loader.warming.tree import SourceFile
from wan_loader.warming.warm import warm

if TYPE_CHECKING:
    from collections.abc import Callable

    from wan_loader.formats.checkpoint_facts import StorageFacts
    from wan_loader.system.leases import LeasedFile

__all__ = ["check_aligned", "check_planned", "fetch_pages", "skeleton_of"]


def check_planned(path: str) -> list[StorageFacts]:
    """Return the storages of a file.

    Raises:
        LeftAloneError: It is not one that is read from headers.
        CheckpointError: It is damaged.
    """
    if not isinstance(recognise_format(read_head(path)), TorchZipFormat):
        raise LeftAloneError("a legacy pickle")
    try:
        return read_torch_zip(path)[1]
    except UnplannedError as reason:
        raise LeftAloneError(f"a file that cannot be planned ({reason})") from reason


def check_aligned(path: str, alignment: int) -> None:
    """Check that all storages of a file begin at whole multiples of `alignment`.

    Raises:
        LeftAloneError: They do not, or it is not one that is read from headers.
        CheckpointError: It is damaged.
    """
    if any(storage.start % alignment for storage in check_planned(path) if storage.nbytes):
        raise LeftAloneError("the file's storages are not aligned")


def fetch_pages(path: str, file: LeasedFile) -> None:
    """Bring what is missing into the page cache: the original would read all now, and a writer must not wait long.

    Raises:
        HostMemoryError: There is no room for it.
    """
    facts = file.facts
    if cached(file.fd, 0, facts.st_size) != facts.st_size:
        warm([SourceFile(path, path, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns)])


def skeleton_of(original: Callable[..., Any], path: str) -> Any:
    """Return the result of torch.load without the weights: the container's own type and all it carries.

    Raises:
        LeftAloneError: It is something else than a dict of plain tensors.
    """
    import torch

    try:
        # meta and mapped: nothing of the weights is read, and torch itself judges the pickle
        state = original(path, map_location="meta", weights_only=True, mmap=True)
    except Exception as error:  # the original will say it again
        raise LeftAloneError("the original refuses the file") from error
    if type(state) not in (dict, OrderedDict):
        raise LeftAloneError("something else than a dict")
    if any(type(t) is not torch.Tensor or t.requires_grad for t in state.values()):
        raise LeftAloneError("a dict that holds more than plain tensors")
    if not _carries_only_versions(state):
        raise LeftAloneError("a dict with attributes of its own")
    return state


def _carries_only_versions(state: Any) -> bool:
    """Say whether a dict's only attribute is what `state_dict` notes: others may hold tensors, here without weights."""
    attributes = getattr(state, "__dict__", {})
    notes = attributes.get("_metadata", {})
    return attributes.keys() <= {"_metadata"} and all(
        isinstance(note, dict) and all(isinstance(value, int | float | str | None) for value in note.values())
        for note in (notes.values() if isinstance(notes, dict) else [None])
    )
