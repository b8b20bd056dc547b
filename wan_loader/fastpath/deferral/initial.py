"""Random initialisations that wait: a model that is built to be loaded is not initialised first.

A call of `torch.nn.init.normal_`, and of others like it, brings the generator to the state that it would have after
it (`mt19937`), and the parameter waits for its values (`waiting_init`, `deferred_tensor`). What overwrites all of them,
as `load_state_dict` does, makes the call needless. Whoever looks at them gets them, bit for bit: what a call gives
depends on the state of the generator at its time, which is kept. The generator itself is never behind: whatever draws
from it next, in whichever way, finds what it would have found.

Only what is certain waits: large parameters in fp32 on the CPU, memory of their own, and torch's default generator.
"""

from __future__ import annotations

import inspect
import threading
from typing import TYPE_CHECKING, Any

from wan_loader.fastpath.deferral import parameter_checks
from wan_loader.fastpath.deferral.deferred import is_deferred, settle
from wan_loader.fastpath.deferral.mt19937 import MIN_DRAWS, advance
from wan_loader.fastpath.deferral.waiting_init import InitCall, WaitingInit
from wan_loader.fastpath.modes import why_not_now
from wan_loader.fastpath.ours import ours
from wan_loader.formats.checkpoint_facts import contiguous_strides
from wan_loader.provenance.tensor_memory import is_sole_memory

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import torch

    from wan_loader.fastpath.patches import Patches
    from wan_loader.fastpath.tally import Tally

__all__ = ["Initial"]

#: Each draws its values in one go.
_FUNCTIONS = ("uniform_", "normal_", "kaiming_uniform_", "kaiming_normal_", "xavier_uniform_", "xavier_normal_")

#: Fewer elements are initialised at once: a program that looks at them pays for the advance as well, 1 - 2 ms.
_MIN_ELEMENTS = 1 << 24

#: Sizes for which the generator is tried: for the second one torch draws 16 normal values more.
_TRIED = (1 << 14, (1 << 14) + 5)


class Initial:
    """The seam of `torch.nn.init`.

    Args:
        tally: Is told which initialisations were never needed, and which were after all.
        min_elements: Parameters with fewer are initialised at once.
    """

    def __init__(self, tally: Tally, *, min_elements: int = _MIN_ELEMENTS) -> None:
        self._tally = tally
        self._min_elements = max(min_elements, MIN_DRAWS)
        self._lock = threading.Lock()
        self._is_known: bool | None = None

    def install(self, patches: Patches) -> None:
        """Replace the functions that draw their values, each in one go."""
        parameter_checks.install(patches)
        patches.replace("torch.nn.init", _FUNCTIONS, self._instead_of, parameters=("tensor", "generator"))

    def _instead_of(self, original: Callable[..., torch.Tensor]) -> Callable[..., Any]:
        signature = inspect.signature(original)

        def replacement(*args: Any, **kwargs: Any) -> Any:
            tensor = args[0] if args else kwargs.get("tensor")
            if not self._may_wait(tensor):
                return original(*args, **kwargs)
            if (arguments := _arguments(signature, args, kwargs)) is None or not self._wait(
                original, tensor, arguments
            ):
                return original(*args, **kwargs)
            return tensor

        return replacement

    def _may_wait(self, tensor: Any) -> bool:
        import torch

        return (
            (type(tensor) is torch.nn.Parameter or is_deferred(tensor))
            and why_not_now(besides_the_cpu=True) is None  # a mode would see the questions that follow
            and tensor.numel() >= self._min_elements
            and tensor.dtype == torch.float32
            and tensor.device.type == "cpu"
            and (is_deferred(tensor) or _is_alone(tensor))
        )

    def _wait(self, original: Callable[..., torch.Tensor], tensor: Any, arguments: dict[str, Any]) -> bool:
        import torch

        from wan_loader.fastpath.deferral.deferred_tensor import defer_parameter, waiting_of

        with ours(), torch.no_grad(), torch._C.DisableTorchFunction(), self._lock:
            waiting = waiting_of(tensor)
            if waiting is not None and not isinstance(waiting, WaitingInit):
                return False
            if not self._is_known_generator() or not _is_right(original, arguments, tensor.dim()):
                return False
            if (state := _advance(_n_draws(original.__name__, tensor.numel()))) is None:
                return False
            call = InitCall(original, arguments, state, tensor.nbytes, self._tally)
            if waiting is not None:
                is_waiting = waiting.replace(call)
            else:
                is_waiting = defer_parameter(tensor, WaitingInit(call, tensor.detach(), tensor.shape, tensor.dtype))
            if not is_waiting:  # C++ holds it, or somebody has looked just now
                call.make(settle(tensor))
            return True

    def _is_known_generator(self) -> bool:
        """Say whether this torch draws as it is known here: tried once, with generators of their own."""
        if self._is_known is None:
            self._is_known = all(_is_foreseen(name, n) for name in ("uniform_", "normal_") for n in _TRIED)
            if not self._is_known:
                self._tally.leave("the random generator of this torch is not the one that is known here")
        return self._is_known


def _arguments(signature: inspect.Signature, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return a call's arguments beside the tensor; None if they may change, or a generator is given."""
    try:
        arguments = signature.bind(*args, **kwargs).arguments
    except TypeError:  # the original says so
        return None
    del arguments["tensor"]
    if arguments.pop("generator", None) is not None:
        return None
    return arguments if all(isinstance(value, int | float | str) for value in arguments.values()) else None


def _is_foreseen(name: str, n_elements: int) -> bool:
    import torch

    generator = torch.Generator().manual_seed(n_elements)
    before = _bytes(generator.get_state())
    getattr(torch.empty(n_elements, dtype=torch.float32, device="cpu"), name)(generator=generator)
    try:
        return advance(before, _n_draws(name, n_elements)) == _bytes(generator.get_state())
    except (ImportError, ValueError):  # no numpy, another layout
        return False


def _n_draws(name: str, n_elements: int) -> int:
    """Return how often a function draws for a contiguous tensor in fp32 of some size.

    For normal values torch takes 16 numbers together, and the last 16 elements anew if that does not come out even.
    """
    return n_elements + (16 if "normal" in name and n_elements % 16 else 0)


def _advance(n_draws: int) -> torch.Tensor | None:
    """Bring torch's generator to the state after some draws.

    Returns:
        The state before; None if other threads do not stop to draw meanwhile: then nothing was changed.
    """
    import torch

    for _ in range(3):
        state = torch.default_generator.get_state()
        before = _bytes(state)
        after = torch.frombuffer(bytearray(advance(before, n_draws)), dtype=torch.uint8)
        if _bytes(torch.default_generator.get_state()) == before:
            torch.default_generator.set_state(after)
            return state
    return None


def _bytes(state: torch.Tensor) -> bytes:
    return bytes(state.numpy())


def _is_right(original: Callable[..., torch.Tensor], arguments: dict[str, Any], n_dims: int) -> bool:
    """Say whether a call raises nothing, by one for the smallest tensor: for that the bounds are the widest."""
    import torch

    try:
        original(
            torch.empty((1,) * n_dims, dtype=torch.float32, device="cpu"), **arguments, generator=torch.Generator()
        )
    except Exception:  # the original says so again
        return False
    return True


def _is_alone(parameter: torch.nn.Parameter) -> bool:
    """Say whether nothing else may see a parameter's memory, and nothing hangs on it that a swap would take away."""
    return (
        parameter.stride() == contiguous_strides(tuple(parameter.shape))
        and parameter.is_leaf
        and parameter.grad is None
        and not parameter._backward_hooks
        and not getattr(parameter, "_post_accumulate_grad_hooks", None)
        and not parameter.is_inference()
        and is_sole_memory(parameter, _kind)
    )


def _kind(_: torch.Tensor, storage: torch.UntypedStorage) -> tuple[bool, bool]:
    """Say whether memory is torch's own, and shared: what was lent to numpy is not torch's to resize."""
    return storage.resizable(), storage.is_shared()
