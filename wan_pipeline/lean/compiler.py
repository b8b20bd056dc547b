"""What is known of `torch._dynamo` without importing it: nothing is compiled as long as nobody did.

transformers and diffusers import it for its decorators and to ask whether a module is compiled; it takes as long as
torch itself. The decorators only leave notes for a compiler, which get there when it is imported.
"""

from __future__ import annotations

import functools
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from wan_pipeline.lean.stand_ins import PutOff, StandInModule

__all__ = ["COMPILER", "prepare"]

COMPILER = "torch._dynamo"


def prepare(owner: PutOff, module: StandInModule) -> None:
    """Give the stand-in for the compiler what works without it."""
    if module.__name__ != COMPILER:
        return

    def real(name: str) -> Any:
        return getattr(owner.real(COMPILER), name)

    def allow_in_graph(fn: Any) -> Any:
        if owner.is_open(COMPILER):
            return real("allow_in_graph")(fn)
        owner.after(COMPILER, lambda: real("allow_in_graph")(fn))
        return fn

    def assume_constant_result(fn: Any) -> Any:
        if owner.is_open(COMPILER):
            return real("assume_constant_result")(fn)
        owner.after(COMPILER, lambda: real("assume_constant_result")(fn))
        return fn

    def disable(fn: Any = None, recursive: bool = True, **settings: Any) -> Any:
        if owner.is_open(COMPILER):
            return real("disable")(fn, recursive, **settings)
        if not callable(fn) or isinstance(fn, type):
            return functools.partial(disable, recursive=recursive, **settings) if fn is None else real("disable")(fn)
        return _disabled(owner, fn, lambda: real("disable")(fn, recursive, **settings))

    evaluation = import_module(f"{COMPILER}.eval_frame")
    # what compiled modules are: there is none yet
    vars(evaluation)["OptimizedModule"] = type("OptimizedModule", (), {})
    vars(module).update(
        allow_in_graph=allow_in_graph,
        assume_constant_result=assume_constant_result,
        disable=disable,
        eval_frame=evaluation,
    )


def _disabled(owner: PutOff, fn: Callable[..., Any], really: Callable[[], Any]) -> Callable[..., Any]:
    """Return a function that keeps the compiler out; while nothing is compiled, there is nobody to keep out."""
    made: list[Any] = []

    @functools.wraps(fn)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not owner.is_open(COMPILER):
            return fn(*args, **kwargs)
        if not made:
            made.append(really())
        return made[0](*args, **kwargs)

    return call
