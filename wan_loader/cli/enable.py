"""`wan-loader enable` and `disable`: the fast path in every Python program of an environment, and out again."""

from __future__ import annotations

import sys

from wan_loader.cli.options import Verbose

__all__ = ["disable", "enable"]


def enable(verbose: Verbose = False) -> None:
    """Put the fast path into every Python program of this environment, where commands cannot be changed.

    Each program then does what it does under `wan-loader run`, and says nothing at the end. One file is written to the
    environment's site-packages; it costs a start less than two milliseconds.
    WAN_LOADER_ACCELERATE=0 turns it off for a process and those that it starts.

    Example:

        wan-loader enable
    """
    from wan_loader.cli.output import show
    from wan_loader.fastpath.launch import enable as enabling

    path = enabling.enable()
    show(f"written: {path}")
    show(
        f"every Python program of {sys.prefix} has the fast path from its next start on; `wan-loader disable` ends that"
    )


def disable(verbose: Verbose = False) -> None:
    """Take back what `wan-loader enable` has done: the file that it wrote is removed, and nothing else.

    Example:

        wan-loader disable
    """
    from wan_loader.cli.output import show
    from wan_loader.fastpath.launch import enable as enabling

    path = enabling.disable()
    show(f"nothing to remove: {enabling.enabled_file()} is not there" if path is None else f"removed: {path}")
