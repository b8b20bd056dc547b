"""What is in the places of a module goes to a device: one load from files, one from memory, and then it is bound."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from wan_loader.dtypes import dtype_name
from wan_loader.errors import WanLoaderError
from wan_loader.events import clock_ns
from wan_loader.fastpath.deferral.waiting_cast import with_casts
from wan_loader.fastpath.moving.loads import load
from wan_loader.fastpath.moving.memory_moves import fetch_memory
from wan_loader.fastpath.moving.origins import Origin
from wan_loader.fastpath.moving.slots import Slot, bind
from wan_loader.plan.dtype_policy import DtypePolicy
from wan_loader.provenance.as_checkpoint import as_checkpoint
from wan_loader.provenance.proof import UNREADABLE
from wan_loader.provenance.prove import prove

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from wan_loader.fastpath.deferral.waiting_cast import WaitingCast
    from wan_loader.fastpath.tally import Tally
    from wan_loader.formats.checkpoint_facts import Checkpoint
    from wan_loader.provenance.proof import Proof
    from wan_loader.types import IoMode

__all__ = ["Fetching"]


class Fetching(NamedTuple):
    """One move of a module."""

    component: str
    """The name for the tally."""
    device: torch.device
    dtype: torch.dtype | None
    """What floating tensors become on the way; None: they stay as they are, and casts that wait are done."""
    io: IoMode
    min_memory_nbytes: int
    """Less than this of what is in no file is left."""
    tally: Tally
    keep: bool = False
    """True if what the keeper holds is taken from there."""

    def fetch(self, slots: Mapping[str, Slot], casts: Mapping[str, WaitingCast]) -> list[tuple[Slot, Origin]]:
        """Bring what is in some places to the device, as far as that is certain, and bind it once it has arrived.

        Args:
            slots: Places of plain tensors and of tensors that wait, by names of the caller's choice.
            casts: What those wait for, by the same names.

        Returns:
            The places of what has come from files, and from where.
        """
        # each place of a buffer gets a tensor of its own, as in the original; a parameter in several stays one object
        tensors = {n: s.tensor if s.is_parameter else s.tensor.detach() for n, s in slots.items() if n not in casts}
        proof = prove(tensors)
        fetched = self._fetch_memory({name: tensors[name] for name in proof.reasons}, proof)
        whole = with_casts(proof, casts, _ties({name: slots[name] for name in casts}))
        exact = {name: cast.target for name, cast in casts.items() if cast.converts}
        policy = DtypePolicy(dtype_name(self.dtype), exact=exact)
        if whole.ranges:
            fetched |= self._fetch_files(whole, tensors, policy)
        origins = []
        for name, tensor in fetched.items():
            if name in whole.ties:  # the same object
                continue
            if not bind(slots[name], tensor, casts.get(name)):
                self.tally.leave("was settled meanwhile, or is held by C++ code", tensor.nbytes)
                continue
            if name in exact:
                self.tally.saved("casts on the CPU", nbytes=tensor.nbytes)
            if (place := whole.ranges.get(name)) is not None:
                target = policy.target(name, place.dtype)
                origins.append((slots[name], Origin(whole.files[place.file], place, target)))
        return origins

    def _fetch_memory(self, tensors: Mapping[str, torch.Tensor], proof: Proof) -> dict[str, torch.Tensor]:
        """Load what is in no file, out of this process's memory."""
        fetched = fetch_memory(
            self.component,
            {name: tensor for name, tensor in tensors.items() if proof.reasons[name] not in UNREADABLE},
            proof.ties,
            self.device,
            self.dtype,
            min_nbytes=self.min_memory_nbytes,
            tally=self.tally,
        )
        for name in tensors.keys() - fetched.keys():
            self.tally.leave(proof.reasons[name].value, tensors[name].nbytes)
        return fetched

    def _fetch_files(
        self, proof: Proof, tensors: Mapping[str, torch.Tensor], policy: DtypePolicy
    ) -> dict[str, torch.Tensor]:
        """Load what is proven; return it once everything has arrived, without those of `tensors` that changed."""
        start_ns, source = clock_ns(), as_checkpoint(proof)
        kept = self._attach(source, policy)
        left = tuple(name for name in source.names if name not in kept) if kept else None
        try:
            loaded = load(source, self.device, policy=policy, io=self.io, names=left)
        except (WanLoaderError, OSError) as error:
            nbytes = sum(found.nbytes for found in proof.ranges.values())
            self.tally.leave_after(error, nbytes)
            return {}
        again = prove({name: tensors[name] for name in proof.ranges if name in tensors})
        fetched = {**loaded.tensors, **kept}
        for name in tensors.keys() & proof.ranges.keys():
            if not again.has_same(name, proof):
                self.tally.leave("was written to meanwhile", fetched.pop(name).nbytes)
        self.tally.served(self.component, loaded.report.nbytes_file, (clock_ns() - start_ns) / 1e9)
        return fetched

    def _attach(self, source: Checkpoint, policy: DtypePolicy) -> dict[str, torch.Tensor]:
        """Take what is kept, if that was asked for; the memory is others', too."""
        if not self.keep:
            return {}
        from wan_loader.keeper.attached import attach_ranges

        kept = attach_ranges(source, policy, self.device)
        if kept:
            self.tally.saved("loads of kept tensors", len(kept), sum(tensor.nbytes for tensor in kept.values()))
        return kept


def _ties(slots: Mapping[str, Slot]) -> dict[str, str]:
    """Return which parameters are one object with an earlier one."""
    first: dict[int, str] = {}
    ties = {}
    for name, slot in slots.items():
        if slot.is_parameter and (other := first.setdefault(id(slot.tensor), name)) != name:
            ties[name] = other
    return ties
