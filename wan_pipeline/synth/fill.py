"""Random values at the speed of a disk: made once, then read again and again from different places.

One pool of normally distributed values is made for each checkpoint; a tensor is a window of it, turned round at its
end, beginning where a hash of the seed and of the tensor's name says. So a value depends on nothing but these two and
the architecture: not on the layout, the file, the order, or which parts are written. In another dtype the same window
holds the same values, rounded: a bf16 checkpoint is exactly the fp32 one after `.to(torch.bfloat16)`.

Good enough for loading and for comparing pipelines; of no use as an initialisation for training.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

from wan_pipeline.synth.synth_tensors import ITEMSIZE

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import torch

    from wan_pipeline.synth.arch import Arch, DType
    from wan_pipeline.synth.synth_tensors import SynthTensor

__all__ = ["Pool"]

_BUFFER_NBYTES = 8 << 20


class Pool:
    """The values of one checkpoint; immutable once made, so threads may share it."""

    def __init__(self, arch: Arch, seed: int, dtypes: Iterable[DType]) -> None:
        import torch

        self._seed = seed
        self._numel = arch.pool_elements
        generator = torch.Generator().manual_seed(seed)
        self._values = torch.randn(self._numel, generator=generator).mul_(arch.std)
        self._views = {dtype: _bytes_in(self._values, dtype) for dtype in dtypes}

    def data(self, tensor: SynthTensor) -> Iterator[memoryview]:
        """Yield the bytes of a tensor in buffers of a few MB; views of the pool, nothing is copied."""
        start = self._start(tensor)
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

    def _start(self, tensor: SynthTensor) -> int:
        digest = hashlib.blake2b(f"{self._seed}/{tensor.seed_name}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") % self._numel

    def _scale(self, tensor: SynthTensor, start: int) -> memoryview:
        values = self._values.roll(-start) if start + tensor.numel > self._numel else self._values[start:]
        return _bytes_in(1 + values[: tensor.numel], tensor.dtype)


def _bytes_in(values: torch.Tensor, dtype: DType) -> memoryview:
    import torch

    target = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    array: Any = values.to(target).contiguous().view(torch.uint8).numpy()
    return memoryview(array).toreadonly()
