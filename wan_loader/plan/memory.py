"""Whether a load fits: into the device's memory, and into the host's, with what it needs beside the weights. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from wan_loader.errors import DeviceMemoryError, HostMemoryError
from wan_loader.system.posix import PAGE

if TYPE_CHECKING:
    from wan_loader.plan.facts import Facts
    from wan_loader.plan.layout import Layout

__all__ = ["MIN_RING_BYTES", "check_host_memory", "check_memory", "rounded"]

#: The caching allocator rounds every tensor up to a multiple of this.
_CUDA_ALIGNMENT = 512
#: Host memory that a load takes beside weights and staging: what the libraries grow by when they are first used, ...
_GROWTH_BYTES = 28 << 20
#: ... stacks and heaps of one thread for each processor, and page tables.
_THREAD_BYTES = 512 << 10
_PAGE_TABLE_SHARE = 256
#: Staging is never smaller than one slot of the largest kind, and its page.
MIN_RING_BYTES = (16 << 20) + PAGE


def check_memory(layout: Layout, facts: Facts, path: str) -> int | None:
    """Raise `DeviceMemoryError` or `HostMemoryError` if what is copied cannot fit.

    Returns how many bytes of the host's memory are left for the staging of all that load at the same time; None where
    that is unknown, or nothing is copied.
    """
    if facts.cuda:
        _check_device_memory(layout, facts, path)
    if not any(byte_range.end > byte_range.start for byte_range in layout.byte_ranges):
        return None
    return check_host_memory(0 if facts.cuda else sum(layout.copied_nbytes), facts, path)


def check_host_memory(nbytes: int, facts: Facts, path: str) -> int | None:
    """Raise `HostMemoryError` if weights of `nbytes` do not fit; else as `check_memory`."""
    free, sharers = facts.host_free, facts.n_sharers
    beside = _GROWTH_BYTES + facts.processors * _THREAD_BYTES + nbytes // _PAGE_TABLE_SHARE
    needed = (nbytes + beside + MIN_RING_BYTES) * sharers
    if free is not None and needed > free:
        raise HostMemoryError(
            f"{path} needs {needed} bytes of memory, {(beside + MIN_RING_BYTES) * sharers} of them beside its "
            f"weights; {free} are available: free some memory"
        )
    return None if free is None else free - (nbytes + beside) * sharers


def _check_device_memory(layout: Layout, facts: Facts, path: str) -> None:
    needed = sum(map(rounded, layout.copied_nbytes))
    if facts.device_free is not None and needed > facts.device_free:
        raise DeviceMemoryError(
            f"{path} needs {needed} bytes on {facts.device}, {facts.device_free} of {facts.device_total} are free: "
            "ask for a smaller dtype or another device, or end what else runs there"
        )


def rounded(nbytes: int) -> int:
    """Return the bytes that a tensor of `nbytes` takes of a CUDA device."""
    return -(-nbytes // _CUDA_ALIGNMENT) * _CUDA_ALIGNMENT
