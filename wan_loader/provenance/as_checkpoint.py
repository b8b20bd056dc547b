"""Proven ranges as a checkpoint, so that a load fetches the tensors from their files, in one plan. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from wan_loader.formats.checkpoint_facts import Checkpoint, StorageFacts, TensorFacts

if TYPE_CHECKING:
    from wan_loader.provenance.proof import Proof

__all__ = ["as_checkpoint"]


def as_checkpoint(proof: Proof) -> Checkpoint:
    """Return the proven tensors as a checkpoint, under their names; whatever is not proven is left out.

    Each tensor gets memory of its own once loaded, as `.to(device)` gives it, even if it shares bytes of the file with
    another: such bytes are read for each. Only names of one object share.

    Loaded tensors have the strides that they have now. The files must stay as they were proven: otherwise the load is a
    `CheckpointError`.
    """
    names = sorted(proof.ranges, key=lambda name: proof.ranges[name][:3])
    numbers = {name: number for number, name in enumerate(name for name in names if name not in proof.ties)}
    tensors = []
    for name in names:
        place = proof.ranges[name]
        number = numbers[proof.ties.get(name, name)]
        tensors.append(TensorFacts(name, place.dtype, place.shape, number, place.stride))
    # as safetensors: on the CPU, what is not converted may stay in the mapped file, where it is now
    return Checkpoint(
        path=proof.files[0].path if proof.files else "",
        format="safetensors",
        files=proof.files,
        storages=tuple(StorageFacts(*proof.ranges[name][:3]) for name in numbers),
        tensors=tuple(tensors),
    )
