"""Modules that move to a GPU: one plan fetches all that still is as in its files, then the original call finds it done.

Nothing is hooked when files are loaded. When a module moves, its parameters and buffers on the CPU are asked where they
come from (`provenance`); those that are ranges of files, proven, are read from there straight to the device, converted
on the way, in one load; those that are in no file are read from memory, in another (`memory_moves`). Then each
parameter is given its new memory as `torch.nn.Module._apply` does it (`p.data = new`), each buffer its new tensor, and
the original call goes on: it finds those tensors where they are to be, and moves the rest. So objects, ties, hooks,
gradients and optimisers stay what they are.

    move -> candidates -> proof -> one load each -> the same proof again -> bind -> the original call

Whatever is not certain is left to the original, with the reason kept for the report; so is the whole call where the
load fails: nothing is bound before everything has arrived. What was fetched is noted, for when it comes
back (`returns`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from wan_loader.fastpath.deferral.deferred import cast_of, is_deferred, settle
from wan_loader.fastpath.modes import why_not_now
from wan_loader.fastpath.moving.origins import Origins
from wan_loader.fastpath.moving.slots import Slot, in_both_roles, is_plain, slots_of, why_not_bound
from wan_loader.fastpath.ours import ours
from wan_loader.fastpath.tally import Tally

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Mapping, Sequence

    import torch

    from wan_loader.fastpath.moving.origins import Origin
    from wan_loader.fastpath.patches import Patches
    from wan_loader.types import IoMode

__all__ = ["Moves"]

#: Less than this is moved sooner than it is planned.
_MIN_BYTES = 16 << 20
#: The same for memory that is in no file: the original is not as slow there.
_MIN_MEMORY_BYTES = 256 << 20
#: Methods of modules that cast -> the dtype.
_CASTS = {"bfloat16": "bfloat16", "half": "float16", "float": "float32", "double": "float64"}


@dataclass(slots=True)
class Moves:
    """The seam of moves and casts: `torch.nn.Module.to`, `.cuda`, `.half` and their like.

    The tally counts what moved by plan and what did not.
    """

    tally: Tally = field(default_factory=Tally)
    kinds: Sequence[str] = ("cuda",)
    """The devices that moves are planned to, by their kinds or their names: `cuda` or `cuda:1`."""
    io: IoMode = "auto"
    min_nbytes: int = _MIN_BYTES
    min_memory_nbytes: int = _MIN_MEMORY_BYTES
    """The same for tensors that are in no file."""
    keep: bool = False
    """True if what the keeper holds of the files is used, rather than read."""
    origins: Origins = field(default_factory=Origins, init=False)
    """What the tensors that moved were fetched from."""

    def install(self, patches: Patches) -> None:
        """Replace these methods, for all modules of the process."""
        for name in ("to", "cuda", "cpu", *_CASTS):
            patches.replace("torch.nn.modules.module", f"Module.{name}", partial(self._instead_of, name))

    def _instead_of(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def moved(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
            fetched: list[tuple[Slot, Origin]] = []
            if (target := _target(name, args, kwargs)) is not None:
                device, dtype = target
                with ours():
                    if device is not None and self.plans_to(device):
                        fetched = self.fetch(module, device, dtype)
                    elif dtype is not None and (device is None or str(device) == "cpu"):
                        self.defer(module, dtype)
                    elif str(device) == "cpu" and self.origins:
                        self.give_back(module)
            moved_module = original(module, *args, **kwargs)
            self.origins.note(fetched)
            return moved_module

        return moved

    def plans_to(self, device: torch.device) -> bool:
        """Say whether moves to a device are planned."""
        return not {device.type, str(device)}.isdisjoint(self.kinds)

    def fetch(
        self, module: torch.nn.Module, device: torch.device, dtype: torch.dtype | None
    ) -> list[tuple[Slot, Origin]]:
        """Bring what is proven to be ranges of files to a device, as far as that is certain.

        Args:
            module: The module, as it is before the move.
            device: Where it goes.
            dtype: What its floating tensors become on the way; None: they stay as they are.

        Returns:
            The places of what was fetched from files, and from where: to be noted once the move is over.

        Raises:
            KeyboardInterrupt: It came meanwhile; then nothing was changed.
        """
        if (why := why_not_now() or why_not_bound()) is not None:
            self.tally.leave(why, 0)
            return []
        places = list(slots_of(module))
        if any(slot.tensor.is_meta for slot in places):
            self.tally.leave("has tensors on the meta device, which the original does not move")
            return []
        slots, odd = dict[str, Slot](), in_both_roles(places)
        for slot in places:
            if (cast := cast_of(slot.tensor)) is not None and cast.is_done:
                settle(slot.tensor)  # its memory is there, for somebody has looked at an alias
            if (reason := _why_not(slot, dtype, odd)) is None:
                slots[str(len(slots))] = slot
            else:
                self.tally.leave(reason, slot.tensor.nbytes if cast is not None or is_plain(slot.tensor) else 0)
        casts = {name: cast for name, slot in slots.items() if (cast := cast_of(slot.tensor)) is not None}
        nbytes = sum((casts[name].place if name in casts else s.tensor).nbytes for name, s in slots.items())
        if nbytes < self.min_nbytes:
            return []
        # with all that it imports: not before there is something to load
        from wan_loader.fastpath.moving.fetching import Fetching

        component = type(module).__name__
        fetching = Fetching(component, device, dtype, self.io, self.min_memory_nbytes, self.tally, self.keep)
        return fetching.fetch(slots, casts)

    def fetch_tensors(
        self, component: str, tensors: Mapping[str, torch.Tensor], device: torch.device
    ) -> dict[str, torch.Tensor]:
        """Bring parameters, or tensors that become some, to a device by one plan, as a module that has them would move.

        Args:
            component: Whom they are for: the name in the tally.
            tensors: They themselves are given new memory.
            device: Where they go.

        Returns:
            Those that have arrived and are ordinary tensors, by the same names.
        """
        import torch

        holder: torch.nn.Module = type(component, (torch.nn.Module,), {})()
        holder._parameters.update(tensors)  # type: ignore[arg-type]
        self.origins.note(self.fetch(holder, device, None))
        moved = holder._parameters.items()
        return {name: t for name, t in moved if t is not None and t.device.type == device.type and not is_deferred(t)}

    def give_back(self, module: torch.nn.Module) -> None:
        """Have what a module has on a device from files wait for them on the CPU, as far as it is certain to be equal.

        Args:
            module: The module, as it is before it moves to the CPU.

        Raises:
            KeyboardInterrupt: It came meanwhile; then each tensor is here or there, as after a plain move.
        """
        if (why := why_not_now() or why_not_bound()) is not None:
            self.tally.leave(why, 0)
            return
        # with all that it imports: not before something was fetched
        from wan_loader.fastpath.moving.returns import Returns

        Returns(self.origins, self.kinds, self.io, self.min_nbytes, self.tally).give_back(module)

    def defer(self, module: torch.nn.Module, dtype: torch.dtype) -> None:
        """Have a cast of a module on the CPU wait, as far as it is certain to be the same.

        Args:
            module: The module, as it is before the cast.
            dtype: What its floating tensors become.
        """
        if (why := why_not_now() or why_not_bound()) is not None:
            self.tally.leave(why, 0)
            return
        places = list(slots_of(module))
        odd = in_both_roles(places)
        slots = [
            slot
            for slot in places
            if is_plain(slot.tensor)
            and _why_not(slot, dtype, odd) is None
            and slot.tensor.is_floating_point()
            and slot.tensor.dtype != dtype
        ]
        if sum(slot.tensor.nbytes for slot in slots) < self.min_nbytes:
            return
        from wan_loader.fastpath.deferral.module_casts import defer_casts

        defer_casts(slots, dtype, self.tally)


def _target(
    name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[torch.device | None, torch.dtype | None] | None:
    """Return where a call moves to and what it converts to; None for one that is not understood, or does otherwise."""
    import torch

    if name in _CASTS:
        return (None, getattr(torch, _CASTS[name])) if not args and not kwargs else None
    if name == "cpu":
        return (torch.device("cpu"), None) if not args and not kwargs else None
    try:
        if name == "cuda":
            index = args[0] if args else kwargs.get("device")
            return torch.device("cuda" if index is None else index), None
        device, dtype, _, memory_format = torch._C._nn._parse_to(*args, **kwargs)
    except (TypeError, RuntimeError, ValueError):  # the original will say so
        return None
    converts = dtype is None or dtype.is_floating_point
    return (device, dtype) if memory_format is None and converts else None


def _why_not(slot: Slot, dtype: torch.dtype | None, odd: Container[int]) -> str | None:
    """Return why a tensor is left to the original, before its memory is looked at; `odd` are ids of some to leave."""
    tensor = slot.tensor
    if id(tensor) in odd:
        return "is a parameter in one place and a buffer in another"
    if not slot.is_parameter and tensor.requires_grad:
        return "is a buffer that requires a gradient"  # what becomes of it stays connected to it
    if (cast := cast_of(tensor)) is not None:
        if cast.is_done:
            return "is held by C++ code"
        # the original casts once more, on the device; what was larger meanwhile would take more memory there than ever
        if cast.converts and dtype is not None and dtype.itemsize < cast.dtype.itemsize:
            return "waits for a cast to a larger dtype"
    elif not is_plain(tensor) or tensor.device.type != "cpu":
        return "is no plain tensor on the CPU"
    elif not tensor.is_leaf or tensor.grad is not None:
        return "is no leaf, or has a gradient"
    is_odd = tensor.is_complex() or (tensor.is_floating_point() and tensor.dtype.itemsize == 1)
    return "is of a dtype that is not converted on the way" if dtype is not None and is_odd else None
