"""Weights that a library is about to give a model: what they are in their files, and what the model wants them to be.

A seam that knows both has them served before the library touches them: on the CPU as tensors whose conversion waits
(`deferred`), for a device as tensors that one plan has brought there (`moves`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from wan_loader.fastpath.deferral.deferred import defer_all

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from wan_loader.fastpath.moving.moves import Moves

__all__ = ["Wanted", "serve"]


class Wanted(NamedTuple):
    """A weight on the CPU, and the dtype that it is to become; None: it stays as it is."""

    tensor: torch.Tensor
    dtype: torch.dtype | None

    @property
    def target(self) -> torch.dtype:
        """The dtype that it will have."""
        return self.tensor.dtype if self.dtype is None else self.dtype

    @property
    def converts(self) -> bool:
        """Whether it becomes something else."""
        return self.target != self.tensor.dtype

    @property
    def is_plain(self) -> bool:
        """Whether it is as it comes from a file: no parameter, nothing of a class of its own."""
        import torch

        return type(self.tensor) is torch.Tensor and not self.tensor.requires_grad


def serve(component: str, wanted: Mapping[str, Wanted], device: torch.device, moves: Moves) -> dict[str, torch.Tensor]:
    """Return what weights become, of those of which that is certain.

    Args:
        component: Whom they are for, to be told in the tally.
        wanted: Weights by names of the caller's choice. They stay as they are.
        device: Where they are to be.
        moves: Fetches what goes to a device.

    Returns:
        Tensors with exactly the values of `.to(device, dtype)`, by the same names. The others are the caller's to see
        to; none has changed.
    """
    import torch

    is_move = device != torch.device("cpu")
    if is_move and not moves.plans_to(device):
        moves.tally.leave(f"goes to a device of kind {device.type}")
        return {}
    weights = {name: weight for name, weight in wanted.items() if weight.is_plain and (is_move or weight.converts)}
    if sum(weight.tensor.nbytes for weight in weights.values()) < moves.min_nbytes:
        return {}
    casts = {name: weight for name, weight in weights.items() if weight.converts}
    dtypes = {name: weight.target for name, weight in casts.items()}
    values = defer_all({name: weight.tensor for name, weight in casts.items()}, dtypes, moves.tally)
    if not is_move:
        return values
    # aliases of the others: a move changes tensors, and the caller may hold these
    aliases = {name: weight.tensor.detach() for name, weight in weights.items()}
    return moves.fetch_tensors(component, aliases | values, device)
