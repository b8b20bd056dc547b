"""Modes of torch that change what a tensor is: with one active, nothing is served."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, TypeVar

from wan_loader.fastpath.ours import ours

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["why_not_now", "without_modes"]

T = TypeVar("T")


def why_not_now(*, besides_the_cpu: bool = False) -> str | None:
    """Say which kind of mode is active in this thread; None if none is. They hold for one thread; loads use others.

    Args:
        besides_the_cpu: Whether to pass over a default device if it is the CPU.
    """
    import torch

    count = sum(getattr(torch._C, f"_len_torch_{kind}_stack", int)() for kind in ("dispatch", "function"))
    if count == 1 and besides_the_cpu and _is_cpu_the_default():
        count = 0
    if count or torch.is_inference_mode_enabled():
        return "a torch mode (inference, fake tensors, a default device) is active"
    if torch._C._get_tracing_state() is not None:
        return "torch.jit.trace is at work"
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "a transform of functions (torch.func) is active"
    return None


def _is_cpu_the_default() -> bool:
    import torch
    from torch.utils._device import DeviceContext

    mode = torch._C._get_function_stack_at(0) if torch._C._len_torch_function_stack() else None
    return type(mode) is DeviceContext and mode.device.type == "cpu"


def without_modes(call: Callable[[], T]) -> T:
    """Call something as our own code, without gradients, modes and transforms, whatever is active in this thread.

    With a mode that is done in a thread of its own, which costs some 0.1 ms.
    """
    if why_not_now() is None:
        return _plainly(call)
    outcome: list[T] = []
    failure: list[BaseException] = []

    def run() -> None:
        try:
            outcome.append(_plainly(call))
        except BaseException as error:  # the caller's
            failure.append(error)

    thread = threading.Thread(target=run, name="without modes", daemon=True)
    thread.start()
    thread.join()
    if failure:
        raise failure.pop()
    return outcome.pop()


def _plainly(call: Callable[[], T]) -> T:
    import torch

    with ours(), torch.no_grad():
        return call()
