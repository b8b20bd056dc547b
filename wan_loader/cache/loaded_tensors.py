"""Weights for an entry: from tensors that were just loaded, if they still are what they were, else from the source.

Loaded tensors belong to the caller, who may free or change them while the entry is being written. So the writer holds
only weak references, and a fingerprint of every segment that was taken before the tensors were handed out: sums over
64-bit words, one for each residue of a word's position modulo two primes, which changed or moved elements do not leave
as they were. (With one prime, two rows of an embedding whose distance is a multiple of it could change places.) A
segment that is gone or changed is read from the source again. Fingerprints cost one pass over the memory.
"""

from __future__ import annotations

import math
import weakref
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from wan_loader.dtypes import ITEMSIZE, torch_dtype

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    import torch

    from wan_loader.cache.outline import CachedFile, CachedTensor

__all__ = [
    "SEGMENT_BYTES",
    "LoadedTensors",
    "ReadSegments",
    "TensorSegment",
    "batches",
    "fingerprint",
    "prepare_fingerprints",
    "segments_of",
]

#: Unit of reading and writing: large enough for any disk; two are in memory at a time.
SEGMENT_BYTES = 64 << 20
_WORD = 8
_PRIMES = (509, 1021)
#: Smaller tensors are read from the source: not worth a fingerprint.
_MIN_NBYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class TensorSegment:
    """Elements `start` to `start + count` of one tensor of an entry."""

    tensor: CachedTensor
    start: int
    count: int

    @property
    def nbytes(self) -> int:
        """Bytes in the entry."""
        return self.count * ITEMSIZE[self.tensor.dtype]


class ReadSegments(Protocol):
    """A reader of segments of one file's tensors from the source, converted."""

    def __call__(self, file: CachedFile, segments: Sequence[TensorSegment]) -> list[torch.Tensor]:
        """Read them: 1-D host tensors that own their memory, in the order of `segments`."""
        ...


def segments_of(tensor: CachedTensor) -> Iterator[TensorSegment]:
    """Cut a tensor into segments of `SEGMENT_BYTES` and a rest."""
    itemsize = ITEMSIZE[tensor.dtype]
    total, step = tensor.nbytes // itemsize, SEGMENT_BYTES // itemsize
    for start in range(0, total, step):
        yield TensorSegment(tensor, start, min(step, total - start))


class LoadedTensors:
    """Knowledge of loaded tensors that does not keep them: weak references and fingerprints."""

    def __init__(self) -> None:
        self._storages: dict[CachedTensor, weakref.ref[Any]] = {}
        self._fingerprints: dict[tuple[CachedTensor, int], list[torch.Tensor]] = {}
        self._buffer: torch.Tensor | None = None
        self._stream: torch.cuda.Stream | None = None

    def note(self, file: CachedFile, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take fingerprints, before anybody else has the tensors.

        Left out are small tensors, and views of the file, which nobody has read yet.

        Args:
            file: The file of the entry that they go to.
            tensors: The tensors, by their names in the source.
        """
        import torch

        device = None
        with suppress(torch.OutOfMemoryError):  # what has no fingerprint is read from the source
            for cached in file.tensors:
                tensor = tensors.get(cached.source.name)
                if tensor is None or not _worth_it(cached, tensor):
                    continue
                device = tensor.device
                words = _words(tensor.untyped_storage())
                for segment in segments_of(cached):
                    self._fingerprints[cached, segment.start] = fingerprint(_range(words, segment))
                self._storages[cached] = weakref.ref(tensor.untyped_storage())
        if device is not None and device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()

    def knows(self, segment: TensorSegment) -> bool:
        """Return True if `take` may have the segment."""
        return segment.tensor in self._storages

    def take(self, segment: TensorSegment) -> torch.Tensor | None:
        """Return a segment's bytes in host memory, valid until the next call; None if the source must be read."""
        storage = self._storages[segment.tensor]() if self.knows(segment) else None
        if storage is None:
            return None
        words = _range(_words(storage), segment)
        if words.numel() * _WORD != segment.nbytes:  # the storage was resized
            return None
        words = self._to_host(words) if words.is_cuda else words.clone()
        expected = self._fingerprints[segment.tensor, segment.start]
        return words if _same(fingerprint(words), expected) else None

    def _to_host(self, words: torch.Tensor) -> torch.Tensor:
        """Copy on a stream of its own: what was loaded is complete, and nobody has to wait for this copy."""
        import torch

        if self._buffer is None:
            self._buffer = torch.empty(SEGMENT_BYTES // _WORD, dtype=torch.int64, pin_memory=True)
        if self._stream is None:
            self._stream = torch.cuda.Stream(words.device)
        host = self._buffer[: words.numel()]
        with torch.cuda.stream(self._stream):
            host.copy_(words, non_blocking=True)
        self._stream.synchronize()
        return host


def _worth_it(cached: CachedTensor, tensor: torch.Tensor) -> bool:
    # the loader's own dtype may be another of the same size: bfloat16 in the entry, float16 in memory
    same = tensor.dtype == torch_dtype(cached.dtype)
    whole = same and tensor.is_contiguous() and tensor.untyped_storage().nbytes() == cached.nbytes
    converted = cached.dtype != cached.source.dtype or tensor.is_cuda
    return whole and converted and cached.nbytes >= _MIN_NBYTES and cached.nbytes % _WORD == 0


def _words(storage: Any) -> torch.Tensor:
    import torch

    return torch.empty(0, dtype=torch.int64, device=storage.device).set_(storage)


def _range(words: torch.Tensor, segment: TensorSegment) -> torch.Tensor:
    itemsize = ITEMSIZE[segment.tensor.dtype]
    return words[segment.start * itemsize // _WORD : (segment.start + segment.count) * itemsize // _WORD]


def fingerprint(words: torch.Tensor) -> list[torch.Tensor]:
    """Sum the words by position modulo each prime: taken modulo their product first, so in one pass.

    A last row that is not full is summed by itself. Nothing but sums and copies: each kind of kernel costs a GPU tens
    of milliseconds when it is first used.
    """
    columns = math.prod(_PRIMES)
    n = words.numel() // columns * columns
    rest = words[n:]
    rows = [words[:n].view(-1, columns).sum(0)] if n else []
    out = [row.view(-1, prime).sum(0) for row in rows for prime in _PRIMES]
    for prime in _PRIMES:
        m = rest.numel() // prime * prime
        out += [rest[:m].view(-1, prime).sum(0)] if m else []
        out.append(rest[m:].clone())
    return out


def _same(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(x.equal(y.to(x.device)) for x, y in zip(a, b, strict=True))


def prepare_fingerprints(device: str | int | torch.device) -> None:
    """Have a GPU load what fingerprints need, which takes it 70 ms the first time. For a thread beside a load."""
    import torch

    with suppress(RuntimeError, TypeError):  # the load itself says what is wrong with a device
        found = torch.device(f"cuda:{device}" if isinstance(device, int) else "cuda" if device == "auto" else device)
        if found.type == "cuda" and torch.cuda.is_available():
            for segment in fingerprint(torch.empty(2 * math.prod(_PRIMES) - 1, dtype=torch.int64, device=found)):
                segment.cpu()


def batches(segments: Iterable[TensorSegment], loaded: LoadedTensors) -> Iterator[list[TensorSegment]]:
    """Yield neighbouring segments that are read together, `SEGMENT_BYTES` at most; what was loaded stands alone."""
    batch: list[TensorSegment] = []
    for segment in segments:
        alone = loaded.knows(segment)
        if batch and (alone or sum(p.nbytes for p in batch) + segment.nbytes > SEGMENT_BYTES):
            yield batch
            batch = []
        if alone:
            yield [segment]
        else:
            batch.append(segment)
    if batch:
        yield batch
