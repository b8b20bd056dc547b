"""Tensors whose bytes are in no file, moved by the engine all the same: this process's memory is read like a file.

`/proc/self/mem` shows the memory of a process, each byte at its address. So tensors in it are a checkpoint of one file,
and one load brings them to a device as it brings others: reads side by side into the pinned ring, which here are
copies, transfers out of it meanwhile, conversions on the device. That is what weights need which were modified, or
which come back from a GPU and go there again (offloading): a plain transfer out of memory that is not pinned keeps the
link idle most of the time.

Another thread that writes to a tensor meanwhile races with this as it does with a plain move.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING

from wan_loader.dtypes import ITEMSIZE, dtype_name
from wan_loader.errors import WanLoaderError
from wan_loader.provenance.proof import FileRange, Proof
from wan_loader.provenance.tensor_memory import TensorMemory, memory_of
from wan_loader.system.posix import OWN_MEMORY, PAGE

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from wan_loader.fastpath.tally import Tally
    from wan_loader.loading.result import LoadResult

__all__ = ["fetch_memory", "load_memory"]

#: All memory lies below.
_END = 1 << 62
#: So many copies side by side keep the link busy, and more would only wait for the interpreter.
_THREADS = 6


def fetch_memory(
    component: str,
    tensors: Mapping[str, torch.Tensor],
    ties: Mapping[str, str],
    device: torch.device,
    dtype: torch.dtype | None,
    *,
    min_nbytes: int,
    tally: Tally,
) -> dict[str, torch.Tensor]:
    """Bring tensors to a device by one load of their memory; without an error.

    Args:
        component: The name for the tally.
        tensors: The tensors, by names of the caller's choice; they must stay alive meanwhile.
        ties: Names of objects that have an earlier name, and that name.
        device: Where they go.
        dtype: What floating tensors become on the way; None: they stay as they are.
        min_nbytes: Less than this is left.
        tally: Is told what was moved, and why something was not.

    Returns:
        The tensors on the device, each with memory of its own, by their names; what is missing was left.
    """
    memories = _movable(tensors, device)
    nbytes = sum(memory.nbytes for name, memory in memories.items() if name not in ties)
    if not memories or nbytes < min_nbytes:
        return {}
    try:
        loaded = load_memory(memories, ties, device, dtype)
    except (WanLoaderError, OSError) as error:
        tally.leave_after(error)
        return {}
    tally.served(f"{component}, from memory", nbytes, loaded.seconds)
    return loaded.tensors


def _movable(tensors: Mapping[str, torch.Tensor], device: torch.device) -> dict[str, TensorMemory]:
    """Return which tensors a load makes what `.to` would make of them, and faster, with the memory of each.

    Not those whose elements lie apart, which a copy brings together, and not those in memory that is pinned: nothing is
    faster than a plain copy out of that.
    """
    found = {}
    for name, tensor in tensors.items():
        memory = memory_of(tensor)
        if not isinstance(memory, TensorMemory) or memory.nbytes != tensor.numel() * ITEMSIZE[memory.dtype]:
            continue
        if device.type != "cuda" or not tensor.is_pinned():
            found[name] = memory
    return found


def load_memory(
    memories: Mapping[str, TensorMemory],
    ties: Mapping[str, str],
    device: torch.device,
    dtype: torch.dtype | None,
) -> LoadResult:
    """Load the memory of tensors, by their names, as `fetch_memory` does.

    Raises:
        WanLoaderError: Something failed. Nothing stays allocated.
        OSError: The system does not show this process's memory.
    """
    # with all that they import: not before there is something to load
    from wan_loader.formats.checkpoint_facts import stat_file
    from wan_loader.loading.load_session import LoadSession
    from wan_loader.plan.dtype_policy import DtypePolicy
    from wan_loader.plan.request import LoadRequest
    from wan_loader.provenance.as_checkpoint import as_checkpoint
    from wan_loader.system.page_cache import Residency

    fd = os.open(OWN_MEMORY, os.O_RDONLY | os.O_CLOEXEC)
    try:  # as long as it is open, it is one file: its inode stays
        ranges = {name: FileRange(0, *memory) for name, memory in memories.items()}
        checkpoint = as_checkpoint(Proof((stat_file(OWN_MEMORY),), ranges, {}, ties))
        policy = DtypePolicy(None if dtype is None else dtype_name(dtype))
        request = LoadRequest(source=checkpoint, device=device, policy=policy, io="buffered", threads=_THREADS)
        with LoadSession(keeps_peaks=True) as session:
            plan = session.plan(request, session.open(request), residency=Residency(((0, 0, _END, _END),)))
            # between two tensors there may be pages that are not there: never read a whole page of what is not wanted
            plan = replace(plan, blocks=replace(plan.blocks, max_gap=PAGE - 1))
            return session.result(plan, session.run(plan))
    finally:
        os.close(fd)
