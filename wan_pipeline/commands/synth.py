"""`synth`, of both programs: a checkpoint of random weights."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, cast, get_args

import typer

from wan_loader import OptionError
from wan_pipeline.synth.arch import DType, Form, Layout, Size, SynthName, Task

__all__ = ["synth"]

_FORMS, _TASKS = (", ".join(get_args(names)) for names in (Form, Task))
_COMPONENTS = f"One of {', '.join(get_args(SynthName))}."


def synth(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="Where the checkpoint goes; empty or not there yet.")
    ],
    layout: Annotated[Layout, typer.Option(help="The files as in the native or the diffusers repository.")] = "native",
    size: Annotated[Size, typer.Option(help="tiny: a few MB, runs on a CPU; full: the published shapes.")] = "tiny",
    task: Annotated[Task, typer.Option(metavar="TASK", help=f"Which model: {_TASKS}.")] = "t2v-A14B",
    blocks: Annotated[int | None, typer.Option(help="Only the first N blocks of each expert.")] = None,
    component: Annotated[list[str] | None, typer.Option(help=f"Only this part; may be repeated. {_COMPONENTS}")] = None,
    dtype: Annotated[DType | None, typer.Option(help="Dtype of the experts' files; published: fp32.")] = None,
    form: Annotated[
        Form,
        typer.Option(metavar="FORM", help=f"{_FORMS}: as published, or a file a network as ComfyUI has them."),
    ] = "published",
    seed: Annotated[int, typer.Option(help="The same seed gives the same weights in both layouts.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace files in a directory that is not empty.")] = False,
) -> None:
    """Make a WAN2.2-shaped checkpoint of random weights (needs the pipeline extra).

    Files, names, shapes and dtypes are exactly those that are published.

    Examples:

        wan-loader synth /tmp/tiny --layout diffusers

        wan-loader synth /tmp/comfy --form fp8-scaled

        wan-loader synth /data/wan --size full

        wan-loader synth /data/part --size full --blocks 4 --component high_noise --dtype bf16
    """
    if find_spec("diffusers") is None:
        raise OptionError.because("synth needs the pipeline extra", "pip install 'wan-loader[pipeline]'")
    from wan_loader.cli import byte_progress, show
    from wan_loader.sizes import format_bytes, format_count
    from wan_pipeline.synth import synth as write

    with byte_progress(f"writing {directory}") as progress:
        report = write(
            directory,
            layout=layout,
            size=size,
            task=task,
            blocks=blocks,
            components=cast("list[SynthName]", component) if component else None,
            dtype=dtype,
            form=form,
            seed=seed,
            force=force,
            progress=progress,
        )
    show(f"{report.directory}: {format_count(len(report.files), 'file')}, {format_bytes(report.nbytes)}")
