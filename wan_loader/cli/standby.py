"""`wan-loader standby`: what stands ready between programs.

A server that has imported everything, from which programs are forked; and, as `keep`, weights that stay on a device.
"""

from __future__ import annotations

from typing import Annotated, Any

import typer

from wan_loader.cli import keep
from wan_loader.cli.options import JsonOut, Verbose, checked
from wan_loader.sizes import parse_age

__all__ = ["app"]

app = typer.Typer(
    name="standby",
    help="Ready between programs: a process that has imported everything, and weights that stay on a device.",
    no_args_is_help=True,
)


@app.command()
def start(
    imports: Annotated[
        list[str] | None, typer.Option("--import", metavar="MODULE", help="Import this as well; may be repeated.")
    ] = None,
    only: Annotated[bool, typer.Option("--only", help="Import nothing but what --import names.")] = False,
    idle: Annotated[
        str, typer.Option(help="End after so long without a program, such as 30m.", callback=checked(parse_age))
    ] = "1h",
    json: JsonOut = False,
    verbose: Verbose = False,
) -> None:
    """Start the server of this user and this environment, unless there is one, and wait until it is ready.

    It imports what programs of this environment say that they need, and what the last ones have imported that were run
    from it; it uses no GPU. `wan-loader run` finds it by itself. Where a program would find another environment than
    the imports have found, it is started as ever, and the reason is said.

    Examples:

        wan-loader standby start

        wan-loader standby start --import diffusers --idle 12h
    """
    from wan_loader.cli.options import usage_errors
    from wan_loader.standby import control

    with usage_errors():
        idle_s = parse_age(idle)
    _tell(control.start(imports or [], idle_s=idle_s, only=only), json=json)


@app.command()
def status(json: JsonOut = False, verbose: Verbose = False) -> None:
    """Say whether there is a server, and what it has imported. Exit code 1 if there is none."""
    from wan_loader.standby import control

    found = control.status()
    _tell(found, json=json)
    if found is None:
        raise typer.Exit(1)


@app.command()
def stop(verbose: Verbose = False) -> None:
    """End the server. Programs that were forked from it go on."""
    from wan_loader.cli.output import show
    from wan_loader.standby import control

    pid = control.stop()
    show("there is no stand-by server" if pid is None else f"stopped: process {pid}")


# behind the server's own in the help
app.add_typer(keep.app)


def _tell(found: dict[str, Any] | None, *, json: bool) -> None:
    from wan_loader.cli.output import print_json, show
    from wan_loader.sizes import format_seconds
    from wan_loader.standby import place

    if json:
        print_json({"schema_version": 1, "command": "standby", "target": place.socket_path(), "server": found})
    elif found is None:
        show("there is no stand-by server")
    elif "n_modules" not in found:
        show(f"process {found['pid']} imports")
    else:
        show(f"ready: process {found['pid']}, {found['n_modules']} modules in {format_seconds(found['seconds'])}")
        for name, why in found["left_out"].items():
            show(f"left to programs: {name}, as {why}")
        for name, why in found["failed"].items():
            show(f"not imported: {name}: {why}")
