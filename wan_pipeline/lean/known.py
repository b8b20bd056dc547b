"""What is known of packages without importing them.

Nothing is of a class that nobody imported: a pipeline asks whether its networks are compiled or adapted. And nothing is
compiled as long as nobody imported `torch._dynamo`, which takes as long as torch itself. transformers and diffusers
import it for decorators that leave notes for a compiler; these get there when it is imported.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from wan_pipeline.lean.stand_ins import StandInModule, StandInName

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

    from wan_pipeline.lean.stand_ins import PutOff

__all__ = ["COMPILER", "prepare"]

COMPILER = "torch._dynamo"

#: Classes that functions of diffusers ask about, and import first.
_CLASSES = {
    f"{COMPILER}.eval_frame": "OptimizedModule",
    "peft": "PeftModel",
    "peft.tuners.tuners_utils": "BaseTunerLayer",
}


def prepare(owner: PutOff, module: ModuleType) -> None:
    """Give the stand-in for a package what works without it."""
    for name, known in _CLASSES.items():
        if f"{name}.".startswith(f"{module.__name__}."):
            with contextlib.suppress(ModuleNotFoundError):
                if isinstance(found := import_module(name), StandInModule):
                    vars(found)[known] = StandInName(owner, name, known)
    if module.__name__ == COMPILER:
        _prepare_compiler(owner, module)


def _prepare_compiler(owner: PutOff, module: ModuleType) -> None:
    def noted(name: str) -> Callable[[Any], Any]:
        def decorator(fn: Any) -> Any:
            if owner.is_used(COMPILER):
                return getattr(owner.real(COMPILER), name)(fn)
            owner.after(COMPILER, lambda: getattr(owner.real(COMPILER), name)(fn))
            return fn

        return decorator

    def disable(fn: Any = None, recursive: bool = True, **settings: Any) -> Any:
        if fn is None and not owner.is_used(COMPILER):
            return functools.partial(disable, recursive=recursive, **settings)
        if owner.is_used(COMPILER) or isinstance(fn, type):
            return owner.real(COMPILER).disable(fn, recursive, **settings)
        return _disabled(owner, fn, lambda: owner.real(COMPILER).disable(fn, recursive, **settings))

    vars(module).update(
        allow_in_graph=noted("allow_in_graph"),
        assume_constant_result=noted("assume_constant_result"),
        disable=disable,
        eval_frame=sys.modules[f"{COMPILER}.eval_frame"],
    )


def _disabled(owner: PutOff, fn: Callable[..., Any], really: Callable[[], Any]) -> Callable[..., Any]:
    """Return a function that keeps the compiler out; while nothing is compiled, there is nobody to keep out."""
    made: list[Any] = []

    @functools.wraps(fn)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not owner.is_used(COMPILER):
            return fn(*args, **kwargs)
        if not made:
            made.append(really())
        return made[0](*args, **kwargs)

    return call
