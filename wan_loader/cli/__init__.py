"""The command line: parse, call the public API, render. Imports torch only in commands that need it."""

from __future__ import annotations

import signal
import sys
from typing import NoReturn

__all__ = ["begin_program", "main"]


def begin_program() -> None:
    """Give SIGINT its default action, which ends the process at once; a signal that is ignored stays so.

    For a process that is ours alone, before it imports anything else: see `interrupt`.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def main() -> NoReturn:
    """Run `wan-loader`. Called by a program as its last line, it takes over the program's Ctrl-C."""
    if sys._getframe(1).f_globals.get("__name__") == "__main__":
        begin_program()
    from wan_loader.cli.app import main as run

    run()
