"""Measurements of what this machine can do. They only read, evict nothing, and take well under ten seconds.

The disk is read with O_DIRECT, and only where the files are not in the page cache: such reads leave the cache as it
is. Each function returns GB/s or seconds; what cannot be measured raises `UnmeasuredError` with the reason.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from wan_loader.errors import UnmeasuredError
from wan_loader.events import clock_ns
from wan_loader.system.fresh_memory import FreshMemory
from wan_loader.system.machine import available_memory
from wan_loader.system.page_cache import Knowledge, PageCache, describe
from wan_loader.system.posix import map_file, populate, unmap

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = [
    "UnmeasuredError",
    "cold_ranges",
    "measure_cast",
    "measure_copy",
    "measure_device",
    "measure_disk",
    "measure_fill",
    "measure_page_cache",
    "measure_start",
    "warm_ranges",
]

_BLOCK_BYTES = 4 << 20
_THREADS = 8
#: Some disks give more, the more is asked for at once: larger blocks where the files have enough of them.
_DISK_BLOCK_BYTES = 16 << 20
_DISK_THREADS = 16
_SECONDS = 0.5
_CAST_BYTES = 128 << 20
_GPU_BYTES = 256 << 20
#: What a Python takes that imports torch and starts CUDA, and as much again.
_START_BYTES = 512 << 20


def cold_ranges(paths: Sequence[str], nbytes: int = _BLOCK_BYTES, most: int = 1024) -> list[tuple[str, int]]:
    """Find blocks of `nbytes` of the files of which no page is in the page cache, spread evenly: at most `most`."""
    return _ranges(paths, nbytes, most, wanted=0.0)


def warm_ranges(paths: Sequence[str], most: int = 256) -> list[tuple[str, int]]:
    """Find blocks of the files that are in the page cache entirely."""
    return _ranges(paths, _BLOCK_BYTES, most, wanted=1.0)


def _ranges(paths: Sequence[str], nbytes: int, most: int, *, wanted: float) -> list[tuple[str, int]]:
    blocks = [(path, start) for path in paths for start in range(0, _size(path) - nbytes + 1, nbytes)]
    # twice as many are looked at as are wanted: some are not in the state that is asked for
    step = max(1, len(blocks) // (2 * most))
    found: list[tuple[str, int]] = []
    with ExitStack() as stack:
        pages: dict[str, PageCache] = {}
        for path, start in blocks[::step]:
            if path not in pages:
                fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                stack.callback(os.close, fd)
                pages[path] = PageCache([fd])
            share = pages[path].share(0, start, start + nbytes)
            if share == wanted and pages[path].knowledge is not Knowledge.UNKNOWN:
                found.append((path, start))
            if len(found) == most:
                break
    return found


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return 0


def measure_disk(paths: Sequence[str], *, seconds: float = _SECONDS, clock: Callable[[], int] = clock_ns) -> float:
    """Measure GB/s with O_DIRECT on cold ranges of these files."""
    block_bytes = _DISK_BLOCK_BYTES
    ranges = cold_ranges(paths, block_bytes)
    if len(ranges) < 2 * _DISK_THREADS:
        block_bytes = _BLOCK_BYTES
        ranges = cold_ranges(paths, block_bytes)
    if not ranges:
        if doubts := describe(paths):
            raise UnmeasuredError(f"the disk was not measured: {doubts[0]}")
        raise UnmeasuredError(
            "too little of the files is outside of the page cache to measure their disk (`wan-loader evict` helps)"
        )
    return _read_rate(ranges, os.O_DIRECT, seconds, clock, block_bytes=block_bytes, threads=_DISK_THREADS)


def measure_page_cache(paths: Sequence[str], *, seconds: float = 0.2, clock: Callable[[], int] = clock_ns) -> float:
    """Measure GB/s of reading resident ranges of these files, or of an unnamed file in memory where there are none."""
    ranges = warm_ranges(paths)
    if ranges:
        return _read_rate(ranges * 8, 0, seconds, clock)
    with open(os.memfd_create("wan-loader"), "wb", closefd=True) as file:
        file.truncate(32 * _BLOCK_BYTES)
        path = f"/proc/self/fd/{file.fileno()}"
        if not os.path.exists(path):
            raise UnmeasuredError("the page cache was not measured: there is no /proc")
        _check_free(4 * 32 * _BLOCK_BYTES, "reads")
        for start in range(0, 32 * _BLOCK_BYTES, _BLOCK_BYTES):
            os.pwrite(file.fileno(), bytes(_BLOCK_BYTES), start)
        return _read_rate(
            [(path, start) for start in range(0, 32 * _BLOCK_BYTES, _BLOCK_BYTES)] * 32, 0, seconds, clock
        )


def _read_rate(
    ranges: Sequence[tuple[str, int]],
    flags: int,
    seconds: float,
    clock: Callable[[], int],
    *,
    block_bytes: int = _BLOCK_BYTES,
    threads: int = _THREADS,
) -> float:
    todo = iter(ranges)
    threads = min(threads, len(ranges))
    _check_free(2 * threads * block_bytes, "reads")
    with ExitStack() as stack:
        buffers = [stack.enter_context(mmap.mmap(-1, block_bytes)) for _ in range(threads)]
        for buffer in buffers:
            buffer.write(bytes(block_bytes))  # page faults are not what is measured
        start_ns = clock()
        deadline_ns = start_ns + int(seconds * 1e9)

        def read(buffer: mmap.mmap) -> int:
            total = 0
            for path, start in todo:  # an iterator over a list may be shared by threads
                fd = os.open(path, os.O_RDONLY | flags | os.O_CLOEXEC)
                try:
                    total += os.preadv(fd, [buffer], start)
                finally:
                    os.close(fd)
                if clock() > deadline_ns:
                    break
            return total

        try:
            with ThreadPoolExecutor(threads) as pool:
                total = sum(pool.map(read, buffers))
        except OSError as error:
            raise UnmeasuredError(f"reading with O_DIRECT is refused: {error.strerror}") from error
        return total / max(1, clock() - start_ns)


def _check_free(nbytes: int, what: str) -> None:
    """Look for free memory: measuring must not push others out of it, nor this process over the limit of its cgroup."""
    if (free := available_memory()) is not None and free < nbytes:
        raise UnmeasuredError(f"too little memory is free to measure {what}")


def measure_copy(*, clock: Callable[[], int] = clock_ns) -> float:
    """Measure GB/s of one thread copying memory to memory that is touched for the first time, as a fresh tensor is."""
    import ctypes

    nbytes = 256 << 20
    _check_free(4 * nbytes, "copies")
    with mmap.mmap(-1, nbytes) as source:
        a = ctypes.addressof(ctypes.c_char.from_buffer(source))
        ctypes.memset(a, 1, nbytes)
        with mmap.mmap(-1, nbytes) as target:
            b = ctypes.addressof(ctypes.c_char.from_buffer(target))
            memory = FreshMemory()
            memory.add(b, nbytes)
            start_ns = clock()
            memory.touch_huge(b, nbytes)  # as loads do
            ctypes.memmove(b, a, nbytes)
            return nbytes / max(1, clock() - start_ns)


def measure_cast(device: str = "cpu", *, clock: Callable[[], int] = clock_ns) -> float:
    """Measure GB/s of fp32 input that is converted to bf16 on a device, with torch's own threads, into fresh memory."""
    import torch

    if device == "cpu":
        _check_free(_CAST_BYTES * 4, "casts")
    source = torch.ones(_CAST_BYTES // 4, dtype=torch.float32, device=device)
    # warms up: the first conversion starts threads, or loads a kernel
    source.to(torch.bfloat16)
    target = torch.empty(source.shape, dtype=torch.bfloat16, device=device)
    memory = FreshMemory()
    if device == "cpu":
        memory.add(target.data_ptr(), target.nbytes)
    _wait(device)
    start_ns = clock()
    if device == "cpu":
        memory.touch_huge(target.data_ptr(), target.nbytes)
    target.copy_(source)
    _wait(device)
    return source.nbytes / max(1, clock() - start_ns)


def measure_fill() -> dict[str, float]:
    """Measure GB/s of loads of our own from the page cache into host memory, as they are and with a conversion.

    What a conversion makes counts with what it reads.
    """
    from wan_loader.api import load

    _check_free(_CAST_BYTES * 4, "loads")
    rates = {}
    with open(os.memfd_create("wan-loader"), "wb", closefd=True) as file:
        text = _header(_CAST_BYTES)
        file.write(text)
        for _ in range(_CAST_BYTES // _BLOCK_BYTES):
            file.write(bytes(_BLOCK_BYTES))
        file.flush()
        path = f"/proc/self/fd/{file.fileno()}"
        for name, dtype, moved in (("fill_gbps", None, 1.0), ("convert_gbps", "bf16", 1.5)):
            for _ in range(2):  # the first one imports what it needs
                report = load(path, device="cpu", dtype=dtype, io="buffered").report
            rates[name] = _CAST_BYTES * moved / max(1e-9, report.seconds) / 1e9
    return rates


def _header(nbytes: int, n: int = 8) -> bytes:
    """Return the header of a safetensors file of `n` tensors in fp32, which hold `nbytes` together."""
    each = nbytes // n
    tensors = {
        str(i): {"dtype": "F32", "shape": [each // 4], "data_offsets": [i * each, (i + 1) * each]} for i in range(n)
    }
    text = json.dumps(tensors).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _wait(device: str) -> None:
    import torch

    if device != "cpu":
        torch.cuda.synchronize(device)


def measure_device(index: int, *, clock: Callable[[], int] = clock_ns) -> dict[str, float]:
    """Measure GB/s of copies to a CUDA device from pinned and pageable memory, of registering pages, of casts on it."""
    import torch

    device = f"cuda:{index}"
    pageable = torch.ones(_GPU_BYTES, dtype=torch.uint8)
    pinned = pageable.pin_memory(device)
    target = torch.empty(_GPU_BYTES, dtype=torch.uint8, device=device)
    rates = {}
    for name, source in (("h2d_pinned_gbps", pinned), ("h2d_pageable_gbps", pageable)):
        best = 0.0
        for _ in range(3):
            _wait(device)
            start_ns = clock()
            target.copy_(source, non_blocking=True)
            _wait(device)
            best = max(best, _GPU_BYTES / max(1, clock() - start_ns))
        rates[name] = best
    rates["cast_gpu_gbps"] = measure_cast(device, clock=clock)
    return rates | _registration(index, clock)


def _registration(index: int, clock: Callable[[], int]) -> dict[str, float]:
    """Measure registering pages of a file mapping, read-only, as mapped loads do; absent where it is refused."""
    import torch

    from wan_loader.devices import driver
    from wan_loader.devices.writer import PinError

    torch.cuda.set_device(index)
    with open(os.memfd_create("wan-loader"), "wb", closefd=True) as file:
        for start in range(0, _GPU_BYTES, _BLOCK_BYTES):
            os.pwrite(file.fileno(), bytes(_BLOCK_BYTES), start)
        address = map_file(file.fileno(), 0, _GPU_BYTES)
        try:
            # page faults are not what is measured
            populate(address, _GPU_BYTES)
            start_ns = clock()
            driver.register(address, _GPU_BYTES, driver.current_context(), read_only=True)
            rate = _GPU_BYTES / max(1, clock() - start_ns)
            driver.unregister(address, driver.current_context())
        except PinError:
            return {}
        finally:
            unmap(address, _GPU_BYTES)
    return {"register_gbps": rate}


_START = """\
import time
a = time.perf_counter()
import torch
b = time.perf_counter()
if torch.cuda.is_available():
    torch.zeros(1, device="cuda"); torch.cuda.synchronize()
c = time.perf_counter()
import sys, wan_loader
wan_loader.load_file(sys.argv[1], device="cuda" if torch.cuda.is_available() else "cpu", dtype="bf16")
print(b - a, c - b, torch.cuda.is_available(), time.monotonic_ns())
"""


def measure_start(python: str = sys.executable) -> dict[str, float]:
    """Measure the seconds that `import torch` and a CUDA context take in a fresh process, and its start in all.

    The whole is from the start of the process to the end of a load of next to nothing: what any load takes at least.
    """
    _check_free(_START_BYTES, "the start of another Python")
    with tempfile.NamedTemporaryFile(suffix=".safetensors") as tiny:
        tiny.write(_header(4096) + bytes(4096))
        tiny.flush()
        start_ns = time.monotonic_ns()
        command = [python, "-c", _START, tiny.name]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    words: list[Any] = done.stdout.split()
    if done.returncode or len(words) != 4:
        raise UnmeasuredError(f"torch cannot be imported by {python}")
    times = {"import_torch_s": float(words[0]), "start_s": (int(words[3]) - start_ns) / 1e9}
    return times | ({"cuda_init_s": float(words[1])} if words[2] == "True" else {})
