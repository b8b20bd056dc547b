"""`wan-pipeline`: the command line of the text-to-video pipeline.

Thin on purpose: parse, call the public API, print. Everything heavy is imported inside the commands, so that `--help`
answers at once. Results go to stdout, progress and errors to stderr; an expected error is one message and exit code 1.
"""

from __future__ import annotations

import sys
from typing import Annotated, NoReturn

import typer

from wan_loader import __version__
from wan_loader.cli import begin_program, run_program
from wan_pipeline.commands.generate import generate, load
from wan_pipeline.commands.synth import synth

__all__ = ["app", "main"]

app = typer.Typer(
    name="wan-pipeline",
    help="Text to video with WAN2.2, started as fast as the hardware allows.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(value: bool) -> None:
    if value:
        typer.echo(f"wan-pipeline {__version__}")
        raise typer.Exit


@app.callback()
def _app(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Global options."""


def _with_underscores(word: str) -> str:
    """Take --ckpt-dir for --ckpt_dir: generate.py's flags have underscores."""
    return word.replace("-", "_")


for command in (generate, load):
    app.command(context_settings={"token_normalize_func": _with_underscores})(command)
app.command()(synth)


def main() -> NoReturn:
    """Run `wan-pipeline`. Called by a program as its last line, it takes over the program's Ctrl-C."""
    if sys._getframe(1).f_globals.get("__name__") == "__main__":
        begin_program()
    run_program(app)
