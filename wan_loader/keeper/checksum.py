"""Checksums of kept weights, computed on their device: whether somebody has written to what all share."""

from __future__ import annotations

import ctypes
import hashlib
from typing import TYPE_CHECKING

from wan_loader.cache.loaded_tensors import fingerprint
from wan_loader.keeper.table import padded

if TYPE_CHECKING:
    from wan_loader.devices.shared_memory import SharedRange

__all__ = ["checksum"]


def checksum(memory: SharedRange, start: int, nbytes: int) -> str:
    """Return the checksum of a storage, with the padding behind it: one pass over the memory of its device."""
    import torch

    words = memory.tensor(start, padded(nbytes)).view(torch.int64)
    digest = hashlib.blake2b(digest_size=16)
    sums = torch.cat(fingerprint(words)).cpu() if words.numel() else words.cpu()
    digest.update(ctypes.string_at(sums.data_ptr(), sums.nbytes))
    return digest.hexdigest()
