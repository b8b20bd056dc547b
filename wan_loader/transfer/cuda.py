"""The CUDA target: asynchronous copies over PCIe, and conversions on the GPU right behind them.

One stream copies, one stream converts. Bytes that stay as they are go straight into their tensor. Bytes to be converted
go into one of a few scratch buffers on the device, and from there through a cast kernel into their tensor, while the
next scratch is being filled. (A converting `.to(device, dtype)` from pinned memory leaves the DMA path and is nine
times slower.)
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from wan_loader.events import Span, clock_ns
from wan_loader.plan import Piece
from wan_loader.transfer import driver

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from wan_loader.events import Observer
    from wan_loader.transfer.base import Destination

__all__ = ["N_SCRATCH", "SCRATCH_BYTES", "CudaTarget", "groups"]

#: Size of each device scratch buffer, and how many there are where anything is converted.
SCRATCH_BYTES = 32 << 20
N_SCRATCH = 3


@dataclass(slots=True)
class _Scratch:
    memory: Any
    address: int
    free: Any = None
    """Event after the last cast out of it."""


@dataclass(frozen=True, slots=True)
class _Ticket:
    event: Any

    def wait(self) -> None:
        self.event.synchronize()


@dataclass(frozen=True, slots=True)
class _Mark:
    """An interval of work on a stream. `start` None: it began when the one before it ended."""

    nbytes: int
    start: Any
    end: Any


def groups(pieces: Sequence[Piece], nbytes: int) -> Iterator[list[Piece]]:
    """Pieces that follow each other and fit into `nbytes` of scratch together, each aligned there."""
    group: list[Piece] = []
    for piece in (part for whole in pieces for part in _parts(whole, nbytes)):
        if group and not (
            piece.file_start == group[-1].file_end
            and piece.file_end - group[0].file_start <= nbytes
            and (piece.file_start - group[0].file_start) % piece.itemsize == 0
        ):
            yield group
            group = []
        group.append(piece)
    if group:
        yield group


def _parts(piece: Piece, nbytes: int) -> Iterator[Piece]:
    for done in range(0, piece.nbytes, nbytes):
        count = min(nbytes, piece.nbytes - done)
        yield Piece(piece.storage, piece.storage_start + done, piece.file_start + done, count, piece.itemsize)


class CudaTarget:
    """One CUDA device. Made and used in one thread, `bind` excepted, in which the device is the current one."""

    can_pin = True

    def __init__(self, index: int, observer: Observer | None = None) -> None:
        import torch

        self._torch = torch
        self._device = torch.device("cuda", index)
        self._observer = observer
        self._destinations: Sequence[Destination] = ()
        self._scratch: deque[_Scratch] = deque()
        self._copied: list[_Mark] = []
        self._cast: list[_Mark] = []
        self._last: Any = None
        self._context = driver.current_context()
        self._callers = torch.cuda.current_stream(index)
        self._copies = torch.cuda.Stream(index)
        self._casts = torch.cuda.Stream(index)

    def bind(self, destinations: Sequence[Destination]) -> None:
        """Say where storages go; makes the scratch for conversions if there are any.

        Called once the destinations are allocated, for the caller's stream: the allocator may have handed out memory
        that work queued there still uses, so copies and casts wait for that work.
        """
        self._destinations = destinations
        if any(d.source_dtype is not None for d in destinations):
            with self._torch.cuda.stream(self._callers):
                for _ in range(N_SCRATCH):
                    memory = self._torch.empty(SCRATCH_BYTES, dtype=self._torch.uint8, device=self._device)
                    self._scratch.append(_Scratch(memory, memory.data_ptr()))
        after = self._callers.record_event()
        self._copies.wait_event(after)
        self._casts.wait_event(after)

    def pin(self, address: int, nbytes: int, *, read_only: bool) -> None:
        """Register host memory with the driver; raises `PinError`."""
        driver.register(address, nbytes, read_only=read_only)

    def unpin(self, address: int) -> bool:
        """Undo `pin`, in any thread."""
        return driver.unregister(address, self._context)

    def submit(self, address: int, file_start: int, pieces: Sequence[Piece]) -> _Ticket:
        """Queue copies and casts; the source must stay until the ticket is done."""
        offset, to = address - file_start, self._destinations
        idle = self._last is None or self._last.query()
        start = self._event(self._copies) if idle else None
        plain: list[Piece] = []
        converted: list[Piece] = []
        for piece in pieces:
            (plain if to[piece.storage].source_dtype is None else converted).append(piece)
        driver.copy_to_device(
            [(to[p.storage].address + p.storage_start, offset + p.file_start, p.nbytes) for p in plain],
            self._copies.cuda_stream,
        )
        end = None
        if converted:
            with self._torch.cuda.stream(self._casts):
                for group in groups(converted, SCRATCH_BYTES):
                    end = self._convert(offset, group)
        self._last = end or self._event(self._copies)
        if self._observer is not None:
            self._copied.append(_Mark(sum(p.nbytes for p in pieces), start, self._last))
        return _Ticket(self._last)

    def _convert(self, offset: int, group: Sequence[Piece]) -> Any:
        """One copy of the whole group into scratch, then casts out of it. Casts' stream is current.

        Returns the event after the copy.
        """
        scratch = self._scratch.popleft()
        if scratch.free is not None:
            self._copies.wait_event(scratch.free)
        base, nbytes = group[0].file_start, group[-1].file_end - group[0].file_start
        driver.copy_to_device([(scratch.address, offset + base, nbytes)], self._copies.cuda_stream)
        arrived = self._event(self._copies)
        self._casts.wait_event(arrived)
        for (source_dtype, _), same in groupby(group, key=self._dtypes):
            self._cast_out(scratch.memory, base, source_dtype, list(same))
        scratch.free = self._event(self._casts)
        if self._observer is not None:
            self._cast.append(_Mark(nbytes, arrived, scratch.free))
        self._scratch.append(scratch)
        return arrived

    def _dtypes(self, piece: Piece) -> tuple[Any, Any]:
        destination = self._destinations[piece.storage]
        return destination.source_dtype, destination.flat.dtype

    def _cast_out(self, memory: Any, base: int, source_dtype: Any, pieces: Sequence[Piece]) -> None:
        """Cast neighbouring pieces of the same dtypes: one launch for many, since each costs more than a small cast."""
        counts = [piece.nbytes // piece.itemsize for piece in pieces]
        sources = memory[pieces[0].file_start - base : pieces[-1].file_end - base].view(source_dtype).split(counts)
        targets = []
        for piece, count in zip(pieces, counts, strict=True):
            flat, first = self._destinations[piece.storage].flat, piece.storage_start // piece.itemsize
            targets.append(flat if count == flat.numel() else flat[first : first + count])
        if len(pieces) == 1:
            targets[0].copy_(sources[0])
        else:
            self._torch._foreach_copy_(targets, sources)

    def _event(self, stream: Any) -> Any:
        event = self._torch.cuda.Event(blocking=True, enable_timing=self._observer is not None)
        event.record(stream)
        return event

    def finish(self) -> None:
        """Wait for everything; then lay the device's own times on the host's clock and report them."""
        self._copies.synchronize()
        self._casts.synchronize()
        self._destinations = ()  # the weights are their owner's alone from here on
        self._scratch.clear()
        if self._observer is None:
            return
        reference = self._event(self._copies)  # everything has ended: this waits for nothing else
        reference.synchronize()
        now_ns = clock_ns()
        self._report("h2d", self._copied, reference, now_ns, self._observer)
        self._report("cast", self._cast, reference, now_ns, self._observer)

    def _report(self, name: str, marks: list[_Mark], reference: Any, now_ns: int, observer: Observer) -> None:
        end_ns = now_ns
        for mark in marks:
            start_ns = end_ns if mark.start is None else now_ns - int(mark.start.elapsed_time(reference) * 1e6)
            end_ns = max(start_ns, now_ns - int(mark.end.elapsed_time(reference) * 1e6))
            observer.record(Span(name, start_ns, end_ns, mark.nbytes, f"{self._device} {name}"))
        marks.clear()
