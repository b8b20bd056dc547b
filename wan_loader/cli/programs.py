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

from wan_loader.errors import OptionError, WanLoaderError
from wan_loader.fastpath.launch.script import prepare_file, prepare_module
from wan_loader.fastpath.launch.waiting import begin, is_off
from wan_loader.system.forks import start_origin

if TYPE_CHECKING:
    from collections.abc import Sequence

    from wan_loader.fastpath.tally import Tally

__all__ = ["RunRequest", "from_standby", "parse_run", "run_at_once", "run_forked", "run_program"]

_OPTIONS = ("--report", "--quiet", "--keep", "--standby", "--no-standby", "-v", "--verbose")
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
    standby: bool | None = None
    """Whether a fork of the stand-by server is wanted; None: if there is one."""
    n_processes: int = 0
    """So many processes of one group; 0: this one alone."""


def parse_run(words: Sequence[str]) -> RunRequest | None:
    """Understand the words after `run`; None where there is nothing to run."""
    rest, options, n_processes = list(words), set[str](), "0"
    while rest and (rest[0] in _OPTIONS or rest[0].partition("=")[0] == "--nproc"):
        option, has_value, value = rest.pop(0).partition("=")
        if option == "--nproc":
            n_processes = value if has_value else rest.pop(0) if rest else ""
            if not n_processes.isdecimal() or not int(n_processes) or rest[:1] == ["--"]:
                return None
        else:
            options.add(option)
    if not rest or rest[0] in ("-h", "--help") or rest == ["--"]:
        return None
    standby = False if "--no-standby" in options else True if "--standby" in options else None
    flags = ("--report" in options, "--quiet" in options, "--keep" in options)
    return RunRequest(rest, *flags, standby, int(n_processes))


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
    if request.n_processes:
        _run_ranks(request)
    if first == "--":
        _run_children(request, others)
    _hand_over(request, first, others)
    try:
        start = prepare_module(others) if first == "-m" else prepare_file(first, others)
    except OptionError as error:
        _fail(error, 1)
    if start_origin() == "imported" or "torch" not in sys.modules:  # else it is there, if it is to be
        begin()
    if not request.quiet:
        atexit.register(_tell_own, os.getpid(), request.report)
    start.run()
    sys.exit()


def _run_ranks(request: RunRequest) -> NoReturn:
    from wan_loader.cli.ranks import run_ranks

    # --keep is in the environment
    wanted = {"--report": request.report, "--quiet": request.quiet, "--no-standby": request.standby is False}
    options = [option for option, is_wanted in wanted.items() if is_wanted]
    standby = request.standby is not False and os.environ.get("WAN_LOADER_STANDBY") != "0"
    try:
        sys.exit(run_ranks(request.n_processes, options, request.words, standby=standby))
    except WanLoaderError as error:
        _fail(error, 1)


def run_forked() -> NoReturn:
    """Run the program of this process's command line; called in a fork of the stand-by server."""
    request = parse_run(sys.argv[2:])
    assert request is not None, sys.argv
    run_program(request._replace(standby=False))


def _hand_over(request: RunRequest, first: str, others: Sequence[str]) -> None:
    """Have the program run in a fork of the stand-by server, and end as it does; return if that cannot be."""
    try:
        program = f"-m {others[0]}" if first == "-m" and others else os.path.abspath(first)
        directory = os.getcwd() if first == "-m" else os.path.dirname(os.path.realpath(first))
    except FileNotFoundError:  # there is no working directory
        return
    why = from_standby(
        f"{__name__}:run_forked", first=directory, program=program, fast_path=not is_off(), wanted=request.standby
    )
    if why and not request.quiet:
        _tell(f"started directly: {why}")


def from_standby(entry: str, *, first: str, program: str, fast_path: bool = False, wanted: bool | None = None) -> str:
    """Run a program in a fork of the stand-by server and end as it does; return if it must be started directly.

    Args:
        entry: The function that runs it, as `module:function`; it finds its arguments in `sys.argv`.
        first: The directory in which its modules are looked for first.
        program: Its file, or -m and its module.
        fast_path: Whether it is to have the fast path.
        wanted: Whether a fork is wanted; None: if there is a server, and WAN_LOADER_STANDBY=0 does not refuse it.

    Returns:
        What to tell the user; "" if there is nothing to tell.
    """
    is_refused = wanted is None and os.environ.get("WAN_LOADER_STANDBY") == "0"
    if wanted is False or is_refused or start_origin() == "forked":
        return ""
    from wan_loader.standby.client import hand_over

    why = hand_over(entry, first=first, program=program, fast_path=fast_path)
    return why or (_why_no_server() if wanted else "")


def _why_no_server() -> str:
    from wan_loader.standby.control import running

    if running() is not None:
        return "the stand-by server is still importing"
    return "there is no stand-by server: `wan-loader standby start` starts one"


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
                say(f"{tally.report()}\nstarted\n  {start_origin()}")


def _fail(error: WanLoaderError, code: int) -> NoReturn:
    from wan_loader.cli.output import say
    from wan_loader.printable import printable

    say(f"error: {printable(str(error))}")
    sys.exit(code)
