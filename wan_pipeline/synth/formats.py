"""The two file formats as streams: a safetensors file and a torch zip checkpoint, buffer by buffer, in order.

Both functions yield buffers whose concatenation is the file, so a file of any size is written with the memory of one
buffer. The values come from a function `data(tensor) -> buffers`; with one that yields nothing, what is left is the
overhead, from which the size of a file is known before it is written.

The zip follows what `torch.save` writes: stored entries, data on 64-byte borders, data descriptors, ZIP64 where a
file is longer than 4 GiB. Checksums are right, which other zip tools insist on.
"""

from __future__ import annotations

import io
import json
import pickle
import struct
import zlib
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from wan_pipeline.synth.synth_tensors import ITEMSIZE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from wan_pipeline.synth.synth_tensors import SynthTensor

    Buffer = bytes | memoryview
    Data = Callable[[SynthTensor], Iterable[Buffer]]

__all__ = ["no_data", "pth_stream", "safetensors_stream", "stream_nbytes"]

_SAFETENSORS_DTYPE = {"fp32": "F32", "bf16": "BF16", "fp16": "F16", "fp8": "F8_E4M3", "uint8": "U8"}
_STORAGE_CLASS = {"fp32": "FloatStorage", "bf16": "BFloat16Storage", "fp16": "HalfStorage"}
_HEADER_ALIGN = 8
_DATA_ALIGN = 64
_ZIP64_FROM = 0xFFFFFFFF
_CHECKSUM_THREADS = 1


def no_data(tensor: SynthTensor) -> Iterator[Buffer]:
    """Return no values at all: the source for the length of all that is not data."""
    return iter(())


def stream_nbytes(stream: Iterable[Buffer]) -> int:
    """Return the length of all buffers of a stream."""
    return sum(memoryview(buffer).nbytes for buffer in stream)


def safetensors_stream(
    tensors: Sequence[SynthTensor], data: Data, metadata: Mapping[str, str] | None = None
) -> Iterator[Buffer]:
    """Yield a safetensors file as the safetensors library writes it: tensors of one dtype sorted by name."""
    tensors = sorted(tensors, key=lambda t: (-ITEMSIZE[t.dtype], t.name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    end = 0
    for tensor in tensors:
        start, end = end, end + tensor.nbytes
        entry = {"dtype": _SAFETENSORS_DTYPE[tensor.dtype], "shape": tensor.shape, "data_offsets": (start, end)}
        header[tensor.name] = entry
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _HEADER_ALIGN)
    yield struct.pack("<Q", len(text)) + text
    for tensor in tensors:
        yield from data(tensor)


def pth_stream(tensors: Sequence[SynthTensor], archive: str, data: Data) -> Iterator[Buffer]:
    """Yield a checkpoint as `torch.save` writes it: an ordered dictionary of tensors, each with its own storage."""
    zip_ = _Zip(archive)
    yield from zip_.entry("data.pkl", _pickled(tensors))
    yield from zip_.entry(".format_version", b"1")
    yield from zip_.entry(".storage_alignment", str(_DATA_ALIGN).encode())
    yield from zip_.entry("byteorder", b"little")
    pool = ThreadPoolExecutor(_CHECKSUM_THREADS, thread_name_prefix="crc")
    try:
        # ahead of the writing, or one core would have to checksum and copy in turn
        checksums = pool.map(lambda tensor: _crc32(data(tensor)), tensors)
        for i, (tensor, crc) in enumerate(zip(tensors, checksums, strict=True)):
            yield from zip_.entry_of(f"data/{i}", data(tensor), tensor.nbytes, crc)
    finally:
        pool.shutdown(cancel_futures=True)
    yield from zip_.entry("version", b"3\n")
    yield from zip_.entry(".data/serialization_id", b"0" * 40)
    yield zip_.end()


class _Zip:
    """A zip file while it is streamed; each method returns the bytes that come next."""

    def __init__(self, archive: str) -> None:
        self._archive = archive
        self._offset = 0
        self._directory: list[bytes] = []

    def entry(self, name: str, content: bytes) -> Iterator[Buffer]:
        return self.entry_of(name, (content,), len(content), zlib.crc32(content))

    def entry_of(self, name: str, content: Iterable[Buffer], nbytes: int, crc: int) -> Iterator[Buffer]:
        assert nbytes < _ZIP64_FROM, "no tensor of these checkpoints is that long"
        path = f"{self._archive}/{name}".encode()
        start = self._offset
        extra = _padding(start + 30 + len(path))
        # flags: bit 3, lengths and checksum come in the descriptor; bit 11, the name is UTF-8
        local = struct.pack("<4s5H3I2H", b"PK\3\4", 0, 0x808, 0, 0, 0, 0, 0, 0, len(path), len(extra)) + path + extra
        descriptor = struct.pack("<4s3I", b"PK\7\10", crc, nbytes, nbytes)
        self._directory.append(_directory_entry(path, start, nbytes, crc))
        self._offset += len(local) + nbytes + len(descriptor)
        yield local
        yield from content
        yield descriptor

    def end(self) -> bytes:
        directory, count = b"".join(self._directory), len(self._directory)
        start, length = self._offset, len(directory)
        # always a ZIP64 end, as torch writes one whatever the length
        end64 = struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, length, start)
        locator = struct.pack("<4sIQI", b"PK\6\7", 0, start + length, 1)
        short = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, count, count, length, min(start, _ZIP64_FROM), 0)
        return directory + end64 + locator + short


def _padding(header_end: int) -> bytes:
    """Return an extra field after which the data begins on a border of 64 bytes."""
    fill = -(header_end + 4) % _DATA_ALIGN
    return struct.pack("<2sH", b"FB", fill) + b"Z" * fill


def _directory_entry(path: bytes, start: int, nbytes: int, crc: int) -> bytes:
    far = start >= _ZIP64_FROM
    # only the offset can be too large for its field: no entry is longer than 4 GiB
    extra = struct.pack("<2HQ", 1, 8, start) if far else b""
    version, short_start = (45, _ZIP64_FROM) if far else (0, start)
    sizes = (crc, nbytes, nbytes, len(path), len(extra))
    fixed = struct.pack("<4s6H3I5H2I", b"PK\1\2", 0, version, 0x808, 0, 0, 0, *sizes, 0, 0, 0, 0, short_start)
    return fixed + path + extra


def _crc32(buffers: Iterable[Buffer]) -> int:
    crc = 0
    for buffer in buffers:
        crc = zlib.crc32(buffer, crc)
    return crc


@dataclass(frozen=True, slots=True)
class _Storage:
    cls: Any
    key: str
    numel: int


@dataclass(frozen=True, slots=True)
class _Stub:
    """A stand-in for a tensor while it is pickled: what `torch.Tensor` would reduce to, without the tensor."""

    storage: _Storage
    shape: tuple[int, ...]


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj: Any) -> Any:
        if isinstance(obj, _Storage):
            return ("storage", obj.cls, obj.key, "cpu", obj.numel)
        return None

    def reducer_override(self, obj: Any) -> Any:
        if not isinstance(obj, _Stub):
            return NotImplemented
        from torch._utils import _rebuild_tensor_v2

        return _rebuild_tensor_v2, (obj.storage, 0, obj.shape, _strides(obj.shape), False, OrderedDict())


def _pickled(tensors: Sequence[SynthTensor]) -> bytes:
    import torch

    stubs: OrderedDict[str, _Stub] = OrderedDict()
    for i, tensor in enumerate(tensors):
        storage = _Storage(getattr(torch, _STORAGE_CLASS[tensor.dtype]), str(i), tensor.numel)
        stubs[tensor.name] = _Stub(storage, tensor.shape)
    buffer = io.BytesIO()
    _Pickler(buffer, protocol=2).dump(stubs)
    return buffer.getvalue()


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides: list[int] = []
    step = 1
    for length in reversed(shape):
        strides.append(step)
        step *= length
    return tuple(reversed(strides))
