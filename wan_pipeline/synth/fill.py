"""Random values at the speed of a disk: made once, then read again and again from different places.

One pool of normally distributed values is made for each checkpoint; a tensor is a window of it, turned round at its
end, beginning where a hash of the seed and of the tensor's name says. So a value depends on nothing but these two and
the architecture: not on the layout, the file, the order, or which parts are written. In another dtype the same window
holds the same values, rounded: a bf16 checkpoint is exactly the fp32 one after `.to(torch.bfloat16)`.

Quantised tensors hold the same values, too, rounded as their kind does: "fp8" divided by one scale (`fp8_scale`), of
which ComfyUI's files have one for each tensor, and "q8_0" in blocks of 32.

Good enough for loading and for comparing pipelines; of no use as an initialisation for training.
"""

from __future__ import annotations

import hashlib
import struct
from typing import TYPE_CHECKING, Any

from wan_pipeline.synth.synth_tensors import ITEMSIZE

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import torch

    from wan_pipeline.synth.arch import Arch, Stored
    from wan_pipeline.synth.synth_tensors import SynthTensor

__all__ = ["Pool", "fp8_scale"]

_BUFFER_NBYTES = 8 << 20
_BUFFER_BLOCKS = 1 << 15
#: So many times the standard deviation is 1.0 in eight bits: the largest values are far from the end of their range.
_FP8_STEPS = 32


def fp8_scale(arch: Arch) -> float:
    """Return what eight-bit floats are multiplied by to give the values of a checkpoint; exact in float32."""
    return struct.unpack("<f", struct.pack("<f", arch.std / _FP8_STEPS))[0]  # type: ignore[no-any-return]


class Pool:
    """The values of one checkpoint; immutable once made, so threads may share it."""

    def __init__(self, arch: Arch, seed: int, dtypes: Iterable[Stored]) -> None:
        import torch

        self._seed = seed
        self._numel = arch.pool_elements
        generator = torch.Generator().manual_seed(seed)
        self._values = torch.randn(self._numel, generator=generator).mul_(arch.std)
        scaled = {"fp8": self._values / fp8_scale(arch)} if "fp8" in (wanted := set(dtypes)) else {}
        self._views = {d: _bytes_in(scaled.get(d, self._values), d) for d in wanted - {"q8_0", "uint8"}}

    def data(self, tensor: SynthTensor) -> Iterator[memoryview]:
        """Yield the bytes of a tensor in buffers of a few MB; views of the pool, nothing is copied."""
        if tensor.content is not None:
            yield memoryview(tensor.content)
            return
        start = self._start(tensor)
        if tensor.dtype == "q8_0":
            yield from self._blocks(tensor, start)
            return
        if tensor.is_scale:
            yield self._scale(tensor, start)
            return
        pool, itemsize, left = self._views[tensor.dtype], ITEMSIZE[tensor.dtype], tensor.nbytes
        start *= itemsize
        while left:
            # up to the end of the pool; the next buffer begins at its front
            length = min(left, _BUFFER_NBYTES, pool.nbytes - start)
            yield pool[start : start + length]
            left -= length
            start = (start + length) % pool.nbytes

    def _blocks(self, tensor: SynthTensor, start: int) -> Iterator[memoryview]:
        """Yield the blocks of a tensor, made some at a time."""
        import torch

        for first in range(0, tensor.numel, _BUFFER_BLOCKS * 32):
            count = min(_BUFFER_BLOCKS * 32, tensor.numel - first)
            places = torch.arange(start + first, start + first + count) % self._numel
            yield _q8_0(self._values[places])

    def _start(self, tensor: SynthTensor) -> int:
        digest = hashlib.blake2b(f"{self._seed}/{tensor.seed_name}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") % self._numel

    def _scale(self, tensor: SynthTensor, start: int) -> memoryview:
        values = self._values.roll(-start) if start + tensor.numel > self._numel else self._values[start:]
        return _bytes_in(1 + values[: tensor.numel], tensor.dtype)


def _q8_0(values: torch.Tensor) -> memoryview:
    """Return blocks of 32 values: the largest is 127 times a scale in float16, and each is a number of such scales."""
    import torch

    groups = values.view(-1, 32)
    scale = groups.abs().amax(1, keepdim=True) / 127
    codes = (groups / scale.clamp(min=1e-30)).round().clamp(-127, 127).to(torch.int8)
    blocks: Any = torch.cat([scale.half().view(torch.uint8), codes.view(torch.uint8)], dim=1).contiguous().numpy()
    return memoryview(blocks.reshape(-1)).toreadonly()


def _bytes_in(values: torch.Tensor, dtype: Stored) -> memoryview:
    import torch

    of = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.float8_e4m3fn}
    target = of[dtype]
    array: Any = values.to(target).contiguous().view(torch.uint8).numpy()
    return memoryview(array).toreadonly()
