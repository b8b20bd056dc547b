"""The `wan-loader` command and its subcommands."""

from __future__ import annotations

from typing import Annotated, NoReturn

import typer

from wan_loader import __version__
from wan_loader.cli import cache
from wan_loader.cli.bench import bench
from wan_loader.cli.compare import compare
from wan_loader.cli.doctor import doctor
from wan_loader.cli.estimate import estimate
from wan_loader.cli.evict import evict
from wan_loader.cli.inspect import inspect
from wan_loader.cli.load import load
from wan_loader.cli.profile import profile
from wan_loader.cli.program import run_program
from wan_loader.cli.report import report
from wan_loader.cli.run import run
from wan_loader.cli.stage import stage
from wan_loader.cli.synth import synth
from wan_loader.cli.warm import warm
from wan_pipeline.commands.download import download

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


def main() -> NoReturn:
    """Run `wan-loader`."""
    run_program(app)
