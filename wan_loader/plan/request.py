"""The request of a load: what was asked for, in one frozen value, whose every field was checked when it was made."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from wan_loader.arguments import (
    check_device,
    check_io,
    check_part,
    checked_paths,
    checked_slices,
    checked_strings,
    checked_threads,
)
from wan_loader.errors import KeyMismatchError, OptionError
from wan_loader.formats import Checkpoint, open_checkpoint
from wan_loader.formats.quantised import with_values
from wan_loader.plan.dtype_policy import DtypePolicy
from wan_loader.printable import some

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    from wan_loader.formats.checkpoint_facts import TensorFacts
    from wan_loader.types import StrPath

__all__ = ["LoadRequest"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadRequest:
    """Everything that one load is asked for. Making one checks every value; no file is touched."""

    source: StrPath | Sequence[StrPath] | Checkpoint
    """The place of the weights, as for `open_checkpoint`; or a checkpoint that was opened, whose headers are not read
    again.
    """
    device: str | int | torch.device = "cpu"
    policy: DtypePolicy = field(default_factory=DtypePolicy)
    """The dtype that each tensor gets."""
    part: str | None = None
    """The dict to load, of a file that nests dicts."""
    names: tuple[str, ...] | None = None
    """The tensors to load, the most urgent first; None: all, in file order."""
    io: str = "auto"
    threads: int | None = None
    """The reads side by side; None: the plan chooses."""
    owned: bool = False
    """True if no tensor may stay in the mapped file."""
    slices: Mapping[str, tuple[slice, ...]] = field(default_factory=dict)
    """The parts of tensors that are wanted in place of the whole, by name: a slice for each of the first dimensions."""
    makes_values: bool = False
    """True if a dtype has quantised tensors become the numbers that they stand for; else it leaves them out of account,
    as other libraries do.
    """
    piecemeal: bool = False
    """True if tensors are handed out as they arrive, and may be let go before the last is there: so there need be room
    for the largest one only, and nothing is registered with the driver that would be known to be there at the end only.
    """

    def __post_init__(self) -> None:
        check_device(self.device)
        check_io(self.io)
        # a frozen value is normalised in place, once, before anybody has seen it
        object.__setattr__(self, "threads", checked_threads(self.threads))
        check_part(self.part)
        if isinstance(self.source, Checkpoint):
            if self.part not in (None, self.source.part):
                raise OptionError(
                    f"part={self.part!r:.60}: the checkpoint was opened for part {self.source.part!r:.60}"
                )
        else:
            object.__setattr__(self, "source", checked_paths(self.source))
        if self.names is not None:
            object.__setattr__(self, "names", checked_strings(self.names, "names"))
        object.__setattr__(self, "slices", checked_slices(self.slices))
        if self.names is not None and (beside := self.slices.keys() - set(self.names)):
            raise OptionError(f"slices has tensors that names leaves out: {some(sorted(beside))}")

    def open(self) -> Checkpoint:
        """Read the headers, unless that was done; no weight is read. Raises the errors of `open_checkpoint`."""
        held = self.source if isinstance(self.source, Checkpoint) else open_checkpoint(self.source, part=self.part)
        return with_values(held) if self.makes_values and self.policy.dtype is not None else held

    def select(self, checkpoint: Checkpoint) -> Sequence[TensorFacts]:
        """Return the wanted tensors, the most urgent first; `KeyMismatchError` for names that are not there."""
        if self.names is None:
            return checkpoint.tensors
        by_name = {tensor.name: tensor for tensor in checkpoint.tensors}
        if missing := [name for name in self.names if name not in by_name]:
            message = f"{checkpoint.path} lacks {len(missing)} of the names asked for: {some(missing)}"
            raise KeyMismatchError(message, missing=missing, path=checkpoint.path)
        # a name that was given twice is loaded once
        return [by_name[name] for name in dict.fromkeys(self.names)]
