"""Weights that come back from a GPU as they went there: they wait for their files, as before, and nothing is copied.

Offloading moves modules to a GPU and back again, mostly unchanged. A plain move back copies all of it into fresh
memory, and the next one there reads that memory. But what was fetched from files (`fetching`) is in the files still. So
it is noted what each tensor on a device was fetched from (`origins`). When a module moves to the CPU, those ranges are
read to the device once more, piece by piece, and compared there, bit for bit, with what the module has, which the link
does many times as fast as a plain copy back. What is equal becomes a tensor that waits for its file (`deferred`): it
knows all but its values, and is an ordinary one, with memory of its own, as soon as somebody looks.

    candidates -> their origins -> files -> pieces -> compared on the device -> bind -> the original call

A note proves nothing: if somebody has changed the weights since, in whatever way, or something else is at their
address, they are not equal. Whatever is not certain is left to the original.
"""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING, NamedTuple

import torch

from wan_loader.dtypes import ITEMSIZE, torch_dtype
from wan_loader.errors import CheckpointError, WanLoaderError
from wan_loader.fastpath.deferral.deferred_tensor import defer_parameter, give
from wan_loader.fastpath.deferral.module_casts import is_hooked
from wan_loader.fastpath.deferral.waiting_cast import FLOATS, SourceFile, WaitingCast
from wan_loader.fastpath.moving.loads import PIECE_BYTES, load_pieces
from wan_loader.fastpath.moving.slots import Slot, is_plain, slots_of
from wan_loader.formats.checkpoint_facts import contiguous_strides
from wan_loader.provenance.as_checkpoint import as_checkpoint
from wan_loader.provenance.proof import FileRange, Proof

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from wan_loader.fastpath.moving.origins import Origin, Origins
    from wan_loader.fastpath.tally import Tally
    from wan_loader.formats.checkpoint_facts import FileFacts
    from wan_loader.types import IoMode

__all__ = ["Returns"]

#: Bits are compared as integers: a number that is none is equal to itself then.
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class _Found(NamedTuple):
    """A tensor on a device, with what is noted of it."""

    slot: Slot
    origin: Origin

    @property
    def nbytes(self) -> int:
        """The bytes that would be copied back."""
        return self.slot.tensor.nbytes


class Returns(NamedTuple):
    """The way back of one module."""

    origins: Origins
    """What is known of tensors; what is known of the module's is forgotten."""
    kinds: Sequence[str]
    """The devices that it may have moved to, by their kinds or their names."""
    io: IoMode
    min_nbytes: int
    """Less than this is left."""
    tally: Tally

    def give_back(self, module: torch.nn.Module) -> None:
        """Have what a module had from files wait for them again, as far as that is certain to be the same.

        Args:
            module: The module, as it is before it moves to the CPU.
        """
        found = self._find(module)
        if sum(one.nbytes for one in found) < self.min_nbytes:
            return
        files = _open({one.origin.file for one in found})
        known = [one for one in found if one.origin.file in files and _may_wait(one)]
        devices = {one.slot.tensor.device for one in known}
        try:
            equal = [one for device in devices for one in self._equal(known, device)]
        except (WanLoaderError, OSError, RuntimeError) as error:  # the device may have no room
            self.tally.leave_after(error, doing="comes back, ")
            return
        returned, nbytes = 0, sum(one.nbytes for one in found)
        for one in equal:
            size = one.nbytes
            if self._bind(one, files[one.origin.file]):
                self.tally.saved("copies back to the CPU", nbytes=size)
                returned += size
        if returned < nbytes:
            self.tally.leave("comes back, and is not known to be what is in its file", nbytes - returned)

    def _find(self, module: torch.nn.Module) -> list[_Found]:
        """Return what is noted of the module's tensors."""
        return [
            _Found(slot, origin)
            for slot in slots_of(module)
            # which is found once, where a parameter has several places
            if self._is_candidate(slot) and (origin := self.origins.take(slot.tensor)) is not None
        ]

    def _is_candidate(self, slot: Slot) -> bool:
        """Say whether a plain move would give a tensor memory of its own, with the same bits, and nothing else."""
        tensor, device = slot.tensor, slot.tensor.device
        return (
            is_plain(tensor)
            # the CPU stands in for a GPU under its name with an index, which tensors do not keep
            and not {device.type, str(device), f"{device}:0"}.isdisjoint(self.kinds)
            and tensor.is_leaf
            and tensor.grad is None
            and (slot.is_parameter or not tensor.requires_grad)
            and not tensor.is_inference()
            and not is_hooked(tensor)
        )

    def _equal(self, found: list[_Found], device: torch.device) -> list[_Found]:
        """Return those tensors on a device that are what they were fetched from, bit for bit."""
        here = [one for one in found if one.slot.tensor.device == device]
        proof, places = _cut(here)
        if (pieces := load_pieces(as_checkpoint(proof), device, io=self.io)) is None:
            self.tally.leave("comes back, and its file is not in memory any more")
            return []
        flat = [one.slot.tensor.detach().view(-1) for one in here]
        # on the device, and asked once: each answer would wait for all that was queued before
        differs = torch.zeros(len(here), dtype=torch.bool, device=device)
        with torch.no_grad(), closing(pieces):
            for name, piece in pieces:
                number, start = places[name]
                mine = flat[number][start : start + piece.numel()]
                differs[number].logical_or_(_is_other(mine, piece))
                del piece
        return [one for one, is_other in zip(here, differs.tolist(), strict=True) if not is_other]

    def _bind(self, one: _Found, file: SourceFile) -> bool:
        """Have a tensor wait; return False if C++ holds it."""
        slot, origin = one
        cast = WaitingCast(None, torch_dtype(origin.target), file, origin.place, self.tally)
        if slot.is_parameter:
            return defer_parameter(slot.tensor, cast)
        slot.owner[slot.key] = give(cast)
        return True


def _open(facts: set[FileFacts]) -> dict[FileFacts, SourceFile]:
    """Open the files that are as they were."""
    files = {}
    for one in facts:
        try:
            files[one] = SourceFile(one)
        except (OSError, CheckpointError):
            continue
    return files


def _may_wait(one: _Found) -> bool:
    """Say whether a range can be compared, is in order, and gives the same wherever it is converted."""
    place, target, converts = one.origin.place, one.origin.target, one.origin.converts
    is_in_order = place.stride == contiguous_strides(place.shape)
    is_sure = not converts or {f"torch.{place.dtype}", f"torch.{target}"} <= FLOATS
    return is_in_order and is_sure and ITEMSIZE[target] in _INTEGERS


def _cut(found: Sequence[_Found]) -> tuple[Proof, Mapping[str, tuple[int, int]]]:
    """Cut what tensors were fetched from into pieces.

    Returns:
        The pieces, as if they had been proven, and for the name of each the number of its tensor, and its first element
        there.
    """
    numbers = {file: number for number, file in enumerate({one.origin.file: None for one in found})}
    ranges, places = dict[str, FileRange](), dict[str, tuple[int, int]]()
    for number, (_, (file, place, _)) in enumerate(found):
        itemsize = ITEMSIZE[place.dtype]
        for start in range(0, place.nbytes, PIECE_BYTES):
            nbytes = min(PIECE_BYTES, place.nbytes - start)
            name, shape = f"{number}+{start}", (nbytes // itemsize,)
            ranges[name] = FileRange(numbers[file], place.start + start, nbytes, place.dtype, shape, (1,))
            places[name] = number, start // itemsize
    return Proof(tuple(numbers), ranges, {}), places


def _is_other(mine: torch.Tensor, piece: torch.Tensor) -> torch.Tensor:
    """Say, as a tensor on their device, whether some bits differ from those of a file, once converted."""
    bits = _INTEGERS[mine.dtype.itemsize]
    differs = (mine.view(bits) != piece.to(mine.dtype).view(bits)).any()
    if piece.dtype != mine.dtype:
        # what is no number has other bits if it is converted elsewhere, as it will be
        differs |= mine.isnan().any()
    return differs
