"""The formats that are read, and which of them a file or a checkpoint is of."""

from __future__ import annotations

from typing import TYPE_CHECKING

from wan_loader.formats.checkpoint_format import Likeness
from wan_loader.formats.gguf import GgufFormat
from wan_loader.formats.safetensors import SafetensorsFormat
from wan_loader.formats.torch_formats import TorchPickleFormat, TorchZipFormat

if TYPE_CHECKING:
    from wan_loader.formats.checkpoint_facts import Checkpoint
    from wan_loader.formats.checkpoint_format import CheckpointFormat

__all__ = ["FORMATS", "format_of", "holds_weights", "is_planned", "recognise_format"]

#: The first that a file is like is taken. Safetensors comes first: its length may look like another's signature.
FORMATS: tuple[CheckpointFormat, ...] = (SafetensorsFormat(), TorchZipFormat(), TorchPickleFormat(), GgufFormat())


def recognise_format(head: bytes) -> CheckpointFormat | None:
    """Return the format of a file that begins with `head`; None for none of ours."""
    return next((known for known in FORMATS if known.likeness(head)), None)


def holds_weights(head: bytes) -> bool:
    """Say whether a file is surely a checkpoint by its first bytes, whatever it is called."""
    found = recognise_format(head)
    return found is not None and found.likeness(head) is Likeness.CERTAIN


def format_of(checkpoint: Checkpoint) -> CheckpointFormat:
    """Return the format that loads a checkpoint."""
    return next(known for known in FORMATS if known.name == checkpoint.format)


def is_planned(checkpoint: Checkpoint) -> bool:
    """Say whether the headers tell where every tensor lies, so that a load is planned."""
    return format_of(checkpoint).load_whole is None
