"""Modules that move to a GPU: one plan fetches all that still is as in its files, then the original call finds it done.

Nothing is hooked when files are loaded. When a module moves, its parameters and buffers on the CPU are asked where they
come from (`provenance`); those that are ranges of files, proven, are read from there straight to the device, converted
on the way, in one load. Then each parameter is given its new memory as `torch.nn.Module._apply` does it (`p.data =
new`), each buffer its new tensor, and the original call goes on: it finds those tensors where they are to be, and moves
the rest. So objects, ties, hooks, gradients and optimisers stay what they are.

    move -> candidates -> proof -> one load -> the same proof again -> bind -> the original call

Whatever is not certain is left to the original, with the reason kept for the report; so is the whole call where the
load fails: nothing is bound before everything has arrived.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from wan_loader.api import load
from wan_loader.errors import WanLoaderError
from wan_loader.events import clock_ns
from wan_loader.fastpath.modes import why_not_now
from wan_loader.fastpath.ours import ours
from wan_loader.fastpath.tally import Tally
from wan_loader.provenance.as_checkpoint import as_checkpoint
from wan_loader.provenance.prove import prove

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import torch

    from wan_loader.fastpath.patches import Patches
    from wan_loader.types import IoMode

__all__ = ["Moves"]

#: Less than this is moved sooner than it is planned.
_MIN_BYTES = 16 << 20


class _Slot(NamedTuple):
    """The place of a tensor in a module."""

    owner: dict[str, Any]
    key: str
    tensor: torch.Tensor
    is_parameter: bool


@dataclass(slots=True)
class Moves:
    """The seam of moves: `torch.nn.Module.to` and `.cuda`. The tally counts what moved by plan and what did not."""

    tally: Tally = field(default_factory=Tally)
    kinds: Sequence[str] = ("cuda",)
    """The kinds of devices that moves are planned to."""
    io: IoMode = "auto"
    min_nbytes: int = _MIN_BYTES

    def install(self, patches: Patches) -> None:
        """Replace both methods, for all modules of the process."""
        for name in ("to", "cuda"):
            patches.replace("torch.nn.modules.module", f"Module.{name}", partial(self._instead_of, name))

    def _instead_of(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def moved(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
            if (target := _target(name, args, kwargs)) is not None and target[0].type in self.kinds:
                with ours():
                    self.fetch(module, *target)
            return original(module, *args, **kwargs)

        return moved

    def fetch(self, module: torch.nn.Module, device: torch.device, dtype: torch.dtype | None) -> None:
        """Bring what is proven to be ranges of files to a device, as far as that is certain.

        Args:
            module: The module, as it is before the move.
            device: Where it goes.
            dtype: What its floating tensors become on the way; None: they stay as they are.

        Raises:
            KeyboardInterrupt: It came meanwhile; then nothing was changed.
        """
        if (why := why_not_now() or _why_not_bound()) is not None:
            self.tally.leave(why, 0)
            return
        start_ns, slots = clock_ns(), dict[str, _Slot]()
        for slot in _slots(module):
            if (reason := _why_not(slot.tensor, dtype)) is None:
                slots[str(len(slots))] = slot
            else:
                self.tally.leave(reason, slot.tensor.nbytes if _is_plain(slot.tensor) else 0)
        # each place of a buffer gets a tensor of its own, as in the original; a parameter in several stays one object
        tensors = {name: s.tensor if s.is_parameter else s.tensor.detach() for name, s in slots.items()}
        if sum(tensor.nbytes for tensor in tensors.values()) < self.min_nbytes:
            return
        proof = prove(tensors)
        for name, why_open in proof.reasons.items():
            self.tally.leave(why_open.value, tensors[name].nbytes)
        if not proof.ranges:
            return
        try:
            loaded = load(as_checkpoint(proof), device, dtype=dtype, io=self.io)
        except (WanLoaderError, OSError) as error:
            nbytes = sum(found.nbytes for found in proof.ranges.values())
            self.tally.leave(f"{type(error).__name__}: {error}".splitlines()[0], nbytes)
            return
        again = prove({name: tensors[name] for name in proof.ranges})
        for name, tensor in loaded.tensors.items():
            if again.ranges.get(name) != proof.ranges[name] or again.files != proof.files:
                self.tally.leave("was written to meanwhile", tensors[name].nbytes)
            else:
                _bind(slots[name], tensor)
        self.tally.served(type(module).__name__, loaded.report.nbytes_file, (clock_ns() - start_ns) / 1e9)


def _target(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[torch.device, torch.dtype | None] | None:
    """Return where a call moves to and what it converts to; None for one that does not move, or is not understood."""
    import torch

    try:
        if name == "cuda":
            index = args[0] if args else kwargs.get("device")
            return torch.device("cuda" if index is None else index), None
        device, dtype, _, memory_format = torch._C._nn._parse_to(*args, **kwargs)
    except (TypeError, RuntimeError, ValueError):  # the original will say so
        return None
    converts = dtype is None or dtype.is_floating_point
    return (device, dtype) if device is not None and memory_format is None and converts else None


def _why_not_bound() -> str | None:
    """Return why parameters may not be given new memory; None if they may."""
    import torch

    future = torch.__future__
    if future.get_overwrite_module_params_on_conversion() or future.get_swap_module_params_on_conversion():
        return "torch.__future__ asks for parameters that are replaced or swapped"
    return None


def _slots(module: torch.nn.Module) -> Iterator[_Slot]:
    """Yield every place of a parameter or buffer in a module and in those within it."""
    for part in module.modules():
        for key, parameter in part._parameters.items():
            if parameter is not None:
                yield _Slot(part._parameters, key, parameter, is_parameter=True)
        for key, buffer in part._buffers.items():
            if buffer is not None:
                yield _Slot(part._buffers, key, buffer, is_parameter=False)


def _why_not(tensor: torch.Tensor, dtype: torch.dtype | None) -> str | None:
    """Return why a tensor is left to the original, before its memory is looked at."""
    if not _is_plain(tensor) or tensor.device.type != "cpu":
        return "is no plain tensor on the CPU"
    if not tensor.is_leaf or tensor.grad is not None:
        return "is no leaf, or has a gradient"
    is_odd = tensor.is_complex() or (tensor.is_floating_point() and tensor.dtype.itemsize == 1)
    return "is of a dtype that is not converted on the way" if dtype is not None and is_odd else None


def _is_plain(tensor: torch.Tensor) -> bool:
    """Say whether a tensor is of no subclass: others may have no size, or not say it truly."""
    import torch

    return type(tensor) in (torch.Tensor, torch.nn.Parameter)


def _bind(slot: _Slot, tensor: torch.Tensor) -> None:
    """Give a parameter its new memory, or a buffer's place its new tensor, as `torch.nn.Module._apply` does."""
    if slot.is_parameter:
        slot.tensor.data = tensor
    else:
        slot.owner[slot.key] = tensor
