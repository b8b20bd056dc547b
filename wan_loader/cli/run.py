"""`wan-loader run`: any program, unchanged, with the fast path put in. Here is what the help says; see `programs`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from wan_loader.cli.options import Verbose
from wan_loader.cli.programs import run_at_once

__all__ = ["run"]


def run(
    program: Annotated[
        str,
        typer.Argument(
            metavar="SCRIPT ARGS... | -m MODULE ARGS... | -- PROGRAM ARGS...",
            help="A Python script or module, or any program that starts some; and its arguments.",
        ),
    ],
    report: Annotated[
        bool, typer.Option("--report", help="Show at the end what was fetched, spared and left, and why.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Say nothing at the end.")] = False,
    keep: Annotated[
        bool, typer.Option("--keep", help="Use weights that `standby keep` has left on the device where they lie.")
    ] = False,
    standby: Annotated[
        bool | None,
        typer.Option(
            "--standby/--no-standby",
            help="Run in a fork of the stand-by server.",
            show_default="if there is one",
        ),
    ] = None,
    nproc: Annotated[
        int | None,
        typer.Option("--nproc", min=1, metavar="N", help="N processes of one group, as torchrun starts them."),
    ] = None,
    verbose: Verbose = False,
) -> None:
    """Run a program that knows nothing of us with our loader inside.

    Models that it has made of files (by diffusers, transformers, torch, safetensors) are fetched from there at full
    speed when they move to a GPU. Everything is what it would be without us; what cannot be proven to be the same is
    left to the libraries. The program keeps its streams, its errors and its exit code; the line at the end goes to
    stderr.

    A SCRIPT or MODULE runs in this process, and no other process is served. After -- stands any program: every Python
    process that it starts is served, and the line sums them up. WAN_LOADER_ACCELERATE=0 turns it off.

    Where `wan-loader standby start` has started a server, a SCRIPT or MODULE begins with everything imported.
    WAN_LOADER_STANDBY=0 turns that off. With --nproc, one is started if there is none.

    Examples:

        wan-loader run generate.py --ckpt_dir model

        wan-loader run --report -m package.serve --port 8000

        wan-loader run --keep generate.py --ckpt_dir model

        wan-loader run -- torchrun --nproc_per_node 8 generate.py

        wan-loader run --nproc 8 generate.py
    """
    run_at_once(sys.argv[2:])  # nobody comes here by `main`, which has done it
    if nproc is not None:
        raise typer.BadParameter(
            "is for a SCRIPT or a MODULE: what stands after -- starts its processes itself", param_hint="--nproc"
        )
