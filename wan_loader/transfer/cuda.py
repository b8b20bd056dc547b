"""The CUDA target: asynchronous copies over PCIe, and conversions on the GPU right behind them.

Bytes that stay as they are go straight into their tensor. Bytes to be converted go through a bounded scratch buffer on
the device: copy, then a cast kernel on the same stream; two such lanes take turns, so that one casts while the other
copies. (A converting `.to(device, dtype)` from pinned memory leaves the DMA path and is nine times slower.)
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import cycle
from typing import TYPE_CHECKING, Any

from wan_loader.events import Span, clock_ns
from wan_loader.plan import Piece
from wan_loader.transfer import driver

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from wan_loader.events import Observer
    from wan_loader.transfer.base import Destination

__all__ = ["SCRATCH_BYTES", "CudaTarget"]

#: Device scratch of each of the two lanes that convert.
SCRATCH_BYTES = 32 << 20


@dataclass(frozen=True, slots=True)
class _Lane:
    stream: Any
    scratch: Any
    name: str


@dataclass(frozen=True, slots=True)
class _Ticket:
    events: tuple[Any, ...]

    def wait(self) -> None:
        for event in self.events:
            event.synchronize()


def _groups(pieces: Sequence[Piece], nbytes: int) -> Iterator[list[Piece]]:
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
    """One CUDA device. Must be made and used in one thread."""

    can_pin = True

    def __init__(self, index: int, observer: Observer | None = None) -> None:
        import torch

        self._torch = torch
        self._index = index
        self._observer = observer
        self._destinations: Sequence[Destination] = ()
        self._marks: list[tuple[str, int, str, Any, Any]] = []
        torch.cuda.set_device(index)
        # The allocator may hand out memory that queued work of the caller still uses: copy after that work.
        self._after = torch.cuda.current_stream(index).record_event()
        self._copy_lane = self._lane("copy", 0)
        self._cast_lanes: list[_Lane] = []
        self._next_cast: Iterator[_Lane] = iter(())

    def bind(self, destinations: Sequence[Destination]) -> None:
        """Say where storages go; makes the scratch for conversions if there are any."""
        self._destinations = destinations
        if any(d.source_dtype is not None for d in destinations):
            self._cast_lanes = [self._lane(f"cast {i}", SCRATCH_BYTES) for i in range(2)]
            self._next_cast = cycle(self._cast_lanes)

    def _lane(self, name: str, scratch_bytes: int) -> _Lane:
        device = f"cuda:{self._index}"
        stream = self._torch.cuda.Stream(device)
        stream.wait_event(self._after)
        scratch = self._torch.empty(scratch_bytes, dtype=self._torch.uint8, device=device)
        return _Lane(stream, scratch, f"{device} {name}")

    def pin(self, address: int, nbytes: int, *, read_only: bool) -> None:
        """Register host memory with the driver; raises `PinError`."""
        driver.register(address, nbytes, read_only=read_only)

    def unpin(self, address: int) -> None:
        """Undo `pin`."""
        driver.unregister(address)

    def submit(self, address: int, file_start: int, pieces: Sequence[Piece]) -> _Ticket:
        """Queue copies and casts; the source must stay until the ticket is done."""
        offset = address - file_start
        plain: list[Piece] = []
        converted: list[Piece] = []
        for piece in pieces:
            (plain if self._destinations[piece.storage].source_dtype is None else converted).append(piece)
        events = [self._convert(offset, group) for group in _groups(converted, SCRATCH_BYTES)]
        if plain:
            events.append(self._copy(offset, plain))
        return _Ticket(tuple(events))

    def _copy(self, offset: int, pieces: Sequence[Piece]) -> Any:
        lane, to = self._copy_lane, self._destinations
        start = self._event(lane)
        copies = [(to[p.storage].address + p.storage_start, offset + p.file_start, p.nbytes) for p in pieces]
        driver.copy_to_device(copies, lane.stream.cuda_stream)
        end = self._event(lane)
        self._mark("h2d", sum(p.nbytes for p in pieces), lane, start, end)
        return end

    def _convert(self, offset: int, group: Sequence[Piece]) -> Any:
        """One copy of the whole group into scratch, then a cast of each piece out of it."""
        lane = next(self._next_cast)
        base, nbytes = group[0].file_start, group[-1].file_end - group[0].file_start
        start = self._event(lane)
        driver.copy_to_device([(lane.scratch.data_ptr(), offset + base, nbytes)], lane.stream.cuda_stream)
        copied = self._event(lane)
        with self._torch.cuda.stream(lane.stream):
            for piece in group:
                destination = self._destinations[piece.storage]
                first, count = piece.storage_start // piece.itemsize, piece.nbytes // piece.itemsize
                source = lane.scratch[piece.file_start - base : piece.file_end - base].view(destination.source_dtype)
                destination.flat[first : first + count].copy_(source)
        end = self._event(lane)
        self._mark("h2d", nbytes, lane, start, copied)
        self._mark("cast", nbytes, lane, copied, end)
        return end

    def _event(self, lane: _Lane) -> Any:
        event = self._torch.cuda.Event(blocking=True, enable_timing=self._observer is not None)
        event.record(lane.stream)
        return event

    def _mark(self, name: str, nbytes: int, lane: _Lane, start: Any, end: Any) -> None:
        if self._observer is not None:
            self._marks.append((name, nbytes, lane.name, start, end))

    def finish(self) -> None:
        """Wait for all lanes; then lay the device's own times on the host's clock and report them."""
        for lane in (self._copy_lane, *self._cast_lanes):
            lane.stream.synchronize()
        if self._observer is None:
            return
        reference = self._event(self._copy_lane)  # everything has ended: this waits for nothing else
        reference.synchronize()
        now_ns = clock_ns()
        for name, nbytes, track, start, end in self._marks:
            start_ns = now_ns - int(start.elapsed_time(reference) * 1e6)
            end_ns = now_ns - int(end.elapsed_time(reference) * 1e6)
            self._observer.record(Span(name, start_ns, max(start_ns, end_ns), nbytes, track))
        self._marks.clear()
