"""Parameters that wait are parameters of torch, and of no class that is made of these.

torch before 2.5 takes every tensor that calls itself a parameter for one of every such class, uninitialised ones among
them: a module with a norm would refuse weights whose initialisation waits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from wan_loader.fastpath.patches import Patches

__all__ = ["install"]


def install(patches: Patches) -> None:
    """Have `isinstance` ask for the class itself, where torch does not."""
    patches.replace("torch.nn.parameter", "_ParameterMeta.__instancecheck__", _of_the_class)


def _of_the_class(original: Callable[[Any, Any], bool]) -> Callable[[Any, Any], bool]:
    # a newer torch looks at what class it is
    if "Parameter" in original.__code__.co_names:
        return original

    def check(cls: Any, instance: Any) -> bool:
        if cls.__name__ == "Parameter":
            return original(cls, instance)
        return type.__instancecheck__(cls, instance)

    return check
