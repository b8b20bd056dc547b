"""The streamed blocks of a module: hooks that bring each block's parameters, and everything that is given back.

While a block runs, its parameters are views of a buffer: always of the same one, always at the same addresses, always
the same objects. At all other times stand-ins are in their place (`away`).
"""

from __future__ import annotations

import sys
import threading
import weakref
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from wan_loader.errors import CheckpointError, OptionError
from wan_loader.streaming.source import THREAD_NAME
from wan_loader.system.threads import in_background

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from contextlib import ExitStack
    from types import TracebackType

    import torch

    from wan_loader.cancel import CancelToken
    from wan_loader.streaming.report import StreamReport
    from wan_loader.streaming.schedule import Schedule
    from wan_loader.streaming.workspace import Workspace

_Hook = TypeVar("_Hook", bound="Callable[..., None]")

__all__ = ["StreamedBlocks", "TakenParameter", "take_parameters"]


class TakenParameter(NamedTuple):
    """A parameter that is in its module only while its block runs."""

    owner: torch.nn.Module
    name: str
    parameter: torch.nn.Parameter
    away: torch.Tensor
    """Its stand-in at all other times."""

    def put(self, tensor: torch.Tensor) -> None:
        """Have the module hold the parameter, or its stand-in."""
        self.owner._parameters[self.name] = tensor  # type: ignore[assignment]


def take_parameters(module: torch.nn.Module, names: Sequence[str]) -> list[TakenParameter]:
    """Return parameters of a module with stand-ins, by their dotted names. Those of one object have one stand-in."""
    from wan_loader.streaming.away import stand_in  # imports torch, which the name of a class must not

    stand_ins: dict[int, torch.Tensor] = {}
    taken: list[TakenParameter] = []
    for full_name in names:
        path, _, name = full_name.rpartition(".")
        owner = module.get_submodule(path)
        parameter = owner._parameters[name]
        assert parameter is not None
        if id(parameter) not in stand_ins:
            stand_ins[id(parameter)] = stand_in(parameter, full_name)
        taken.append(TakenParameter(owner, name, parameter, stand_ins[id(parameter)]))
    return taken


class _Block:
    """One streamed block, as its hooks see it."""

    def __init__(self, number: int, name: str, taken: Sequence[TakenParameter]) -> None:
        self.number = number
        self.name = name
        self.taken = taken
        self.wants_gradients = any(one.parameter.requires_grad for one in taken)
        for one in taken:
            # autocast would keep a cast copy of each, in the belief that it is a parameter like any other
            one.parameter.requires_grad_(False)

    def check_untouched(self) -> None:
        """Raise `OptionError` if somebody has put other parameters in the place of the stand-ins."""
        for one in self.taken:
            held = one.owner._parameters.get(one.name)
            if held is not one.away and held is not one.parameter:
                raise OptionError.because(
                    f"{one.name} of {self.name} was replaced, and its values are streamed from the checkpoint",
                    "change weights in a module that load_into has loaded",
                )

    def check_gradients(self, module: torch.nn.Module, inputs: object) -> None:
        """Raise `OptionError` if autograd would keep this block's weights: they are gone by the time they are used."""
        import torch

        if not torch.is_grad_enabled():
            return
        tensors = [*module.parameters(), *torch.utils._pytree.tree_leaves(inputs)]
        if self.wants_gradients or any(isinstance(t, torch.Tensor) and t.requires_grad for t in tensors):
            raise OptionError.because(
                f"{self.name} is streamed, and cannot be trained or differentiated",
                "run it under torch.no_grad() or torch.inference_mode(), or load it with load_into",
            )

    def put(self, *, away: bool) -> None:
        for one in self.taken:
            one.put(one.away if away else one.parameter)


def _uncompiled(hook: _Hook) -> _Hook:
    """Have `torch.compile` leave a hook alone: what is compiled is the block between the hooks, as one graph.

    Where nothing has imported the compiler, nothing is compiled yet, and its import would take seconds.
    """
    if "torch._dynamo" not in sys.modules:
        return hook
    import torch

    return torch.compiler.disable(hook)  # type: ignore[no-any-return]


def _give_back(resources: ExitStack) -> None:
    """Close everything. The garbage collector may come to this in a thread that is to be ended by it."""
    if threading.current_thread().name.startswith(THREAD_NAME):
        in_background(resources.close, "close streamed blocks")
    else:
        resources.close()


class StreamedBlocks:
    """A module whose blocks come from the checkpoint while it runs. A context manager, which ends that.

    The module holds what this needs: it may be used for as long as it lives, with or without a reference to this. After
    `close`, or with the module's end, buffers, registered pages, threads and files are given back.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        blocks: Mapping[str, Sequence[TakenParameter]],
        schedule: Schedule,
        *,
        check_files: Callable[[], None],
        workspace: Workspace,
        resources: ExitStack,
        report: Callable[[], StreamReport],
        cancel: CancelToken,
    ) -> None:
        self._blocks = [_Block(number, name, taken) for number, (name, taken) in enumerate(blocks.items())]
        self._schedule = schedule
        self._check_files = check_files
        self._report = report
        self._cancel = cancel
        self.workspace = workspace
        """What another module may share."""
        self._close = weakref.finalize(self, _give_back, resources)
        self._hooks: list[Any] = []
        for block in self._blocks:
            block.put(away=True)
            self._hook(module.get_submodule(block.name), block)
        self._hooks.append(module.register_forward_hook(_uncompiled(self._end_forward)))

    def _hook(self, module: torch.nn.Module, block: _Block) -> None:
        def enter(module: torch.nn.Module, args: Any, kwargs: Any) -> None:
            self._enter(block, module, (args, kwargs))

        def leave(module: torch.nn.Module, args: Any, output: Any) -> None:
            self._leave(block)

        pre_hook = module.register_forward_pre_hook(_uncompiled(enter), prepend=True, with_kwargs=True)
        # also after a failure: then the buffer goes on, and the next forward begins as any other
        self._hooks += pre_hook, module.register_forward_hook(_uncompiled(leave), always_call=True)

    def _enter(self, block: _Block, module: torch.nn.Module, inputs: object) -> None:
        self._cancel.check()
        block.check_untouched()
        block.check_gradients(module, inputs)
        self._schedule.enter(block.number)
        block.put(away=False)

    def _leave(self, block: _Block) -> None:
        if self._schedule.is_in(block.number):  # else it was refused
            block.put(away=True)
            self._schedule.leave(block.number)

    def _end_forward(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        try:
            self._check_files()
        except CheckpointError as error:
            raise CheckpointError.because(
                "was replaced, modified or removed while its blocks were streamed: what was computed meanwhile may "
                "be wrong",
                "build the module again from files that stay as they are",
                path=error.path,
            ) from error

    @property
    def report(self) -> StreamReport:
        """What was decided, and what has happened until now."""
        return self._report()

    def __repr__(self) -> str:
        state = "closed" if self.closed else repr(self.report)
        return f"StreamedBlocks({state})"

    @property
    def closed(self) -> bool:
        """True once `close` was called."""
        return not self._close.alive

    def close(self) -> None:
        """Wait for what is under way, and give everything back; again does nothing.

        The streamed blocks cannot run any more: the module has stand-ins in the place of their parameters.
        """
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        for block in self._blocks:
            block.put(away=True)
        self._blocks.clear()
        self._close()

    def __enter__(self) -> StreamedBlocks:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()
