"""A command line as a program: the one place where errors become messages and exit codes.

0 fine, 1 an expected error (one message on stderr, no traceback unless -v), 2 usage, 3 a comparison failed, 130 Ctrl-C.
"""

from __future__ import annotations

import errno
import logging
import os
import traceback
from typing import TYPE_CHECKING, Any

import typer

from wan_loader.cli.interrupt import INTERRUPTED, begin_work, end_interrupted, was_interrupted
from wan_loader.cli.options import verbose
from wan_loader.cli.output import flush_output, open_streams, say
from wan_loader.cli.torchrun import end, fail_together
from wan_loader.errors import WanLoaderError
from wan_loader.printable import printable, printable_lines

if TYPE_CHECKING:
    from typing import NoReturn

__all__ = ["run_program"]

#: A disk or a quota that is full: errors of a write, which do not name the file.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
#: What typer raises for a mistake on the command line; it has no name of its own there.
_UsageError: Any = typer.BadParameter.__mro__[1]


def run_program(app: typer.Typer) -> NoReturn:
    """Run a command line and end with its exit code; errors are told on stderr."""
    logging.getLogger("wan_loader").addHandler(logging.NullHandler())  # commands print warnings themselves
    open_streams()
    begin_work()
    try:
        code = _run(app)
    except KeyboardInterrupt:
        code = INTERRUPTED
    if code == INTERRUPTED:
        end_interrupted()
    end(code)


def _run(app: typer.Typer) -> int:
    """Run the command and return the exit code."""
    try:
        # standalone, typer would tell of errors in its own way and end the process
        return app(standalone_mode=False) or _check_output()
    except _UsageError as error:
        return _tell_usage(app, error)
    except typer.Abort:
        return INTERRUPTED if was_interrupted() else 1
    except WanLoaderError as error:
        return _tell(error, printable_lines(str(error)) if error.has_lines else printable(str(error)))
    except OSError as error:
        return _check_output() or _tell_os_error(error)
    except Exception as error:
        # Python 3.11 makes a RuntimeError of what is raised while a class gets its attributes
        return INTERRUPTED if was_interrupted() else _tell_unexpected(error)


def _tell_usage(app: typer.Typer, error: Any) -> int:
    error.message = printable_lines(error.message)
    if app.rich_markup_mode is None:
        error.show()
    else:
        from typer.rich_utils import rich_format_error

        rich_format_error(error)
    return int(error.exit_code)


def _tell_os_error(error: OSError) -> int:
    if error.filename is not None:
        return _tell(error, printable(f"{os.fsdecode(error.filename)}: {error.strerror}"))
    if error.errno in _FULL:
        text = f"standard output or a file cannot be written: {error.strerror} (--verbose shows which)"
        return _tell(error, text)
    return _tell_unexpected(error)


def _tell(error: OSError | WanLoaderError, text: str) -> int:
    if verbose():
        _print_traceback(error)
    say(f"error: {text}")
    fail_together(error)
    return 1


def _tell_unexpected(error: Exception) -> int:
    """Show an error of ours, or of a library, that nobody thought of."""
    _print_traceback(error)
    return 1


def _print_traceback(error: Exception) -> None:
    say("".join(traceback.format_exception(error)).rstrip("\n"))


def _check_output() -> int:
    """Return 1 if what was printed cannot be written; without a word, if its reader left."""
    failed = flush_output()
    if failed is None:
        return 0
    if isinstance(failed, BrokenPipeError):
        return 1
    return _tell(failed, f"standard output cannot be written: {failed.strerror}")
