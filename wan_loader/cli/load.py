"""`wan-loader load`: one load, and how fast it went."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from wan_loader.cli.building import follow_build, stopping
from wan_loader.cli.options import CacheDir, Device, Dtype, Io, IoChoice, JsonOut, Part, PathArgument, Threads, Verbose
from wan_loader.cli.torchrun import together
from wan_loader.distributed.processes import is_first

if TYPE_CHECKING:
    from pathlib import Path

    from wan_loader.formats import Checkpoint
    from wan_loader.loading.report import LoadReport
    from wan_loader.loading.result import EntryBuild, LoadResult

__all__ = ["load"]


def load(
    path: PathArgument,
    device: Device = "auto",
    dtype: Dtype = None,
    io: Io = IoChoice.AUTO,
    threads: Threads = None,
    part: Part = None,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify",
            help="Read again with safetensors or torch and compare every bit; of a cache entry, compare its checksums.",
        ),
    ] = False,
    cache: Annotated[
        bool,
        typer.Option(
            "--cache", help="Keep the converted weights, and read them from there the next time. For one process."
        ),
    ] = False,
    cache_dir: CacheDir = None,
    keep: Annotated[
        bool, typer.Option("--keep", help="Take the weights that `standby keep` has left on the device, if it has.")
    ] = False,
    json: JsonOut = False,
    verbose: Verbose = False,
) -> None:
    """Load a checkpoint and say how fast it went; of a whole model's directory, each part, one after the other.

    Examples:

        wan-loader load model.safetensors

        wan-loader load model/transformer --device cuda --dtype bf16 --verify

        wan-loader load model/transformer --dtype bf16 --cache

        wan-loader load model/transformer --device cuda --dtype bf16 --keep

        wan-loader load checkpoint.pth --part state_dict

        torchrun --nproc_per_node 2 -m wan_loader load model.safetensors --device cuda
    """
    if cache_dir is not None and not cache:
        raise typer.BadParameter("it needs --cache", param_hint="--cache-dir")
    from wan_loader.events import Recorder, span
    from wan_loader.formats.inventory import checkpoints_in

    opening = Recorder()
    with span(opening, "header"):
        checkpoints = checkpoints_in(path, part)
    # of a whole model one after the other, and none is kept: all of them may be more than there is memory for
    reports, verified = [], 0
    for checkpoint in checkpoints:
        before = opening.spans if checkpoint is checkpoints[0] else []
        loaded = _load(checkpoint, device, dtype, io, threads, cache, cache_dir, verify, keep).after(before)
        with stopping(loaded.build):
            verified += _tell(checkpoint, loaded, verify=verify, quiet=json)
            if loaded.build is not None:
                _finish(loaded.build)
        reports.append(loaded.report)
        del loaded
    _tell_all(reports, str(path), json=json, verified=verified if verify else None)


def _tell(checkpoint: Checkpoint, loaded: LoadResult, *, verify: bool, quiet: bool) -> int:
    """Say how one load went, and return how many of its tensors were verified."""
    from wan_loader.cli.render import error_console, print_load
    from wan_loader.sizes import format_count

    hit = loaded.report.cache is not None and loaded.report.cache.state == "hit"
    checked = _verify(checkpoint, loaded) if verify and not hit else None
    if is_first() and not quiet:  # of a distributed run
        print_load(loaded.report)
        if checked is not None:
            error_console().print(f"verified: {format_count(checked, 'tensor')}, every bit equal")
        elif verify:
            error_console().print("verified: every checksum of the cache entry is right")
    return checked or 0


def _tell_all(reports: list[LoadReport], target: str, *, json: bool, verified: int | None) -> None:
    from wan_loader.cli.output import print_json
    from wan_loader.cli.render import output_console, print_warnings
    from wan_loader.loading.joined_report import joined
    from wan_loader.sizes import format_bytes, format_count, format_seconds

    if not is_first():
        return
    report = joined(reports, target)
    if json:
        parts = {"parts": [r.to_json() for r in reports]} if len(reports) > 1 else {}
        # of a cache entry, checksums were compared and no tensors
        checked = {"verified_tensors": verified} if verified else {}
        print_json({**report.to_json(), **parts, **checked})
    elif len(reports) > 1:
        text = f"{format_count(len(reports), 'checkpoint')}: {format_bytes(report.nbytes_file)}"
        output_console().print(f"{text} in {format_seconds(report.seconds)} = {report.gbps:.2f} GB/s")
    print_warnings(report.warnings)


def _finish(build: EntryBuild) -> None:
    from wan_loader.cli.render import error_console, print_warnings
    from wan_loader.printable import printable

    follow_build(build)
    if build.failure is not None:
        print_warnings([f"not cached: {build.failure}"])
    else:
        error_console().print(f"cached: {printable(str(build.path))}")


def _load(
    checkpoint: Checkpoint,
    device: str,
    dtype: str | None,
    io: IoChoice,
    threads: int | None,
    cache: bool,
    cache_dir: Path | None,
    verify: bool,
    keep: bool,
) -> LoadResult:
    import wan_loader
    from wan_loader.cli.progress import reading_progress

    load_weights = wan_loader.load  # is imported before there is a progress bar
    with together(device) as (on, group), reading_progress(checkpoint.nbytes) as observer:
        return load_weights(
            checkpoint,
            device=on,
            dtype=dtype,
            io=io.value,
            threads=threads,
            cache=cache,
            cache_dir=cache_dir,
            verify=verify and cache,
            keep=keep,
            group=group,
            observer=observer or wan_loader.Recorder(),
        )


def _verify(checkpoint: Checkpoint, loaded: LoadResult) -> int:
    from wan_loader.cli.output import say
    from wan_loader.verify import verify

    if sys.stderr.isatty() and is_first():
        say("verifying: reading everything again ...")
    return verify(checkpoint, loaded.tensors)
