"""The check that a load fits: into the device's memory, and into the host's, beside what else it needs. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from wan_loader.errors import DeviceMemoryError, HostMemoryError
from wan_loader.plan.engine_settings import conversion_bytes
from wan_loader.system.posix import PAGE

if TYPE_CHECKING:
    from wan_loader.plan.facts import Facts
    from wan_loader.plan.layout import Layout

__all__ = ["MIN_RING_BYTES", "check_host_memory", "check_memory", "rounded"]

#: The caching allocator rounds every tensor up to a multiple of this.
_CUDA_ALIGNMENT = 512
#: Host memory that a load takes beside weights and ring: what the libraries grow by when they are first used, ...
_GROWTH_BYTES = 28 << 20
#: ... stacks and heaps of one thread for each processor, and page tables.
_THREAD_BYTES = 512 << 10
_PAGE_TABLE_SHARE = 256
#: The pinned ring is never smaller than one slot of the largest kind, and its page.
MIN_RING_BYTES = (16 << 20) + PAGE


def check_memory(
    layout: Layout, facts: Facts, path: str, *, block_bytes: int, piecemeal: bool = False, beside: int = 0
) -> int | None:
    """Raise unless there is memory for everything that is copied, in blocks of `block_bytes`.

    Args:
        layout: The storages that are copied.
        facts: The machine.
        path: The checkpoint, for errors.
        block_bytes: The size of the blocks.
        piecemeal: Whoever takes what arrives may let it go before the rest is there: the largest must fit.
        beside: What is needed on the device beside what is copied.

    Returns:
        The bytes of the host's memory that are left for the pinned rings of all that load at the same time; None where
        that is unknown, or nothing is copied.

    Raises:
        DeviceMemoryError: The device has no room for the weights.
        HostMemoryError: The host has no room, for weights or for what a load takes beside them.
    """
    sizes = [max(layout.copied_nbytes, default=0)] if piecemeal else layout.copied_nbytes
    if facts.cuda:
        beside += conversion_bytes(layout.nbytes_converted, block_bytes)
        _check_device_memory(sum(map(rounded, sizes)) + beside, facts, path)
    if not any(byte_range.end > byte_range.start for byte_range in layout.byte_ranges):
        return None
    return check_host_memory(0 if facts.cuda else sum(sizes) + beside, facts, path)


def check_host_memory(nbytes: int, facts: Facts, path: str) -> int | None:
    """Raise `HostMemoryError` if weights of `nbytes` do not fit; else return what `check_memory` does."""
    free, sharers = facts.host_free, facts.n_sharers
    beside = _GROWTH_BYTES + facts.processors * _THREAD_BYTES + nbytes // _PAGE_TABLE_SHARE
    # all sharers draw on the same memory, and see the same amount free
    needed = (nbytes + beside + MIN_RING_BYTES) * sharers
    if free is not None and needed > free:
        raise HostMemoryError.because(
            f"needs {needed} bytes of memory, {(beside + MIN_RING_BYTES) * sharers} of them beside its "
            f"weights; {free} are available",
            "free some memory",
            path=path,
        )
    return None if free is None else free - (nbytes + beside) * sharers


def _check_device_memory(needed: int, facts: Facts, path: str) -> None:
    if facts.device_free is not None and needed > facts.device_free:
        raise DeviceMemoryError.because(
            f"needs {needed} bytes on {facts.device}, {facts.device_free} of {facts.device_total} are free",
            "ask for a smaller dtype or another device, or end what else runs there",
            path=path,
        )


def rounded(nbytes: int) -> int:
    """Return the bytes that a tensor of `nbytes` takes of a CUDA device."""
    return -(-nbytes // _CUDA_ALIGNMENT) * _CUDA_ALIGNMENT
