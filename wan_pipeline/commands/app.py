"""`wan-pipeline`: the command line of the text-to-video pipeline.

Thin on purpose: parse, call the public API, print. Everything heavy is imported inside the commands, so that `--help`
answers at once. Results go to stdout, progress and errors to stderr; an expected error is one message and exit code 1.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, NoReturn, cast, get_args

import typer

from wan_loader import __version__
from wan_loader.cli import begin_program
from wan_loader.cli.program import run_program
from wan_pipeline.commands.generate import generate, load
from wan_pipeline.synth.arch import Component, DType, Layout, Size, Task

__all__ = ["app", "main"]

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_COMPONENTS = f"One of {', '.join(get_args(Component))}."


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
    """Text to video with WAN2.2, started as fast as the hardware allows."""


for command in (generate, load):
    app.command()(command)


@app.command()
def synth(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="Where the checkpoint goes; empty or not there yet.")
    ],
    layout: Annotated[Layout, typer.Option(help="The files as in the native or the diffusers repository.")] = "native",
    size: Annotated[Size, typer.Option(help="tiny: a few MB, runs on a CPU; full: the published shapes.")] = "tiny",
    task: Annotated[Task, typer.Option(help="Which model.")] = "t2v-A14B",
    blocks: Annotated[int | None, typer.Option(help="Only the first N blocks of each expert.")] = None,
    component: Annotated[list[str] | None, typer.Option(help=f"Only this part; may be repeated. {_COMPONENTS}")] = None,
    dtype: Annotated[DType | None, typer.Option(help="Dtype of the experts' files; published: fp32.")] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same weights in both layouts.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace files in a directory that is not empty.")] = False,
) -> None:
    """Write a checkpoint of random weights in the exact layout of WAN2.2.

    \b
    wan-pipeline synth /tmp/tiny --layout diffusers           5 MB, plain diffusers runs it
    wan-pipeline synth /data/wan --size full                  126 GB, as published
    wan-pipeline synth /data/part --size full --blocks 4 --component high_noise --dtype bf16
    """
    from wan_loader.cli.output import show
    from wan_loader.cli.progress import byte_progress
    from wan_loader.sizes import format_bytes, format_count
    from wan_pipeline.synth import synth as write

    with byte_progress(f"writing {directory}") as progress:
        report = write(
            directory,
            layout=layout,
            size=size,
            task=task,
            blocks=blocks,
            components=cast("list[Component]", component) if component else None,
            dtype=dtype,
            seed=seed,
            force=force,
            progress=progress,
        )
    show(f"{report.directory}: {format_count(len(report.files), 'file')}, {format_bytes(report.nbytes)}")


@app.command(name="cache-build", hidden=True)
def cache_build(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A WAN2.2 checkpoint in either layout.")],
    dtype: Annotated[str, typer.Option(help="Of the experts: bf16, fp16 or fp32.")] = "bf16",
    cache_dir: Annotated[Path | None, typer.Option(help="Where the converted cache is.")] = None,
    max_size: Annotated[str | None, typer.Option(help="What the cache may take, such as 60GB.")] = None,
    contents: Annotated[bool, typer.Option("--contents", help="Keep a checksum of the source's content too.")] = False,
    json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="Show tracebacks of errors.")] = False,
) -> None:
    """What `wan-loader cache build` does with the directory of a whole pipeline."""
    from wan_loader.cache.cached_load import read_parts
    from wan_loader.cache.store import Store
    from wan_loader.cache.use import build_entry
    from wan_loader.cli.building import report_build
    from wan_loader.dtypes import parse_dtype
    from wan_loader.sizes import parse_size
    from wan_pipeline.cached import outline_wan
    from wan_pipeline.checkpoint import open_wan

    size = None if max_size is None else parse_size(max_size)
    outline = outline_wan(open_wan(directory), parse_dtype(dtype))
    begun = build_entry(Store(cache_dir), outline, read_parts, max_size=size, digest_contents=contents)
    report_build(begun, json=json)


def main() -> NoReturn:
    """Run `wan-pipeline`. Called by a program as its last line, it takes over the program's Ctrl-C."""
    if sys._getframe(1).f_globals.get("__name__") == "__main__":
        begin_program()
    run_program(app)
