"""Casts that wait: what `.to(dtype)` of a tensor in a mapped file gives, done when somebody looks, or never.

When a cast is asked for, the tensor is proven to be a range of its file, and the file's facts are noted. From then on
that range is what counts, whatever is written to the tensor: it is read by calls, so that a file which was shortened is
an error that names it, not the end of the process. The file is kept open, and may be deleted or replaced meanwhile;
what this process itself writes to it comes after the casts (`deferred_tensor.settle_file`).

What comes back from a device and still is a range of a file (`returns`) waits in the same way, perhaps only to be read.
"""

from __future__ import annotations

import ctypes
import os
import threading
import weakref
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

from wan_loader.devices.torch_threads import UNDIVIDED
from wan_loader.dtypes import torch_dtype
from wan_loader.errors import CheckpointError, WanLoaderError
from wan_loader.fastpath.moving.loads import load
from wan_loader.formats.checkpoint_facts import contiguous_strides
from wan_loader.plan.dtype_policy import DtypePolicy
from wan_loader.provenance.as_checkpoint import as_checkpoint
from wan_loader.provenance.proof import Proof
from wan_loader.provenance.prove import prove
from wan_loader.system.files import close_own

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from wan_loader.fastpath.tally import Tally
    from wan_loader.formats.checkpoint_facts import FileFacts
    from wan_loader.provenance.proof import FileRange

__all__ = ["FLOATS", "SourceFile", "WaitingCast", "find_casts", "with_casts"]

#: Casts between these are the same wherever they are done.
FLOATS = {"torch.float64", "torch.float32", "torch.bfloat16", "torch.float16"}

#: From so many bytes on, several threads that read and convert are worth a plan.
_PLANNED_BYTES = 32 << 20


class SourceFile:
    """A file that casts wait for, kept open until the last of them is gone."""

    def __init__(self, facts: FileFacts) -> None:
        """Open the file.

        Raises:
            OSError: It cannot be opened.
            CheckpointError: It was changed since the facts were taken.
        """
        self.facts = facts
        self.fd = os.open(facts.path, os.O_RDONLY | os.O_CLOEXEC)
        # not at exit: whoever runs then may look, too
        weakref.finalize(self, close_own, self.fd, os.fstat(self.fd)).atexit = False
        facts.check_opened(self.fd)

    def check(self) -> None:
        """Raise `CheckpointError` if the content was changed; a file that was deleted or replaced is still there."""
        now, facts = os.fstat(self.fd), self.facts
        is_as_noted = (now.st_size, now.st_mtime_ns) == (facts.nbytes, facts.mtime_ns)
        # that its name was taken away is a change of the file, too, but not of its content
        if not is_as_noted or (now.st_ctime_ns != facts.ctime_ns and self._is_at_its_path()):
            raise CheckpointError.because(
                f"was modified ({facts.nbytes} bytes before, {now.st_size} now) before its tensors were converted",
                "load it again; to change a file that is in use, write another one and rename it",
                path=facts.path,
            )

    def _is_at_its_path(self) -> bool:
        try:
            return self.is_of(os.stat(self.facts.path))
        except OSError:
            return False

    def is_of(self, facts: os.stat_result) -> bool:
        """Say whether this is the file of which somebody has asked."""
        return (facts.st_ino, facts.st_dev) == (self.facts.inode, self.facts.device)

    def read_into(self, memory: memoryview, start: int) -> None:
        """Fill memory with the bytes from `start` on.

        Raises:
            CheckpointError: The file ends before, or cannot be read.
        """
        while memory:
            try:
                count = os.preadv(self.fd, [memory], start)
            except OSError as error:
                raise CheckpointError.because(f"cannot be read: {error.strerror}", path=self.facts.path) from error
            if not count:
                self.check()
                raise CheckpointError.because(f"ends at byte {start}", path=self.facts.path)
            memory, start = memory[count:], start + count


class WaitingCast:
    """A cast to `dtype` of a contiguous range of a file; several tensors may share its outcome.

    Of a range that was on a device and came back, there is no `source`, and perhaps nothing to convert (`returns`).
    """

    def __init__(
        self, source: torch.Tensor | None, dtype: torch.dtype, file: SourceFile, place: FileRange, tally: Tally
    ) -> None:
        self.source = source
        self.dtype = dtype
        self.file = file
        self.place = place._replace(file=0)
        self.shape = place.shape
        self.tally = tally
        self.lock = threading.RLock()
        """Held while it is done, and while a tensor is given its outcome."""
        self._done: torch.Tensor | None = None

    @property
    def is_done(self) -> bool:
        """Whether the outcome exists: from then on it counts, and not the file."""
        return self._done is not None

    @property
    def target(self) -> str:
        """The name of the dtype that it gives."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def converts(self) -> bool:
        """Whether it gives another dtype than the file's; else it only reads."""
        return self.target != self.place.dtype

    def outcome(self) -> torch.Tensor:
        """Return a plain tensor with exactly what `source.to(dtype)` was, the same each time; no mode may be active.

        Raises:
            CheckpointError: The file was modified meanwhile, or cannot be read.
        """
        with self.lock:
            if self._done is None:
                # `.data`: how it was made counts as no writes to it (`_version`)
                self._done = self._convert().data
                done = "cast on the CPU" if self.converts else "read into memory"
                self.tally.leave(f"was {done}, as somebody looked at it", self._done.nbytes)
            return self._done

    def _convert(self) -> torch.Tensor:
        if self.place.nbytes >= _PLANNED_BYTES:
            try:
                return self._load()
            except WanLoaderError:  # its path leads there no more, or it was modified: the descriptor tells
                pass
        return self._read()

    def _load(self) -> torch.Tensor:
        proof = Proof((self.file.facts,), {"": self.place}, {})
        policy = DtypePolicy(exact={"": self.target})
        return load(as_checkpoint(proof), "cpu", policy=policy, owned=True).tensors[""]

    def _read(self) -> torch.Tensor:
        """Convert piece by piece, each while it is in the processor's cache."""
        import torch

        outcome = torch.empty(self.place.shape, dtype=self.dtype, device="cpu")
        flat, count = outcome.view(-1), outcome.numel()
        buffer = torch.empty(min(count, UNDIVIDED), dtype=torch_dtype(self.place.dtype), device="cpu")
        itemsize = buffer.dtype.itemsize
        memory = memoryview((ctypes.c_char * buffer.nbytes).from_address(buffer.data_ptr())).cast("B")
        for first in range(0, count, UNDIVIDED):
            number = min(UNDIVIDED, count - first)
            self.file.read_into(memory[: number * itemsize], self.place.start + first * itemsize)
            flat[first : first + number].copy_(buffer[:number])
        self.file.check()
        return outcome


def find_casts(
    sources: Mapping[str, torch.Tensor], dtypes: Mapping[str, torch.dtype], tally: Tally
) -> dict[str, WaitingCast]:
    """Return the casts that may wait, of those that are asked for: of tensors that are proven to be ranges of files.

    Costs some milliseconds, and 10 microseconds a tensor. No mode of torch may be active.

    Args:
        sources: Tensors by names of the caller's choice.
        dtypes: What each becomes.
        tally: Is told why casts may not wait, and later which were done on the CPU.
    """
    proof = prove({name: source for name, source in sources.items() if _may_wait(source, dtypes[name])})
    for name, reason in proof.reasons.items():
        tally.leave(reason.value, sources[name].nbytes)
    files = dict[int, SourceFile]()
    for number, facts in enumerate(proof.files):
        with suppress(OSError, CheckpointError):
            files[number] = SourceFile(facts)
    return {
        name: WaitingCast(sources[name], dtypes[name], files[place.file], place, tally)
        for name, place in proof.ranges.items()
        if place.file in files
    }


def _may_wait(source: torch.Tensor, dtype: torch.dtype) -> bool:
    import torch

    if type(source) not in (torch.Tensor, torch.nn.Parameter) or source.layout != torch.strided:
        return False
    is_cast = source.dtype != dtype and {str(source.dtype), str(dtype)} <= FLOATS
    follows = source.requires_grad and torch.is_grad_enabled()
    # of those that are contiguous, too, some have strides that others would not have, and keep them
    is_usual = source.stride() == contiguous_strides(tuple(source.shape))
    return is_cast and not follows and source.device.type == "cpu" and is_usual


def with_casts(proof: Proof, casts: Mapping[str, WaitingCast], ties: Mapping[str, str]) -> Proof:
    """Return a proof of the sources of some casts as well, as they were when the casts were asked for. Pure.

    Args:
        proof: The proof of other tensors.
        casts: Casts that are not done, by names that the proof does not have.
        ties: Names of casts that are one object with another -> the name of that.
    """
    numbers = {facts: number for number, facts in enumerate(proof.files)}
    ranges = dict(proof.ranges)
    for name, cast in casts.items():
        ranges[name] = cast.place._replace(file=numbers.setdefault(cast.file.facts, len(numbers)))
    return replace(proof, files=tuple(numbers), ranges=ranges, ties={**proof.ties, **ties})
