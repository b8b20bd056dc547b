"""Advice about a machine, from its facts and ceilings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from wan_loader.sizes import format_bytes, format_count

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = ["diagnose"]

MiB = 1 << 20


def diagnose(document: Mapping[str, Any]) -> list[dict[str, str]]:
    """Give advice with its evidence, from the facts that `doctor` collected."""
    limits, storage, ceilings = document["limits"], document["storage"], document["ceilings"]
    nbytes = document["files"]["nbytes"]
    checks = (
        _unused_gpu(document),
        _memory(limits, nbytes),
        _locking(limits, document["device"]),
        _disk(storage, ceilings),
        _cuda(document),
    )
    return [{"text": text, "evidence": evidence} for check in checks for text, evidence in check]


def _unused_gpu(document: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Say why GPUs that are there cannot be used."""
    gpus, machine = document["gpus"], document["machine"]
    if not gpus["here"] or not gpus["wanted"] or "gpu" in machine:
        return
    here, torch = format_count(gpus["here"], "NVIDIA GPU"), f"torch {machine['torch']}"
    if gpus["torch_cuda"] is None:
        text = "install a torch that is built with CUDA (pytorch.org says how): this one cannot use the GPU"
        yield text, f"{here} here, and {torch} is a build without CUDA"
    elif gpus["visible"] is not None:
        text = "unset CUDA_VISIBLE_DEVICES, if the GPU is to be used"
        yield text, f"{here} here, and it is set to {gpus['visible']!r}"
    else:
        text = "look at what `nvidia-smi` says: the driver may be missing, or older than torch needs"
        yield text, f"{here} here, and {torch}, built with CUDA {gpus['torch_cuda']}, finds none"


def _memory(limits: Mapping[str, Any], nbytes: int) -> Iterator[tuple[str, str]]:
    free, allowed = limits["memory_available_bytes"], limits["memory_limit_bytes"]
    if nbytes > allowed:
        text = f"{format_bytes(nbytes)} of weights, {format_bytes(allowed)} of memory allowed"
        yield "the files never fit into the page cache: every start reads them from the disk", text
    elif free is not None and nbytes > free:
        text = f"{format_bytes(nbytes)} of weights, {format_bytes(free)} of memory free"
        yield "end what else uses the memory, or the page cache cannot keep the files", text
    if limits.get("transparent_huge_pages") == "never":
        yield (
            "set /sys/kernel/mm/transparent_hugepage/enabled to madvise: the pinned ring is made faster",
            "it is set to never",
        )


def _locking(limits: Mapping[str, Any], device: str) -> Iterator[tuple[str, str]]:
    memlock = limits.get("memlock_bytes")
    if device.startswith("cuda") and memlock is not None and memlock < 64 * MiB:
        yield "raise the memlock limit (ulimit -l unlimited) if pinning is refused", f"it is {format_bytes(memlock)}"


def _disk(storage: Mapping[str, Any], ceilings: Mapping[str, float]) -> Iterator[tuple[str, str]]:
    rate = ceilings.get("disk_gbps")
    if storage.get("network"):
        yield "keep a copy of the files on a local disk", f"they lie on {storage['filesystem']}"
    elif storage.get("rotational") and rate and rate < 0.5:
        yield "keep the files on an NVMe drive", f"the disk rotates, and reads {rate:.2f} GB/s"
    elif rate and rate < 1.0:
        yield (
            "keep the files on a faster disk, or in the page cache (wan_loader.prewarm reads them ahead)",
            f"this one reads {rate:.2f} GB/s",
        )


def _cuda(document: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    ceilings = document["ceilings"]
    pinned = ceilings.get("h2d_pinned_gbps")
    if pinned and pinned < 10:
        yield "check the GPU's slot: PCIe runs slower than 3.0 x16", f"pinned copies reach {pinned:.1f} GB/s"
    if (seconds := ceilings.get("import_torch_s")) and seconds > 6:
        yield "keep the Python environment on a local disk", f"import torch takes {seconds:.1f} s"
