"""Kept weights that are mapped into this process, by their identity, or by the bytes of files that tensors are."""

from __future__ import annotations

import os
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from wan_loader.errors import DeviceError, DeviceMemoryError, KeepError
from wan_loader.keeper.client import find_keeper
from wan_loader.keeper.identity import file_mark, shared_memory_of
from wan_loader.keeper.messages import close_all
from wan_loader.keeper.shelf import Identity
from wan_loader.keeper.table import KeptTable, Origin, read_table

if TYPE_CHECKING:
    from collections.abc import Collection

    import torch

    from wan_loader.devices.shared_memory import SharedMemory, SharedRange
    from wan_loader.formats.checkpoint_facts import Checkpoint
    from wan_loader.plan.dtype_policy import DtypePolicy

__all__ = ["ATTACH_ERRORS", "Attached", "attach", "attach_ranges"]

#: What may come of a keeper, or of a driver, that does not do what it should: the files are there.
ATTACH_ERRORS = (KeepError, DeviceError, DeviceMemoryError, OSError)


class Attached(NamedTuple):
    """Kept weights that are mapped here."""

    table: KeptTable
    memory: SharedRange


def attach(identity: Identity, memory: SharedMemory) -> Attached | str:
    """Map kept weights; or say why they are not there. Raises `ATTACH_ERRORS`."""
    keeper = find_keeper()
    if keeper is None:
        return "there is no keeper"
    with keeper:
        answer = keeper.attach(identity)
        if isinstance(answer, str):
            return answer
        sizes, fds = answer
        try:
            table = read_table(fds[0])
            table.check(sum(sizes))
            mapped = memory.attach(fds[1:], sizes)
        finally:
            close_all(fds)
        # as long as any tensor is there, the keeper knows that we use them
        mapped.on_close(partial(os.close, keeper.lease()))
    return Attached(table, mapped)


def attach_ranges(checkpoint: Checkpoint, policy: DtypePolicy, device: torch.device) -> dict[str, torch.Tensor]:
    """Take what is kept of the tensors of a checkpoint, whichever they are and whatever they are called.

    A tensor is kept if the same bytes of the same file were kept as the same dtype. Whatever is wrong with the keeper,
    nothing is.

    Args:
        checkpoint: Tensors as ranges of files, as they were proven.
        policy: The dtypes that they get.
        device: Where they are to be.

    Returns:
        Tensors by their names in the checkpoint, each an object of its own, on memory that others use, too.
    """
    marks = [file_mark(file) for file in checkpoint.files]
    found: dict[str, torch.Tensor] = {}
    try:
        memory = shared_memory_of(device)
        for identity in _kept_of(marks, memory.name):
            if not isinstance(attached := attach(identity, memory), str):
                found |= _matching(checkpoint, policy, marks, attached, found.keys())
    except ATTACH_ERRORS:
        return found
    return found


def _kept_of(marks: list[str], device: str) -> list[Identity]:
    keeper = find_keeper()
    if keeper is None:
        return []
    with keeper:
        return [Identity(*one) for one in keeper.ask("find", device=device, files=marks)[0]["items"]]


def _matching(
    checkpoint: Checkpoint, policy: DtypePolicy, marks: list[str], attached: Attached, known: Collection[str]
) -> dict[str, torch.Tensor]:
    """Return those tensors of a checkpoint that are among what is attached, without those that are known."""
    table, memory = attached
    kept = {
        (table.files[one.origin.file], one.origin[1:], one.dtype, one.shape, one.stride): one.name
        for one in table.tensors
        if one.origin is not None
    }
    names = dict[str, str]()
    for facts in checkpoint.tensors:
        place = checkpoint.storages[facts.storage]
        origin = Origin(place.file, place.start, place.nbytes, facts.dtype)
        target = policy.target(facts.name, facts.dtype)
        name = kept.get((marks[place.file], origin[1:], target, facts.shape, facts.stride))
        if name is not None and facts.name not in known and not facts.offset:
            names[facts.name] = name
    tensors = table.tensors_on(memory, dict.fromkeys(names.values()))
    return {name: tensors[kept_name].detach() for name, kept_name in names.items()}
