"""Weights in memory that no file holds, to a GPU and back, as offloading moves them: plain, ours, and ours otherwise.

    python benchmarks/bulk_moves.py --gb 14 --rounds 5 --output bulk_moves.json
    python benchmarks/bulk_moves.py --gb 0.064 --gb 0.25 --gb 1 --rounds 9
    python benchmarks/bulk_moves.py --gb 0.5 --device cpu:0 --rounds 1

One process; a module in the shapes of a large transformer, in bf16, whose memory is anonymous. In each round every way
takes it to the device once, in an order that turns, and after each it goes back by one of two ways. What has arrived is
compared with the first plain move, tensor by tensor, by sums of all words. Device memory is empty before each move.
Ways there:

    plain               module.to(device)
    ours                the same after the fast path, which has a few threads copy into the pinned ring
    ours, N copies      the same with so many at once
    process_vm_readv    ours, with that call in place of copies
    reads of the file   ours, with reads of /proc/self/mem by threads of the system, ten at once
    torch, two buffers  chunk by chunk: torch copies into pinned memory with all its threads, the GPU fetches that
    registered          every tensor's own memory is registered with the driver, fetched, and unregistered
    registered by 4     the same by four threads

Ways back:

    plain               module.to("cpu")
    through pinned      chunk by chunk through two pinned buffers, torch's threads copy out of them

First of all, without a device: what each way of reading memory gives by itself, by the number of threads. With
`--views DIRECTORY`, a copy of the weights is saved there, and two more things are measured that `.to("cpu")` could do
where weights still equal their file: read it again onto the device and compare there, as a price of handing out views
of the file in place of copies; and the next move, which is then one from the file.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import mmap
import os
import platform
import statistics
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch

import wan_loader
from wan_loader.engine import transfer
from wan_loader.fastpath import Moves
from wan_loader.fastpath.moving import memory_moves
from wan_loader.system.posix_aio import PosixAio
from wan_loader.system.read_threads import ReadThreads

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Move = Callable[[torch.nn.Module, torch.device], None]

_CHUNK_BYTES = 64 << 20
_PIECE_BYTES = 4 << 20
_THREADS = (1, 2, 4, 8, 12, 16)

_libc = ctypes.CDLL(None, use_errno=True)
_libc.process_vm_readv.restype = ctypes.c_ssize_t


class _Part(ctypes.Structure):
    """A `struct iovec`."""

    _fields_ = [("address", ctypes.c_void_p), ("nbytes", ctypes.c_size_t)]


# reading memory: each has the arguments and the result of `wan_loader.system.posix.read_at`


def by_pread(fd: int, address: int, nbytes: int, offset: int) -> int:
    """Read the process's memory as a file."""
    return os.preadv(fd, [(ctypes.c_char * nbytes).from_address(address)], offset)


def by_process_vm_readv(fd: int, address: int, nbytes: int, offset: int) -> int:
    """Read the process's memory as another's."""
    to, source = _Part(address, nbytes), _Part(offset, nbytes)
    read = _libc.process_vm_readv(os.getpid(), ctypes.byref(to), 1, ctypes.byref(source), 1, 0)
    if read < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return int(read)


def by_memmove(fd: int, address: int, nbytes: int, offset: int) -> int:
    """Copy."""
    ctypes.memmove(address, offset, nbytes)
    return nbytes


READS = {"pread": by_pread, "process_vm_readv": by_process_vm_readv, "memmove": by_memmove}


def anonymous(nbytes: int) -> tuple[mmap.mmap, int]:
    """Make memory of small pages, as a program's own mostly is, and return its address, too."""
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    ctypes.memset(address, 1, nbytes)
    return memory, address


def read_rates(nbytes: int) -> dict[str, dict[int, float]]:
    """Measure each way of reading memory into small slots, one for each thread: bytes per second."""
    (memory, source), (slots, to) = anonymous(nbytes), anonymous(_PIECE_BYTES * max(_THREADS))
    fd = os.open("/proc/self/mem", os.O_RDONLY)
    rates: dict[str, dict[int, float]] = {}
    for name, read in READS.items():
        rates[name] = {}
        for count in (n for n in _THREADS if n <= 2 * len(os.sched_getaffinity(0))):
            pieces = iter(range(0, nbytes, _PIECE_BYTES))

            def work(slot: int, read: Any = read, pieces: Iterator[int] = pieces) -> None:
                for piece in pieces:  # an iterator of a range may be shared
                    read(fd, slot, _PIECE_BYTES, source + piece)

            threads = [threading.Thread(target=work, args=(to + _PIECE_BYTES * i,)) for i in range(count)]
            start = time.perf_counter()
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            rates[name][count] = nbytes / (time.perf_counter() - start)
    os.close(fd)
    del memory, slots
    return rates


# moves


def make_module(nbytes: int) -> torch.nn.Module:
    """Make a module of random weights in memory of its own."""
    width = 5120 if nbytes >= 1 << 30 else 1024
    shapes = [(width, width), (width,)] * 4 + [(width * 27 // 10, width), (width, width * 27 // 10)]
    pool = torch.randn(1 << 22, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    module, left = torch.nn.Module(), nbytes
    while left > 0:
        for shape in shapes:
            tensor = torch.empty(shape, dtype=torch.bfloat16)
            for i, piece in enumerate(tensor.view(-1).split(pool.numel())):
                piece.copy_(pool[: piece.numel()].roll(i + len(module._parameters)))
            if left > 0:
                module.register_parameter(f"w{len(module._parameters)}", torch.nn.Parameter(tensor, False))
            left -= tensor.nbytes
    return module


def plain(module: torch.nn.Module, device: torch.device) -> None:
    """Move as a program does."""
    module.to(device)


def ours(module: torch.nn.Module, device: torch.device) -> None:
    """Move as the fast path does, however little it is."""
    moves = Moves(kinds=(device.type,), min_nbytes=0, min_memory_nbytes=0)
    moves.fetch(module, device, None)
    module.to(device)
    if moves.tally.left:
        sys.exit(f"ours left something: {moves.tally.summary()}")


def ours_with(n_threads: int | None, backend: Callable[[], Any] | None = None) -> Move:
    """Return our move with another number of threads, or another way of reading."""

    def move(module: torch.nn.Module, device: torch.device) -> None:
        with ExitStack() as stack:
            stack.enter_context(patch.object(memory_moves, "_THREADS", n_threads))
            if backend is not None:
                stack.enter_context(patch.object(transfer, "choose_backend", lambda *_, own_memory: backend()))
            ours(module, device)

    return move


def pinned_buffers() -> list[torch.Tensor]:
    return [torch.empty(_CHUNK_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(2)]


def two_buffers(module: torch.nn.Module, device: torch.device) -> None:
    """Copy into two pinned buffers by turns, and out of them to the GPU; the buffers are made anew, as ours are."""
    buffers, events, turn = pinned_buffers(), [torch.cuda.Event(), torch.cuda.Event()], 0
    for parameter in module.parameters():
        new = torch.empty_like(parameter, device=device)
        to, source = (t.detach().view(-1).view(torch.uint8).split(_CHUNK_BYTES) for t in (new, parameter.data))
        for to_part, part in zip(to, source, strict=True):
            buffer, event = buffers[turn % 2][: part.numel()], events[turn % 2]
            event.synchronize()
            buffer.copy_(part)
            to_part.copy_(buffer, non_blocking=True)
            event.record()
            turn += 1
        parameter.data = new
    torch.cuda.synchronize()


def registered(n_threads: int) -> Move:
    """Return a move that registers each tensor's memory."""

    def move(module: torch.nn.Module, device: torch.device) -> None:
        cudart, sources = torch.cuda.cudart(), [parameter.data for parameter in module.parameters()]

        def register(tensor: torch.Tensor) -> bool:
            torch.cuda.set_device(device.index or 0)
            return cudart.cudaHostRegister(tensor.data_ptr(), tensor.nbytes, 0) == cudart.cudaError.success

        with ThreadPoolExecutor(n_threads) as pool:
            for parameter, _ in zip(module.parameters(), pool.map(register, sources), strict=True):
                parameter.data = parameter.data.to(device, non_blocking=True)
            torch.cuda.synchronize()
            list(pool.map(lambda tensor: cudart.cudaHostUnregister(tensor.data_ptr()), sources))

    return move


def plain_back(module: torch.nn.Module, device: torch.device) -> None:
    """Move back as a program does."""
    module.to("cpu")


def pinned_back(module: torch.nn.Module, device: torch.device) -> None:
    """Have the GPU write into two pinned buffers by turns, and copy out of them into new memory."""
    buffers, events = pinned_buffers(), [torch.cuda.Event(), torch.cuda.Event()]
    waiting: list[tuple[torch.Tensor, int]] = []

    def take() -> None:
        to, turn = waiting.pop(0)
        events[turn].synchronize()
        to.copy_(buffers[turn][: to.numel()])

    turn = 0
    for parameter in module.parameters():
        new = torch.empty_like(parameter, device="cpu")
        to, source = (t.detach().view(-1).view(torch.uint8).split(_CHUNK_BYTES) for t in (new, parameter.data))
        for to_part, part in zip(to, source, strict=True):
            if len(waiting) == 2:
                take()
            buffers[turn][: part.numel()].copy_(part, non_blocking=True)
            events[turn].record()
            waiting.append((to_part, turn))
            turn = 1 - turn
        parameter.data = new
    while waiting:
        take()


EVERYWHERE: dict[str, Move] = {
    "plain": plain,
    "ours": ours,
    **{f"ours, {count} copies": ours_with(count) for count in (2, 4, 8, 12)},
    "process_vm_readv": ours_with(10, lambda: ReadThreads(by_process_vm_readv)),
    "reads of the file": ours_with(10, PosixAio),
}
CUDA_ONLY: dict[str, Move] = {
    "torch, two buffers": two_buffers,
    "registered": registered(1),
    "registered by 4": registered(4),
}


@contextmanager
def host_peak(peaks: list[int]) -> Iterator[None]:
    """Append the most anonymous memory that the process had during the body, beyond what it had before."""

    def now() -> int:
        text = Path("/proc/self/status").read_text()
        return int(text.partition("RssAnon:")[2].split()[0]) << 10

    before, most, is_over = now(), [0], threading.Event()

    def watch() -> None:
        while not is_over.wait(0.02):
            most.append(now())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()
        peaks.append(max(0, *most, now()) - before)


def sums(module: torch.nn.Module) -> list[int]:
    """Sum up each tensor's words, weighted by their places."""
    found = []
    for parameter in module.parameters():
        words = parameter.detach().view(-1).view(torch.int16)
        weights = torch.arange(words.numel(), device=words.device, dtype=torch.int32) % 251
        found.append(int((words * weights).sum(dtype=torch.int64)))
    return found


def measured(move: Move, module: torch.nn.Module, device: torch.device) -> dict[str, float]:
    """Move once, on a device whose memory is empty but for the module."""
    is_cuda, peaks = device.type == "cuda", list[int]()
    if is_cuda:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with host_peak(peaks):
        start = time.perf_counter()
        move(module, device)
        if is_cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    gpu_peak = torch.cuda.max_memory_allocated() if is_cuda else 0
    return {"seconds": seconds, "gpu_peak_bytes": gpu_peak, "host_anonymous_bytes": peaks[0]}


def take_turns(nbytes: int, device: torch.device, rounds: int) -> dict[str, dict[str, list[dict[str, float]]]]:
    """Move there and back by all ways, by turns."""
    there = EVERYWHERE | (CUDA_ONLY if device.type == "cuda" else {})
    back = {"plain": plain_back} | ({"through pinned": pinned_back} if device.type == "cuda" else {})
    module = make_module(nbytes)
    expected = sums(module.to(device))  # from here on streams, kernels and code are there
    module.to("cpu")
    samples: dict[str, dict[str, list[dict[str, float]]]] = {
        "there": {name: [] for name in there},
        "back": {name: [] for name in back},
    }
    for i in range(rounds):
        names = list(there)[i % len(there) :] + list(there)[: i % len(there)]
        for j, name in enumerate(names):
            samples["there"][name].append(measured(there[name], module, device))
            if sums(module) != expected:
                sys.exit(f"{name}: WRONG WEIGHTS")
            way = list(back)[(i + j) % len(back)]
            samples["back"][way].append(measured(back[way], module, device))
    if sums(module.to(device)) != expected:
        sys.exit("back: WRONG WEIGHTS")
    return samples


def views(nbytes: int, device: torch.device, rounds: int, directory: Path) -> dict[str, list[dict[str, float]]]:
    """Measure what handing out views of a file would cost: comparing the weights with it, and the next move."""
    from safetensors.torch import load_file, save_file

    module, path = make_module(nbytes), directory / "bulk_moves.safetensors"
    save_file(dict(module.state_dict()), path)
    samples: dict[str, list[dict[str, float]]] = {"compared on the device": [], "next move": []}

    def compare(module: torch.nn.Module, device: torch.device) -> None:
        # in pieces: the device holds the weights as well
        names = list(module.state_dict())
        for start in range(0, len(names), 32):
            some = wan_loader.load_file(path, device=device, names=names[start : start + 32])
            if not all(torch.equal(tensor, module.get_parameter(name)) for name, tensor in some.items()):
                sys.exit("views: WRONG WEIGHTS")

    try:
        for _ in range(rounds):
            module.load_state_dict(load_file(path), assign=True)
            samples["next move"].append(measured(ours, module, device))
            samples["compared on the device"].append(measured(compare, module, device))
    finally:
        path.unlink()
    return samples


# what is told


def table(title: str, nbytes: int, samples: dict[str, list[dict[str, float]]]) -> list[str]:
    """Write a line for each way: medians, the spread of the seconds, and the peaks of memory."""
    lines = [f"{title:25s} {'GB/s':>6s} {'median':>8s} {'spread (s)':>17s} {'GPU peak':>9s} {'host anon.':>10s}  GB"]
    for name, found in samples.items():
        seconds = sorted(s["seconds"] for s in found)
        gpu, host = (max(s[key] for s in found) / 1e9 for key in ("gpu_peak_bytes", "host_anonymous_bytes"))
        middle = statistics.median(seconds)
        lines.append(
            f"  {name:23s} {nbytes / middle / 1e9:6.1f} {middle:8.4f} {seconds[0]:8.4f} -{seconds[-1]:7.4f} "
            f"{gpu:9.2f} {host:+10.2f}"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, action="append", help="the size of the module (again for more; 14)")
    parser.add_argument("--rounds", type=int, default=5, help="samples of each way there (default: 5)")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu:0 to try it out (default: cuda)")
    parser.add_argument("--views", type=Path, help="a directory for a copy of the weights, at best in memory")
    parser.add_argument("--output", type=Path, help="all samples, as JSON")
    args = parser.parse_args()
    device = torch.device(args.device)
    sizes = [int(gb * 1e9) for gb in args.gb or [14.0]]
    rates = read_rates(min(2 << 30, max(_CHUNK_BYTES, max(sizes) // _PIECE_BYTES * _PIECE_BYTES)))
    for name, by_count in rates.items():
        told = "  ".join(f"{count}: {rate / 1e9:.1f}" for count, rate in by_count.items())
        print(f"read by {name:17s} GB/s by threads  {told}", flush=True)
    document: dict[str, Any] = {
        "command": " ".join(sys.argv),
        "machine": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "torch": torch.__version__,
        "read_rates": rates,
        "moves": {},
    }
    for nbytes in sizes:
        samples = take_turns(nbytes, device, args.rounds)
        if args.views is not None:
            samples["with a file"] = views(nbytes, device, args.rounds, args.views)
        document["moves"][nbytes] = samples
        for title, found in samples.items():
            print("\n".join(table(f"{nbytes / 1e9:.3f} GB {title}", nbytes, found)), flush=True)
        if args.output is not None:
            args.output.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
