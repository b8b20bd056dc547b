"""The contract of a checkpoint format: recognise a file of it, read its header, read it with its own library.

Another format is one new file with a class that does this, and a line in `known_formats.FORMATS`; the contract that it
must keep is in `tests/contracts`. What the header says does not depend on the format any more: loads are planned from
`Checkpoint` alone, unless a format must read its tensors itself (`load_whole`).
"""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from typing import Any

    from wan_loader.formats.checkpoint_facts import Checkpoint

__all__ = ["CheckpointFormat", "Likeness"]


class Likeness(IntEnum):
    """Degrees to which the first bytes of a file look like a format."""

    NONE = 0
    LIKELY = 1
    """Only a file of this format is any use to us, but it may be something else that begins so."""
    CERTAIN = 2


class CheckpointFormat(Protocol):
    """One format. Stateless."""

    @property
    def name(self) -> str:
        """The name of the format, as in `Checkpoint.format`."""

    @property
    def stays_mapped(self) -> bool:
        """True if the format's own library leaves tensors of the CPU in the mapped file, so that a load may as well."""

    @property
    def reads_too(self) -> frozenset[str]:
        """Names of formats whose files this one reads as well, where a checkpoint has files of both."""

    @property
    def load_whole(self) -> Callable[[str, str, str | None], dict[str, Any]] | None:
        """The function that reads all tensors of a file, if the header does not say where they lie.

        Its arguments are the path, the device, and the part. None: the header says it, and loads are planned.
        """

    def likeness(self, head: bytes) -> Likeness:
        """Judge a file by its first half kilobyte."""

    def read(self, path: str, part: str | None, number: int = 0, n_storages: int = 0) -> Checkpoint:
        """Read the facts of one file, no weight; `Checkpoint.format` says which format is to load it.

        Args:
            path: The file.
            part: The part to read of a file that nests dicts, by its keys joined by dots.
            number: The position of this file among those of its checkpoint.
            n_storages: The number of storages that the files before it have.

        Raises:
            CheckpointError: Anything is damaged or unsafe, whatever the bytes are.
        """

    def reference_tensors(self, path: str, names: Sequence[str], part: str | None) -> Iterator[tuple[str, Any]]:
        """Read tensors on the CPU with the format's own library, to compare a load with; they are let go one by one."""
