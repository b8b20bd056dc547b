"""What was decided and done about a streamed module, for whoever wants to know: frozen values, printable."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from wan_loader.sizes import format_bytes, format_count

if TYPE_CHECKING:
    from wan_loader.loading.report import LoadReport

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
    """What the weights take on the device: those that stay there, the buffers, and what conversions take."""
    nbytes_mapped: int
    """Bytes of the files that come out of registered pages of the page cache, in one forward."""
    nbytes_direct: int
    """Bytes that are read from the disk past the page cache, in one forward."""
    nbytes_buffered: int
    """Bytes that are read with ordinary calls, in one forward."""
    pinned_nbytes: int
    """Pages of the page cache that are registered with the driver, until the stream is closed."""
    reason: str
    """Why the bytes come as they do."""
    n_fetched: int = 0
    """Blocks that were brought until now."""
    n_late: int = 0
    """Those among them that were asked for only when their turn had come."""
    warnings: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Say what stays, what is streamed, and how."""
        ways = {"registered": self.nbytes_mapped, "direct": self.nbytes_direct, "buffered": self.nbytes_buffered}
        shown = ", ".join(f"{format_bytes(nbytes)} {way}" for way, nbytes in ways.items() if nbytes)
        buffers = f"{format_count(self.n_buffers, 'buffer')} of {format_bytes(self.buffer_nbytes)}"
        return "\n".join(
            [
                f"stream {len(self.streamed)} of {format_count(len(self.blocks), 'block')} through {buffers}",
                f"  device  {format_bytes(self.device_nbytes)} of weights and buffers",
                f"  each    {shown or 'nothing'}: {self.reason}",
                f"  pinned  {format_bytes(self.pinned_nbytes)} of the page cache",
                f"  until now {format_count(self.n_fetched, 'block')} came, {self.n_late} of them late",
                *(f"  note    {warning}" for warning in self.warnings),
            ]
        )
