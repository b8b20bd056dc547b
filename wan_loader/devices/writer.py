"""The seam between the engine and a device: the memory that weights end up in, and how bytes get there.

Two implementations: `CudaWriter` copies asynchronously over PCIe, `CpuWriter` is its twin in host memory; a third, in
the tests, is a fake. Each thread that submits copies asks for a copy stream of its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    from wan_loader.plan.blocks import Block, Segment

__all__ = ["CopyEvent", "CopyStream", "Destination", "DeviceWriter", "HostBlock", "PinError"]


class PinError(Exception):
    """The driver refused to register host memory; the message says why. Never reaches a caller of the library."""


class CopyEvent(Protocol):
    """Submitted copies that may still be running. For the thread that submitted them."""

    def done(self) -> bool:
        """Return whether the source bytes are no longer needed."""

    def wait(self) -> None:
        """Return once the source bytes are no longer needed."""


class Destination(NamedTuple):
    """The place of a storage: the contiguous tensor `whole` owns (or views the whole of) its memory.

    `source_dtype` is the dtype in the file where the bytes are converted on the way, else None: they are copied.
    """

    whole: Any
    address: int
    source_dtype: Any = None

    @property
    def flat(self) -> Any:
        """The storage as a 1-D tensor."""
        return self.whole if self.whole.dim() == 1 else self.whole.view(-1)


class HostBlock(NamedTuple):
    """A block whose bytes are in host memory, from `address` on."""

    address: int
    block: Block
    quick: bool = False
    """True if a copy out of it is queued within microseconds: it is pinned, and few such copies are under way."""


class CopyStream(Protocol):
    """A queue of copies, in their order. For one thread, the one in which it was made."""

    def submit(self, sources: Sequence[HostBlock]) -> CopyEvent | None:
        """Start copying blocks, at least one, with as few calls as may be. None: the sources are free already.

        A block that is part of a whole may be converted only once all parts of it were submitted to this stream.
        """


class DeviceWriter(Protocol):
    """The memory that weights end up in."""

    can_pin: bool
    """True if host memory can be registered for faster copies."""

    def bind(self, destinations: Sequence[Destination]) -> None:
        """Say where the next storages go, in their order, before anything is submitted for them."""

    def place(self, segment: Segment) -> int | None:
        """Return the host address that a segment may be read to, rather than submitted; None: nowhere."""

    def stream(self) -> CopyStream:
        """Make a copy stream for this thread."""

    def pin(self, address: int, nbytes: int, *, read_only: bool) -> None:
        """Register host memory for fast copies; raises `PinError`."""

    def unpin(self, address: int) -> bool:
        """Undo `pin`, after the last copy from it, in any thread; return False if the memory is still registered."""

    def arrived(self) -> list[Segment]:
        """Return the segments that are in place, converted, since this was last asked. For one thread."""

    def finish(self) -> None:
        """Return when everything submitted has arrived. After the last `submit` of any thread."""
