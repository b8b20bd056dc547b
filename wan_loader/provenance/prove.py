"""The proof of where tensors come from: torch, the mappings, the files and the pages are asked, in that order.

What the system does not say is not proven.
"""

from __future__ import annotations

from contextlib import suppress
from operator import attrgetter
from typing import TYPE_CHECKING, NamedTuple

from wan_loader.provenance.mapped_files import MappedFiles
from wan_loader.provenance.proof import FileRange, Proof, Reason, pages_to_compare
from wan_loader.provenance.tensor_memory import memory_of
from wan_loader.system.interpreter import paused_gc
from wan_loader.system.mappings import read_mappings
from wan_loader.system.own_pages import PAGE, read_memory, written_pages

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from wan_loader.formats.checkpoint_facts import FileFacts
    from wan_loader.provenance.tensor_memory import TensorMemory
    from wan_loader.system.mappings import MappingTable

__all__ = ["prove"]


class _Place(NamedTuple):
    """A tensor in a file that was identified."""

    memory: TensorMemory
    file: FileFacts
    start: int
    """The byte of the file at the tensor's first element."""


def prove(tensors: Mapping[str, torch.Tensor]) -> Proof:
    """Prove for each tensor which bytes of which file it is, or say why that is open. Nothing is changed.

    A proven tensor is bit for bit that range of the file, as long as neither is written. Whoever reads the file instead
    must see to that: `FileFacts` tell of the file, a second and equal proof tells of the tensors. On a network file
    system the file is what this machine has seen of it.

    Costs about 9 microseconds a tensor, and 9 milliseconds for each gigabyte that was touched. No page of the tensors
    is read, but for at most two each that are shared with something else that was written.

    Args:
        tensors: Tensors by the names that they will have in the checkpoint.
    """
    ties, first_names = dict[str, str](), dict[int, str]()
    for name, tensor in tensors.items():
        if (first := first_names.setdefault(id(tensor), name)) != name:
            ties[name] = first
    with paused_gc():
        judged = _prove({name: tensors[name] for name in first_names.values()})
    files = {place.file: None for place in judged.values() if isinstance(place, _Place)}
    numbers = {file: number for number, file in enumerate(files)}
    ranges, reasons = dict[str, FileRange](), dict[str, Reason]()
    for name in tensors:
        place = judged[ties.get(name, name)]
        if isinstance(place, Reason):
            reasons[name] = place
        else:
            _, nbytes, dtype, shape, stride = place.memory
            ranges[name] = FileRange(numbers[place.file], place.start, nbytes, dtype, shape, stride)
    return Proof(tuple(files), ranges, reasons, ties)


def _prove(tensors: Mapping[str, torch.Tensor]) -> dict[str, _Place | Reason]:
    """Return for each tensor its proven place, or the reason why there is none."""
    try:
        mappings = read_mappings()
    except OSError:
        return dict.fromkeys(tensors, Reason.UNSURE_PAGES)
    with MappedFiles() as files:
        # the files first: what changes in them from here on shows in their facts
        placed = {name: _place(memory_of(tensor), mappings, files) for name, tensor in tensors.items()}
        places = {name: place for name, place in placed.items() if isinstance(place, _Place)}
        try:
            written = written_pages((place.memory.address, place.memory.end) for place in places.values())
        except OSError:
            return placed | dict.fromkeys(places, Reason.UNSURE_PAGES)
        for name, place in places.items():
            if not _is_unwritten(place, written, files):
                placed[name] = Reason.WRITTEN
        _doubt(placed, files)
    return placed


def _place(memory: TensorMemory | Reason, mappings: MappingTable, files: MappedFiles) -> _Place | Reason:
    """Find the file that shows at a tensor's addresses, whether or not it was written to there."""
    if isinstance(memory, Reason):
        return memory
    mapping = mappings.find(memory.address, memory.end)
    if mapping is None:
        return Reason.NO_FILE
    if not mapping.private:
        return Reason.SHARED
    if not mapping.readable:
        return Reason.NOT_READABLE
    file = files.identify(mapping)
    if isinstance(file, Reason):
        return file
    start = memory.address - mapping.start + mapping.offset
    return Reason.TRUNCATED if start + memory.nbytes > file.nbytes else _Place(memory, file, start)


def _is_unwritten(place: _Place, written: list[tuple[int, int]], files: MappedFiles) -> bool:
    """Say whether a tensor is its file's bytes still; pages that it shares with something written are compared."""
    start, end = place.memory.address, place.memory.end
    pages = pages_to_compare(start, end, written, PAGE)
    return pages is not None and all(_is_equal(place, max(page, start), min(page + PAGE, end), files) for page in pages)


def _is_equal(place: _Place, start: int, end: int, files: MappedFiles) -> bool:
    """Compare the memory at addresses `start` to `end`, which lie in a tensor, with the file."""
    position = place.start + start - place.memory.address
    with suppress(OSError):
        return read_memory(start, end - start) == files.read(place.file.path, position, end - start)
    return False


def _doubt(placed: dict[str, _Place | Reason], files: MappedFiles) -> None:
    """Take back what was found in files that are others than the mapped ones, where the system does not tell."""
    unsure: dict[str, dict[str, _Place]] = {}
    for name, place in placed.items():
        if isinstance(place, _Place) and not files.is_sure(place.file.path):
            unsure.setdefault(place.file.path, {})[name] = place
    for places in unsure.values():
        if not _looks_alike(sorted(places.values(), key=attrgetter("start")), files):
            placed |= dict.fromkeys(places, Reason.REPLACED)


def _looks_alike(places: list[_Place], files: MappedFiles) -> bool:
    """Compare some bytes of a file with tensors in it: where they begin, where they end, and halfway."""
    first, middle, last = places[0], places[len(places) // 2], places[-1]
    spots = [
        (first, first.memory.address),
        (middle, middle.memory.address + middle.memory.nbytes // 2),
        (last, max(last.memory.address, last.memory.end - PAGE)),
    ]
    return all(_is_equal(place, start, min(start + PAGE, place.memory.end), files) for place, start in spots)
