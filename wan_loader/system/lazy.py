"""Names of a package that are imported when first asked for, so that importing the package costs nothing."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from wan_loader.system.forks import without_forks

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["lazy_names"]


def lazy_names(package: str, origins: Mapping[str, str]) -> Callable[[str], Any]:
    """Make the `__getattr__` of a package whose names come from other modules.

    A name that was asked for once is an attribute of the package from then on.

    Args:
        package: The name of the package.
        origins: Name -> the module that defines it.
    """

    def getattr_(name: str) -> Any:
        if name not in origins:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        # a child that is forked during an import would inherit its lock, held by a thread that is not there
        with without_forks():
            value = getattr(import_module(origins[name]), name)
        setattr(sys.modules[package], name, value)
        return value

    return getattr_
