"""The `wan-loader` command: its subcommands, and the one place where errors become exit codes.

0 fine, 1 an expected error (one message on stderr, no traceback unless -v), 2 usage, 3 a comparison failed, 130 Ctrl-C.
"""

from __future__ import annotations

import errno
import logging
import os
import sys
import traceback
from typing import Annotated, NoReturn

import typer

from wan_loader import __version__
from wan_loader.cli import cache, options
from wan_loader.cli.bench import bench
from wan_loader.cli.compare import compare
from wan_loader.cli.distributed import fail_together
from wan_loader.cli.doctor import doctor
from wan_loader.cli.download import download
from wan_loader.cli.estimate import estimate
from wan_loader.cli.evict import evict
from wan_loader.cli.inspect import inspect
from wan_loader.cli.interrupt import INTERRUPTED, stop_builds
from wan_loader.cli.load import load
from wan_loader.cli.output import flush_output
from wan_loader.cli.profile import profile
from wan_loader.cli.report import report
from wan_loader.cli.run import run
from wan_loader.cli.stage import stage
from wan_loader.cli.synth import synth
from wan_loader.cli.warm import warm
from wan_loader.errors import WanLoaderError

__all__ = ["app", "main"]

#: A disk or a quota that is full: errors of a write, which do not name the file.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

app = typer.Typer(
    name="wan-loader",
    help="Start huge generative models as fast as the hardware allows, and see where the start-up time goes.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

for command in (inspect, load, bench, compare, doctor, estimate, report, warm, evict, stage, download):
    app.command()(command)
app.add_typer(cache.app)
app.command(context_settings={"allow_extra_args": True})(profile)
app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False}
)(run)
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})(synth)


def _show_version(value: bool) -> None:
    if value:
        typer.echo(f"wan-loader {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Global options."""


def _fail(error: OSError | WanLoaderError, text: str) -> NoReturn:
    if options.verbose():
        traceback.print_exception(error)
    print(f"error: {text}", file=sys.stderr)
    fail_together(error)
    sys.exit(1)


def _check_output() -> None:
    """End here if stdout cannot be written; silently, if its reader left."""
    failed = flush_output()
    if isinstance(failed, BrokenPipeError):
        sys.exit(1)
    if failed:
        _fail(failed, f"standard output cannot be written: {failed.strerror}")


def main() -> None:
    """Entry point."""
    logging.getLogger("wan_loader").addHandler(logging.NullHandler())  # commands print warnings themselves
    try:
        app()
    except WanLoaderError as error:
        _fail(error, str(error))
    except OSError as error:
        _check_output()
        if error.filename is not None:
            _fail(error, f"{os.fsdecode(error.filename)}: {error.strerror}")
        if error.errno in _FULL:
            _fail(error, f"standard output or a file cannot be written: {error.strerror} (--verbose shows which)")
        raise
    except SystemExit as ended:  # Ctrl-C as typer passes it on
        if ended.code == INTERRUPTED:
            stop_builds()
        elif not ended.code:
            _check_output()
        raise
    except KeyboardInterrupt:
        stop_builds()
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
