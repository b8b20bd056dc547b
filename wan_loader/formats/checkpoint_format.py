"""What a checkpoint format is: how a file of it is recognised, what its header says, and who else reads it.

Another format is one new file with a class that does this, and a line in `known.FORMATS`; the contract that it must
keep is in `tests/contracts`. What the header says does not depend on the format any more: loads are planned from
`Checkpoint` alone, unless a format must read its tensors itself (`load_whole`).
"""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from typing import Any

    from wan_loader.formats.facts import Checkpoint

__all__ = ["CheckpointFormat", "Likeness"]


class Likeness(IntEnum):
    """How much the first bytes of a file look like a format."""

    NONE = 0
    LIKELY = 1
    """Only a file of this format is any use to us, but it may be something else that begins so."""
    CERTAIN = 2


class CheckpointFormat(Protocol):
    """One format. Stateless."""

    @property
    def name(self) -> str:
        """As in `Checkpoint.format`."""

    @property
    def stays_mapped(self) -> bool:
        """Whether the format's own library leaves tensors of the CPU in the mapped file, so that a load may as well."""

    @property
    def reads_too(self) -> frozenset[str]:
        """Names of formats whose files this one reads as well, where a checkpoint has files of both."""

    @property
    def load_whole(self) -> Callable[[str, str, str | None], dict[str, Any]] | None:
        """Reads all tensors of a file, onto a device, of one part, if the header does not say where they lie.

        None: it does, and loads are planned.
        """

    def likeness(self, head: bytes) -> Likeness:
        """Judge a file by its first half kilobyte."""

    def read(self, path: str, part: str | None, number: int = 0, n_storages: int = 0) -> Checkpoint:
        """Read the facts of one file, no weight; `Checkpoint.format` says which format is to load it.

        part: of a file that nests dicts, the one to read, by its keys joined by dots.
        number, n_storages: of its checkpoint, which file this is, and how many storages the files before it have.

        Raises `CheckpointError` for anything damaged or unsafe, whatever the bytes are.
        """

    def reference_tensors(self, path: str, names: Sequence[str], part: str | None) -> Iterator[tuple[str, Any]]:
        """Read tensors on the CPU with the format's own library, to compare a load with; they are let go one by one."""
