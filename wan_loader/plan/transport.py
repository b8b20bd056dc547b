"""The transport of each range, by its residency in the page cache and by what the system allows. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from wan_loader.plan.blocks import Transport
from wan_loader.system.page_cache import Knowledge

if TYPE_CHECKING:
    from collections.abc import Collection

    from wan_loader.system.page_cache import Residency

__all__ = ["TransportRule", "explain", "is_uniform"]

#: From this share of resident pages on, fetching only the missing ones saves more than O_DIRECT gains.
_MIN_RESIDENT_SHARE = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class TransportRule:
    """The rule by which the bytes of a file get their transport.

    Resident pages are mapped for the GPU where that is faster, and else read with ordinary calls; always so for the
    CPU, where a mapped file that shrinks would kill the process. Cold ranges are read with O_DIRECT, which leaves the
    page cache as it was. Of a range that is partly there, an ordinary read fetches only the rest; O_DIRECT would fetch
    all of it.
    """

    io: str
    may_map: bool
    """True if the device can fetch mapped pages, is best served so, and this process need not see the bytes."""
    residency: Residency
    direct_refused: Collection[int] = ()
    """The files that cannot be read with O_DIRECT."""

    def __call__(self, file: int, start: int, end: int) -> Transport:
        """Return the transport of bytes `start` to `end` of file number `file`."""
        if self.io == "mapped":
            return Transport.MAPPED
        if self.io == "buffered":
            return Transport.BUFFERED
        # io="direct" was asked for to leave the page cache alone: what is resident there is read past it as well
        share = 0.0 if self.io == "direct" else self.residency.share(file, start, end)
        if share == 1.0 and self.may_map:
            return Transport.MAPPED
        return Transport.BUFFERED if share >= _MIN_RESIDENT_SHARE or file in self.direct_refused else Transport.DIRECT


def is_uniform(io: str, resident: int, nbytes: int) -> bool:
    """Return whether all blocks of a file travel alike: one transport was asked for, or all or nothing is resident."""
    return io != "auto" or resident == 0 or resident >= nbytes


def explain(
    asked: str, io: str, resident: int, nbytes: int, nbytes_viewed: int, knowledge: Knowledge = Knowledge.EXACT
) -> str:
    """Say in one sentence why the bytes travel as they do.

    Args:
        asked: The mode that was asked for.
        io: The mode that is used, which may be another.
        resident: The wanted bytes that are in the page cache.
        nbytes: The wanted bytes.
        nbytes_viewed: The bytes that stay in the mapped file.
        knowledge: The quality of what is known about the page cache.
    """
    if nbytes == 0:
        return "there are no bytes to move"
    why = _cached(resident / nbytes, knowledge) if asked == "auto" else f"io={asked} was asked for"
    if nbytes_viewed:
        why += "; tensors that need no conversion are views of the file, whose pages are read when first used"
    if io != asked and nbytes_viewed < nbytes:
        why += "; what this process copies, converts or checks is read: a mapped file that shrinks would end it"
    return why


def _cached(share: float, knowledge: Knowledge) -> str:
    if knowledge is Knowledge.UNKNOWN:
        return f"how much is in the page cache is {knowledge.value}; what is unknown counts as cold"
    cached = "everything" if share >= 1 else "nothing" if share == 0 else f"{share:.0%}"
    return f"{cached} is in the page cache" + (f" ({knowledge.value})" if knowledge.value else "")
