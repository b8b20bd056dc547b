"""What tells kept weights apart, and the memory of a device that they are kept in."""

from __future__ import annotations

import hashlib
import os
from typing import TYPE_CHECKING

from wan_loader.cache.outline import outline_checkpoint
from wan_loader.devices.shared_memory import HostSharedMemory
from wan_loader.keeper.shelf import Identity

if TYPE_CHECKING:
    import torch

    from wan_loader.devices.shared_memory import SharedMemory
    from wan_loader.formats import Checkpoint
    from wan_loader.formats.checkpoint_facts import FileFacts
    from wan_loader.plan.dtype_policy import DtypePolicy

__all__ = ["file_mark", "identify", "shared_memory_of"]


def shared_memory_of(device: torch.device) -> SharedMemory:
    """Return the shared memory of a device; `DeviceError` if it has none."""
    if device.type == "cpu":
        return HostSharedMemory()
    from wan_loader.devices.shared_cuda import CudaSharedMemory

    return CudaSharedMemory(device.index)


def file_mark(file: FileFacts) -> str:
    """Return a short text that is another one for every other file, and for every other state of this one."""
    facts = (file.device, file.inode, file.nbytes, file.mtime_ns, file.ctime_ns)
    return hashlib.blake2b(repr(facts).encode(), digest_size=10).hexdigest()


def identify(checkpoint: Checkpoint, policy: DtypePolicy, device: str) -> Identity:
    """Return what weights are kept under: the key of the converted cache, and the device. One stat a file."""
    outline = outline_checkpoint(checkpoint, policy)
    words = policy.dtype or "in the file"
    if policy.keep_fp32:
        words += f", float32 for {', '.join(policy.keep_fp32)}"
    label = os.path.abspath(checkpoint.path) + (f", part {checkpoint.part}" if checkpoint.part is not None else "")
    return Identity(outline.key(outline.sources), device, label, words)
