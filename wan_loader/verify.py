"""Compares loaded tensors with what safetensors and torch read, bit for bit. Independent of the loader on purpose."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from wan_loader.errors import CheckpointError
from wan_loader.formats import open_checkpoint
from wan_loader.formats.parts import choose_part

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import torch

    from wan_loader.formats import Checkpoint
    from wan_loader.types import StrPath

__all__ = ["reference_tensors", "same_bits", "verify"]


def verify(path: StrPath, tensors: Mapping[str, torch.Tensor], *, part: str | None = None) -> int:
    """Read a checkpoint, or one part of it, again with its own library; raise `CheckpointError` if anything differs.

    Tensors that were converted are compared with `.to(dtype)` of the reference on the same device. Holds one reference
    tensor at a time. Returns how many tensors were compared.
    """
    checkpoint = open_checkpoint(path, part=part)
    names = set(tensors)
    for name, expected in reference_tensors(checkpoint):
        if name not in tensors:
            continue
        actual = tensors[name]
        if not same_bits(actual, expected.to(actual.device).to(actual.dtype)):
            raise CheckpointError(f"{path}: tensor {name!r} differs from what the file holds: please report this")
        names.discard(name)
    if names:
        raise CheckpointError(f"{path}: {len(names)} loaded tensors are not in the file, such as {min(names)!r}")
    return len(tensors)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Same dtype, shape and bits; NaNs and signed zeros included."""
    import torch

    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(_bits(a), _bits(b))


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    import torch

    whole = tensor.detach().resolve_conj().resolve_neg().contiguous()
    # One element may have any stride and still be contiguous, but it could not be viewed as bytes.
    return whole.as_strided((whole.numel(),), (1,)).view(torch.uint8)


def reference_tensors(checkpoint: Checkpoint) -> Iterator[tuple[str, Any]]:
    """Names and tensors on the CPU, as safetensors or torch itself reads them; one at a time from safetensors."""
    for file in checkpoint.files:
        if checkpoint.format == "safetensors":
            from safetensors import safe_open

            with safe_open(file.path, framework="pt", device="cpu") as opened:
                for name in opened.keys():  # noqa: SIM118 - not a dict
                    yield name, opened.get_tensor(name)
        else:
            import torch

            mmap = checkpoint.format == "torch-zip"
            state = torch.load(file.path, map_location="cpu", weights_only=True, mmap=mmap)
            yield from choose_part(state, checkpoint.part, path=file.path, is_tensor=torch.is_tensor).items()
