"""Comparison of loaded tensors with what safetensors and torch read, bit for bit; independent of the loader."""

from __future__ import annotations

import os
import tempfile
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from wan_loader.devices.dequantise import apply_scale, dequantise
from wan_loader.errors import CheckpointError
from wan_loader.formats import Checkpoint, open_checkpoint
from wan_loader.formats.known_formats import format_of
from wan_loader.formats.quantised import with_values

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

    import torch

    from wan_loader.formats.checkpoint_facts import Quantised
    from wan_loader.types import StrPath

__all__ = ["reference_tensors", "same_bits", "verify"]

#: Elements that are converted at once for a comparison.
_BATCH = 4 << 20


def verify(source: StrPath | Checkpoint, tensors: Mapping[str, torch.Tensor], *, part: str | None = None) -> int:
    """Read a checkpoint, or one part of it, again with its own library, and compare it with tensors that were loaded.

    Tensors that were converted are compared with `.to(dtype)` of the reference on the same device, numbers that were
    made of quantised ones with what is made of the reference on the CPU. Holds one reference tensor at a time.

    Args:
        source: The checkpoint, or its path.
        tensors: The loaded tensors; those of the checkpoint that are not among them are not compared.
        part: The part that was loaded, as for `open_checkpoint`.

    Returns:
        How many tensors were compared.

    Raises:
        CheckpointError: Anything differs.
    """
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source, part=part)
    path = checkpoint.path
    names = set(tensors)
    quantised = with_values(checkpoint).quantised
    scales = _scales(checkpoint, quantised)
    for name, expected in reference_tensors(checkpoint):
        if name not in tensors:
            continue
        actual = tensors[name]
        if not (_is_made_of(actual, expected, quantised.get(name), scales) or _is_converted(actual, expected)):
            raise CheckpointError(
                f"{path}: tensor {name!r} differs from what the file holds: please report this", path=path, tensor=name
            )
        names.discard(name)
    if names:
        raise CheckpointError(
            f"{path}: {len(names)} loaded tensors are not in the file, such as {min(names)!r}", path=path
        )
    return len(tensors)


def _scales(checkpoint: Checkpoint, quantised: Mapping[str, Quantised]) -> dict[str, torch.Tensor]:
    """Read the scales of quantised tensors."""
    names = {one.scale.name for one in quantised.values() if one.scale is not None}
    return dict(reference_tensors(checkpoint, names)) if names else {}


def _is_made_of(
    actual: torch.Tensor, raw: torch.Tensor, quantised: Quantised | None, scales: Mapping[str, torch.Tensor]
) -> bool:
    """Say whether a tensor holds the numbers of a quantised one."""
    if quantised is None or quantised.problem is not None or tuple(actual.shape) != quantised.value.shape:
        return False
    dtype = str(actual.dtype).removeprefix("torch.")
    if quantised.scale is None:
        expected = dequantise(raw, quantised.kind, quantised.value.shape, dtype)
    else:
        expected = apply_scale(raw, scales[quantised.scale.name], dtype)
    return same_bits(actual.cpu(), expected)


def _is_converted(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    """Say whether a tensor is another one, converted; in batches, since the conversion takes memory beside both."""
    if actual.shape != expected.shape or actual.dtype == expected.dtype or actual.numel() <= _BATCH:
        return same_bits(actual, expected.to(actual.device).to(actual.dtype))
    batches = zip(actual.reshape(-1).split(_BATCH), expected.reshape(-1).split(_BATCH), strict=True)
    return all(same_bits(a, e.to(a.device).to(a.dtype)) for a, e in batches)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Compare dtype, shape and bits; NaNs and signed zeros included."""
    import torch

    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(_bits(a), _bits(b))


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    import torch

    whole = tensor.detach().resolve_conj().resolve_neg().contiguous()
    # One element may have any stride and still be contiguous, but it could not be viewed as bytes.
    return whole.as_strided((whole.numel(),), (1,)).view(torch.uint8)


def reference_tensors(checkpoint: Checkpoint, only: Collection[str] | None = None) -> Iterator[tuple[str, Any]]:
    """Yield names and tensors on the CPU, as safetensors or torch itself reads them; one at a time from safetensors.

    Args:
        checkpoint: The checkpoint.
        only: The names that are wanted; None: all.
    """
    for number, file in enumerate(checkpoint.files):
        names = [name for name in checkpoint.names_in(number) if only is None or name in only]
        with _encodable(file.path) as path:
            yield from format_of(checkpoint).reference_tensors(path, names, checkpoint.part)


@contextmanager
def _encodable(path: str) -> Iterator[str]:
    """Yield a path that these libraries take, which refuse a file's name that is not UTF-8: if so, a link elsewhere."""
    try:
        path.encode()
    except UnicodeEncodeError:
        with tempfile.TemporaryDirectory(prefix="wan-loader-") as temporary:
            link = os.path.join(temporary, "file")
            os.symlink(os.path.abspath(path), link)
            yield link
    else:
        yield path
