"""Initialisations that wait: random values of a function of `torch.nn.init`, made when somebody looks, or never.

What such a function gives depends on its arguments, on the tensor's shape and on the state of the generator that it
draws from, and on nothing else. So it can be called later, with a generator in the state of then.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import torch

    from wan_loader.fastpath.tally import Tally

__all__ = ["InitCall", "WaitingInit"]


class InitCall:
    """A call of a function of `torch.nn.init` that was not made, with the state of the generator at its time.

    Args:
        function: The original.
        arguments: All but `tensor` and `generator`, by name.
        state: What the generator's `get_state` said.
        nbytes: What the call would have written.
        tally: Is told whether the call was needed, once that is known.
    """

    def __init__(
        self,
        function: Callable[..., torch.Tensor],
        arguments: Mapping[str, Any],
        state: torch.Tensor,
        nbytes: int,
        tally: Tally,
    ) -> None:
        self._function = function
        self._arguments = dict(arguments)
        self._state = state
        self._nbytes = nbytes
        self._tally = tally
        self._was_made = False

    def make(self, tensor: torch.Tensor) -> None:
        """Give a tensor the values that the call would have given one of its shape; no mode of torch may be active."""
        import torch

        generator = torch.Generator()
        generator.set_state(self._state)
        self._function(tensor, **self._arguments, generator=generator)
        if not self._was_made:
            self._tally.leave("was initialised on the CPU after all, as somebody looked at it", self._nbytes)
        self._was_made = True

    def __del__(self) -> None:
        """Count a call that nobody has needed."""
        if not self._was_made:
            self._tally.saved("initialisations on the CPU", nbytes=self._nbytes)


class WaitingInit:
    """Memory whose initialisation waits; several tensors may share its outcome.

    Args:
        call: The initialisation, of fp32.
        memory: Where its values belong; None if they are converted.
        shape: The tensor's shape.
        dtype: What the values are converted to.
    """

    def __init__(self, call: InitCall, memory: torch.Tensor | None, shape: torch.Size, dtype: torch.dtype) -> None:
        self._call: InitCall | None = call
        self._memory = memory
        self.shape = shape
        self.dtype = dtype
        self.lock = threading.RLock()
        """Held while the call is made or replaced, and while a tensor is given its outcome."""

    @property
    def is_done(self) -> bool:
        """Whether the memory has its values, or is given others right now."""
        return self._call is None

    def outcome(self) -> torch.Tensor:
        """Return a plain tensor with exactly what there would be, the same each time; no mode may be active."""
        with self.lock:
            if self._call is not None:
                self.make(self._call)
                self._call = None
            return self._plain()

    def converted(self, dtype: torch.dtype | None) -> WaitingInit | None:
        """Return what `.to(dtype)` of a tensor is that waits; None if it is not to wait, as after another cast."""
        with self.lock:
            if self._call is None or self._memory is None or dtype is None or not dtype.is_floating_point:
                return None
            return WaitingInit(self._call, None, self.shape, dtype)

    def replace(self, call: InitCall) -> bool:
        """Wait for another call, which gives all values anew. False if the memory is in use already."""
        with self.lock:
            if self._call is None:
                return False
            self._call = call
            return True

    def give_up(self) -> InitCall | None:
        """Return the call and forget it: all values are given anew right after. `make` it if that fails."""
        with self.lock:
            call, self._call = self._call, None
            return call

    def make(self, call: InitCall) -> None:
        """Give the memory the values of a call; no mode of torch may be active."""
        import torch

        memory = self._plain()
        if memory.dtype == torch.float32:
            call.make(memory)
        else:
            values = torch.empty(self.shape, dtype=torch.float32, device="cpu")
            call.make(values)
            memory.copy_(values)

    def _plain(self) -> torch.Tensor:
        import torch

        if self._memory is None:
            self._memory = torch.empty(self.shape, dtype=self.dtype, device="cpu")
        return self._memory
