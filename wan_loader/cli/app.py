"""The `wan-loader` command and its subcommands; others join as entry points of the group `wan_loader.commands`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from wan_loader import __version__
from wan_loader.cli import cache, standby
from wan_loader.cli.bench import bench
from wan_loader.cli.compare import compare
from wan_loader.cli.doctor import doctor
from wan_loader.cli.enable import disable, enable
from wan_loader.cli.estimate import estimate
from wan_loader.cli.evict import evict
from wan_loader.cli.exit_codes import run_program
from wan_loader.cli.inspect import inspect
from wan_loader.cli.load import load
from wan_loader.cli.profile import profile
from wan_loader.cli.report import report
from wan_loader.cli.run import run
from wan_loader.cli.stage import stage
from wan_loader.cli.warm import warm
from wan_loader.entry_points import entry_points

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["app", "main"]

_GROUP = "wan_loader.commands"
_SETTINGS = {"help_option_names": ["-h", "--help"]}


class _Joined(TyperGroup):
    """A group of our commands and those that join, looked for only if a name is none of ours, or for a list."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Name all commands: ours, then those that have joined."""
        self._join()
        return super().list_commands(ctx)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Find a command; None if there is none of that name."""
        if cmd_name not in self.commands:
            self._join()
        return super().get_command(ctx, cmd_name)

    def _join(self) -> None:
        for entry in entry_points(_GROUP):
            if entry.name not in self.commands:
                self.commands[entry.name] = _command(entry.name, entry.load())


def _command(name: str, function: Callable[..., None]) -> Any:
    """Make of a function with annotated parameters what typer makes of it."""
    alone = typer.Typer(add_completion=False, rich_markup_mode="rich", context_settings=_SETTINGS)
    alone.command(name)(function)
    return typer.main.get_command(alone)


app = typer.Typer(
    name="wan-loader",
    cls=_Joined,
    help="Start huge generative models as fast as the hardware allows, and see where the start-up time goes.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings=_SETTINGS,
)

# in the order in which the help lists them
for command in (inspect, load, bench, compare, doctor, estimate, report, warm, evict, stage):
    app.command()(command)
app.add_typer(cache.app)
app.add_typer(standby.app)
app.command(context_settings={"allow_extra_args": True})(profile)
app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False}
)(run)
app.command()(enable)
app.command()(disable)


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
