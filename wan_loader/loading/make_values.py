"""The making of numbers out of quantised tensors, on the device, each as soon as all that it is made of has arrived."""

from __future__ import annotations

from typing import TYPE_CHECKING

from wan_loader.devices.dequantise import apply_scale, dequantise
from wan_loader.errors import DeviceMemoryError, HostMemoryError
from wan_loader.events import span
from wan_loader.plan.quantised_values import parts_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch

    from wan_loader.events import Observer
    from wan_loader.formats.checkpoint_facts import Quantised
    from wan_loader.plan.plan import LoadPlan

__all__ = ["ValueMaker"]


class ValueMaker:
    """The quantised tensors of a load whose numbers have yet to be made."""

    def __init__(self, plan: LoadPlan, observer: Observer | None = None) -> None:
        self._plan = plan
        self._observer = observer
        self._owner = {part.name: name for name, one in plan.values.items() for part in parts_of(one)}
        """The tensor that each part goes into."""
        self._missing = {name: len(parts_of(one)) for name, one in plan.values.items()}

    @property
    def parts(self) -> Iterable[str]:
        """The names of all that numbers are made of."""
        return self._owner.keys()

    def arrived(self, names: Iterable[str], tensors: dict[str, torch.Tensor]) -> list[str]:
        """Take note of what has arrived; return the names of tensors that are ready with it.

        Args:
            names: What has arrived.
            tensors: All that is there, by name: blocks and scales are taken out, and numbers put in. These are in place
                for work of any stream when this returns.
        """
        ready: list[str] = []
        made = False
        for name in names:
            if (owner := self._owner.get(name)) is None:
                ready.append(name)
                continue
            self._missing[owner] -= 1
            if self._missing[owner] == 0:
                self._make(self._plan.values[owner], tensors)
                ready.append(owner)
                made = True
        if made and self._plan.facts.cuda:
            import torch

            torch.cuda.current_stream(self._plan.facts.device).synchronize()
        return ready

    def _make(self, quantised: Quantised, tensors: dict[str, torch.Tensor]) -> None:
        import torch

        raw, value = tensors.pop(quantised.raw.name), quantised.value
        dtype = self._plan.request.policy.target(value.name, value.dtype)
        try:
            with span(self._observer, "cast", raw.nbytes):
                if quantised.scale is None:
                    tensors[value.name] = dequantise(raw, quantised.kind, value.shape, dtype)
                else:
                    tensors[value.name] = apply_scale(raw, tensors.pop(quantised.scale.name), dtype)
        except RuntimeError as error:
            # host memory that is not there is a plain RuntimeError of torch's
            if self._plan.facts.cuda and not isinstance(error, torch.OutOfMemoryError):
                raise
            kind = DeviceMemoryError if self._plan.facts.cuda else HostMemoryError
            raise kind(  # somebody else was quicker than our check
                f"{self._plan.checkpoint.path}: {self._plan.facts.device} has no room for the numbers of "
                f"{value.name!r} any more: {error}",
                path=self._plan.checkpoint.path,
                tensor=value.name,
                reason=str(error),
            ) from error
