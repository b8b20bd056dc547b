"""`wan-loader load`: one load, and how fast it went."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from wan_loader.cli.options import Device, Dtype, Io, IoChoice, JsonOut, PathArgument, Threads, Verbose

if TYPE_CHECKING:
    from pathlib import Path

    from wan_loader.loader.load import Loaded

__all__ = ["load"]


def load(
    path: PathArgument,
    device: Device = "auto",
    dtype: Dtype = None,
    io: Io = IoChoice.AUTO,
    threads: Threads = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read again with safetensors or torch and compare every bit.")
    ] = False,
    json: JsonOut = False,
    verbose: Verbose = False,
) -> None:
    """Load a checkpoint and say how fast it went.

    Examples:

        wan-loader load model.safetensors

        wan-loader load Wan2.2-T2V-A14B/high_noise_model --device cuda --dtype bf16 --verify
    """
    from wan_loader.cli.output import print_json
    from wan_loader.cli.render import error_console, print_load, print_warnings

    loaded = _load(path, device, dtype, io, threads)
    checked = _verify(path, loaded) if verify else None
    if json:
        print_json({**loaded.report.to_json(), **({} if checked is None else {"verified_tensors": checked})})
    else:
        print_load(loaded.report)
        if checked is not None:
            error_console().print(f"verified: {checked} tensors, every bit equal")
    print_warnings(loaded.report.warnings)


def _load(path: Path, device: str, dtype: str | None, io: IoChoice, threads: int | None) -> Loaded:
    import wan_loader
    from wan_loader.cli.render import reading_progress

    total = wan_loader.open_checkpoint(path).nbytes
    with reading_progress(total) as observer:
        return wan_loader.load(path, device=device, dtype=dtype, io=io.value, threads=threads, observer=observer)


def _verify(path: Path, loaded: Loaded) -> int:
    from wan_loader.verify import verify

    if sys.stderr.isatty():
        print("verifying: reading everything again ...", file=sys.stderr)
    return verify(path, loaded.tensors)
