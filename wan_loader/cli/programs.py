"""`wan-loader run` without the rest of the command line, which takes longer to start than many programs.

A program is run here as if without us: it has its own streams, Ctrl-C, errors and exit code. `--help`, and words with
nothing to run, are left to the command line. Imports little.
"""

from __future__ import annotations

import atexit
import os
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple, NoReturn

from wan_loader.errors import OptionError
from wan_loader.fastpath.launch.script import prepare_file, prepare_module
from wan_loader.fastpath.launch.waiting import begin, is_off

if TYPE_CHECKING:
    from collections.abc import Sequence

    from wan_loader.fastpath.tally import Tally

__all__ = ["RunRequest", "parse_run", "run_at_once", "run_program"]

_OPTIONS = ("--report", "--quiet", "--keep", "-v", "--verbose")
#: The exit code for a program that is not there, as shells and programs that start others have it.
_NOT_FOUND = 127


class RunRequest(NamedTuple):
    """What `wan-loader run` is asked for."""

    words: Sequence[str]
    """SCRIPT ARGS, -m MODULE ARGS, or -- PROGRAM ARGS."""
    report: bool = False
    quiet: bool = False
    keep: bool = False
    """Use weights that are kept."""


def parse_run(words: Sequence[str]) -> RunRequest | None:
    """Understand the words after `run`; None where there is nothing to run."""
    rest, options = list(words), set[str]()
    while rest and rest[0] in _OPTIONS:
        options.add(rest.pop(0))
    if not rest or rest[0] in ("-h", "--help") or rest == ["--"]:
        return None
    return RunRequest(rest, "--report" in options, "--quiet" in options, "--keep" in options)


def run_at_once(words: Sequence[str]) -> None:
    """Run a program and end with its exit code; return if there is nothing to run."""
    request = parse_run(words)
    if request is not None:
        run_program(request)


def run_program(request: RunRequest) -> NoReturn:
    """Run a program and end with its exit code."""
    first, *others = request.words
    if request.keep:
        os.environ["WAN_LOADER_KEEP"] = "1"  # for the processes that it starts, too
    if first == "--":
        _run_children(request, others)
    try:
        start = prepare_module(others) if first == "-m" else prepare_file(first, others)
    except OptionError as error:
        _fail(error, 1)
    begin()
    if not request.quiet:
        atexit.register(_tell_own, os.getpid(), request.report)
    start.run()
    sys.exit()


def _run_children(request: RunRequest, words: Sequence[str]) -> NoReturn:
    from wan_loader.fastpath.launch import children
    from wan_loader.sizes import format_count

    try:
        ended = children.run_program(words)
    except OptionError as error:
        _fail(error, _NOT_FOUND)
    if not request.quiet:
        who = format_count(ended.n_processes, "process", "processes")
        _tell(f"{ended.tally.summary()} ({who} with torch)", ended.tally if request.report else None)
    sys.exit(ended.returncode if ended.returncode >= 0 else 128 - ended.returncode)


def _tell_own(pid: int, report: bool) -> None:
    """Say at the end what this process did; not in those that were forked from it."""
    if os.getpid() != pid:
        return
    if is_off():
        _tell("the fast path is off: WAN_LOADER_ACCELERATE=0")
    elif "wan_loader.fastpath.process" not in sys.modules:
        _tell("0 loads took the fast path: torch was not imported")
    else:
        from wan_loader.fastpath.process import accelerate

        tally = accelerate().tally
        _tell(tally.summary(), tally if report else None)


def _tell(line: str, tally: Tally | None = None) -> None:
    """Say something on stderr, after what the program printed, unless it has closed it."""
    from wan_loader.cli.output import say

    with suppress(OSError, ValueError, AttributeError):
        sys.stdout.flush()
    with suppress(OSError, ValueError):
        if sys.stderr is not None:
            say(f"wan-loader: {line}")
            if tally is not None:
                say(tally.report())


def _fail(error: OptionError, code: int) -> NoReturn:
    from wan_loader.cli.output import say
    from wan_loader.printable import printable

    say(f"error: {printable(str(error))}")
    sys.exit(code)
