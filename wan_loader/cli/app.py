"""The `wan-loader` command: its subcommands, and the one place where errors become exit codes.

0 fine, 1 an expected error (one message on stderr, no traceback unless -v), 2 usage, 3 a comparison failed, 130 Ctrl-C.
"""

from __future__ import annotations

import logging
import sys
import traceback
from typing import Annotated

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
from wan_loader.cli.profile import profile
from wan_loader.cli.report import report
from wan_loader.cli.run import run
from wan_loader.cli.stage import stage
from wan_loader.cli.synth import synth
from wan_loader.cli.warm import warm
from wan_loader.errors import WanLoaderError

__all__ = ["app", "main"]

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


def main() -> None:
    """Entry point."""
    logging.getLogger("wan_loader").addHandler(logging.NullHandler())  # commands print warnings themselves
    try:
        app()
    except WanLoaderError as error:
        if options.verbose():
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        fail_together(error)
        sys.exit(1)
    except SystemExit as ended:  # Ctrl-C as typer passes it on
        if ended.code == INTERRUPTED:
            stop_builds()
        raise
    except KeyboardInterrupt:
        stop_builds()
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
