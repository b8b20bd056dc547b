"""What was decided and done about a streamed module, for whoever wants to know: frozen values, printable."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from wan_loader.sizes import format_bytes, format_count, format_rate, format_seconds

if TYPE_CHECKING:
    from wan_loader.loading.report import CacheReport, LoadReport

__all__ = ["StreamReport"]


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class StreamReport:
    """The course of one streamed module until now. Amounts are bytes."""

    load: LoadReport
    """The load of everything that stays on the device."""
    blocks: tuple[str, ...]
    """The names of all blocks."""
    streamed: tuple[str, ...]
    """The names of those that are streamed; the others stay on the device."""
    n_buffers: int
    buffer_nbytes: int
    """The size of one buffer."""
    device_nbytes: int
    """What the weights take on the device: those that stay there, the buffers, and what conversions take; of modules
    that share buffers, what all of them take."""
    nbytes_mapped: int
    """Bytes of the files that come out of registered pages of the page cache, in one forward."""
    nbytes_direct: int
    """Bytes that are read from the disk past the page cache, in one forward."""
    nbytes_buffered: int
    """Bytes that are read with ordinary calls, in one forward."""
    n_mapped: int
    """The streamed blocks whose pages are registered, ..."""
    n_direct: int
    """... those that are read from the disk past the page cache, ..."""
    n_buffered: int
    """... and those that are read with ordinary calls."""
    pinned_nbytes: int
    """Pages of the page cache that are registered with the driver, until the stream is closed."""
    reason: str
    """Why the bytes come as they do."""
    read_rate: float | None = None
    """The bytes a second that the first reads from the disk came with; None where there are none."""
    cache: CacheReport | None = None
    """The part of the converted cache; None where it was not asked for."""
    n_fetched: int = 0
    """Blocks that were brought until now."""
    n_late: int = 0
    """Those among them that were asked for only when their turn had come."""
    warnings: tuple[str, ...] = ()

    def __repr__(self) -> str:
        shares = f"{len(self.streamed)} of {len(self.blocks)} blocks through {self.n_buffers} buffers"
        return f"StreamReport({self.load.target!r}, {shares}, {format_bytes(self.device_nbytes)} on the device)"

    @property
    def read_seconds(self) -> float | None:
        """The time that the reads of one forward from the disk take, by the rate of the first; None: not known."""
        return self.nbytes_direct / self.read_rate if self.read_rate and self.nbytes_direct else None

    def __str__(self) -> str:
        """Say what stays, what is streamed, and how."""
        ways = {
            "registered": (self.nbytes_mapped, self.n_mapped),
            "direct": (self.nbytes_direct, self.n_direct),
            "buffered": (self.nbytes_buffered, self.n_buffered),
        }
        shown = ", ".join(
            f"{format_bytes(nbytes)} {way} ({format_count(n_blocks, 'block')})"
            for way, (nbytes, n_blocks) in ways.items()
            if nbytes
        )
        buffers = f"{format_count(self.n_buffers, 'buffer')} of {format_bytes(self.buffer_nbytes)}"
        return "\n".join(
            [
                f"stream {len(self.streamed)} of {format_count(len(self.blocks), 'block')} through {buffers}",
                f"  device  {format_bytes(self.device_nbytes)} of weights and buffers",
                f"  each    {shown or 'nothing'}: {self.reason}",
                *([f"  disk    {cost}"] if (cost := self._cost()) else []),
                *([f"  cache   {self.cache.state}: {self.cache.reason}"] if self.cache else []),
                f"  pinned  {format_bytes(self.pinned_nbytes)} of the page cache",
                f"  until now {format_count(self.n_fetched, 'block')} came, {self.n_late} of them late",
                *(f"  note    {warning}" for warning in self.warnings),
            ]
        )

    def _cost(self) -> str | None:
        """Say what the disk costs a forward, beside which the blocks compute."""
        if not self.nbytes_direct:
            return None
        if self.read_seconds is None or self.read_rate is None:
            return f"{format_bytes(self.nbytes_direct)} a forward, at a rate that is not known yet"
        seconds, rate = format_seconds(self.read_seconds), format_rate(self.read_rate)
        return f"{format_bytes(self.nbytes_direct)} a forward at {rate}: no forward takes less than {seconds}"
