"""What is proven of tensors: the range of a file that each one is, or the reason why that is not known. Pure.

A proof holds for the moment in which it was asked for. Whoever asks again, and gets an equal one, knows that nothing
was written in between, by whatever means.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field
from enum import Enum
from operator import itemgetter
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from wan_loader.formats.checkpoint_facts import FileFacts

__all__ = ["UNREADABLE", "FileRange", "Proof", "Reason", "pages_to_compare"]


class Reason(Enum):
    """Reasons why it is not proven that a tensor is a range of a file, each to be read after "it"."""

    NOT_PLAIN = "is no plain dense tensor on the CPU"
    EMPTY = "has no elements"
    NO_FILE = "does not lie in the mapping of a file"
    SHARED = "lies in a shared mapping, through which others may write into the file"
    NOT_READABLE = "lies in a mapping that may not be read"
    WRITTEN = "was written to"
    DELETED = "is of a file that was deleted, or whose path leads there no more"
    REPLACED = "is of a file that was replaced by another"
    UNOPENED = "is of a file that cannot be opened"
    TRUNCATED = "reaches beyond the end of its file"
    UNSURE_FILE = "is of a file on a file system that does not say whether it still is the one that was mapped"
    UNSURE_PAGES = "lies in memory of which the system does not say whether it was written to"


#: The reasons that tell of memory which nobody should look at.
UNREADABLE = (Reason.NOT_READABLE, Reason.TRUNCATED)


class FileRange(NamedTuple):
    """A tensor that is `nbytes` of file number `file` of a proof, from its first element to its last."""

    file: int
    start: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Proof:
    """The outcome for some tensors by their names: each has a range or a reason."""

    files: tuple[FileFacts, ...]
    """The files of the ranges, as they were just before the proof."""
    ranges: Mapping[str, FileRange]
    reasons: Mapping[str, Reason]
    ties: Mapping[str, str] = field(default_factory=dict)
    """Names of objects that had a name before -> the first one. Both have the range, or the reason."""

    def has_same(self, name: str, other: Proof) -> bool:
        """Say whether another proof has found the same range of the same file, as it still is."""
        found, others = self.ranges.get(name), other.ranges.get(name)
        if found is None or others is None:
            return False
        return found[1:] == others[1:] and self.files[found.file] == other.files[others.file]


def pages_to_compare(start: int, end: int, written: Sequence[tuple[int, int]], page: int) -> list[int] | None:
    """Judge the bytes at addresses `start` to `end` by the pages that were written.

    Args:
        start: The address of the first byte.
        end: The address behind the last byte.
        written: Runs of written pages, from and to, ascending, of these addresses and of any others.
        page: The bytes of a page.

    Returns:
        Addresses of written pages that hold other bytes as well, so that those may be what was written: the first and
        the last one at most. None if a page was written that holds nothing else.
    """
    edges = sorted({start // page * page, (end - 1) // page * page})
    first_run = bisect_right(written, edges[0], key=itemgetter(1))
    runs = written[first_run : bisect_right(written, edges[-1], key=itemgetter(0))]
    whole_start, whole_end = -(-start // page) * page, end // page * page
    if any(max(first, whole_start) < min(last, whole_end) for first, last in runs):
        return None
    return [edge for edge in edges if any(first <= edge < last for first, last in runs)]
