"""The command line: parse, call the public API, render. Imports torch only in commands that need it.

Public are the names below, with which other programs of ours speak and end like this one; but for `begin_program` and
`main` they are imported when they are first asked for.
"""

from __future__ import annotations

import signal
import sys
from typing import TYPE_CHECKING, NoReturn

from wan_loader.system.lazy import lazy_names

if TYPE_CHECKING:
    from wan_loader.cli.building import follow_build, report_build
    from wan_loader.cli.exit_codes import run_program
    from wan_loader.cli.options import OUTPUT, Force, JsonOut, Verbose
    from wan_loader.cli.output import check_outputs, print_json, say, show, write_json
    from wan_loader.cli.programs import from_standby
    from wan_loader.cli.progress import byte_progress, progress_bars
    from wan_loader.cli.render import output_console, print_note, print_warnings
    from wan_loader.cli.torchrun import own_file
    from wan_loader.console import PlainConsole, marked
    from wan_loader.printable import printable
    from wan_loader.tables import Column, Columns

__all__ = [
    "OUTPUT",
    "Column",
    "Columns",
    "Force",
    "JsonOut",
    "PlainConsole",
    "Verbose",
    "begin_program",
    "byte_progress",
    "check_outputs",
    "follow_build",
    "from_standby",
    "main",
    "marked",
    "output_console",
    "own_file",
    "print_json",
    "print_note",
    "print_warnings",
    "printable",
    "progress_bars",
    "report_build",
    "run_program",
    "say",
    "show",
    "write_json",
]

__getattr__ = lazy_names(
    __name__,
    {
        "Column": "wan_loader.tables",
        "Columns": "wan_loader.tables",
        "Force": "wan_loader.cli.options",
        "JsonOut": "wan_loader.cli.options",
        "OUTPUT": "wan_loader.cli.options",
        "PlainConsole": "wan_loader.console",
        "Verbose": "wan_loader.cli.options",
        "byte_progress": "wan_loader.cli.progress",
        "check_outputs": "wan_loader.cli.output",
        "follow_build": "wan_loader.cli.building",
        "from_standby": "wan_loader.cli.programs",
        "marked": "wan_loader.console",
        "output_console": "wan_loader.cli.render",
        "own_file": "wan_loader.cli.torchrun",
        "print_json": "wan_loader.cli.output",
        "print_note": "wan_loader.cli.render",
        "print_warnings": "wan_loader.cli.render",
        "printable": "wan_loader.printable",
        "progress_bars": "wan_loader.cli.progress",
        "report_build": "wan_loader.cli.building",
        "run_program": "wan_loader.cli.exit_codes",
        "say": "wan_loader.cli.output",
        "show": "wan_loader.cli.output",
        "write_json": "wan_loader.cli.output",
    },
)


def __dir__() -> list[str]:
    return __all__


def begin_program() -> None:
    """Give SIGINT its default action, which ends the process at once; a signal that is ignored stays so.

    For a process that is ours alone, before it imports anything else: see `interrupt`.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def main() -> NoReturn:
    """Run `wan-loader`. Called by a program as its last line, it takes over the program's Ctrl-C."""
    if sys.argv[1:2] == ["run"]:
        from wan_loader.cli.programs import run_at_once

        run_at_once(sys.argv[2:])
    if sys._getframe(1).f_globals.get("__name__") == "__main__":
        begin_program()
    from wan_loader.cli.app import main as run

    run()
