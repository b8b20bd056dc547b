"""`wan-loader stage`: a checkpoint onto a RAM disk or a faster disk, and away again."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wan_loader.cli.options import JsonOut, Threads, Verbose

if TYPE_CHECKING:
    from wan_loader.stage_copy.stage import Staged
    from wan_loader.stage_copy.unstage import Unstaged

__all__ = ["stage"]


def stage(
    to: Annotated[Path, typer.Option("--to", metavar="DIR", help="A RAM disk such as /dev/shm, or a faster disk.")],
    path: Annotated[
        Path | None, typer.Argument(metavar="PATH", help="A file, an index, or a directory with everything in it.")
    ] = None,
    remove: Annotated[
        bool,
        typer.Option(
            "--remove", help="Remove the copy of PATH from DIR, and only what `stage` made; without PATH, all copies."
        ),
    ] = False,
    verify: Annotated[
        bool | None,
        typer.Option(
            "--verify/--no-verify",
            help="Read back and compare everything, also what is in place already; or nothing.",
            show_default="what is copied now",
        ),
    ] = None,
    force: Annotated[
        bool,
        typer.Option(
            "--force", help="Replace files of the same names that were not staged; --remove then takes these, too."
        ),
    ] = False,
    threads: Threads = None,
    json: JsonOut = False,
    verbose: Verbose = False,
) -> None:
    """Copy a checkpoint to DIR, whole and compared, and say how to use it there.

    Free space and, for a RAM disk, memory are checked first. A run that was stopped is continued by the same command.
    Names that begin with a dot are left out.

    Examples:

        wan-loader stage model/transformer --to /dev/shm

        wan-loader stage /nfs/model --to /mnt/nvme

        wan-loader stage --remove --to /dev/shm
    """
    from wan_loader.cli.output import print_json
    from wan_loader.cli.progress import progress_bars
    from wan_loader.cli.render import print_warnings
    from wan_loader.stage_copy import stage as staging

    if remove:
        _remove(to, path, json=json)
        return
    if path is None:
        raise typer.BadParameter("name the PATH to stage, or --remove", param_hint="PATH")
    is_new = not os.path.lexists(to)
    with progress_bars() as progress:
        result = staging.stage(path, to, verify=verify, force=force, threads=threads, progress=progress)
    if json:
        print_json(_document(result))
    else:
        _print(result, path, to, is_new=is_new)
    print_warnings(result.warnings)


def _remove(to: Path, path: Path | None, *, json: bool) -> None:
    from wan_loader.cli.output import print_json
    from wan_loader.cli.render import output_console, print_warnings
    from wan_loader.printable import printable
    from wan_loader.sizes import format_bytes, format_count
    from wan_loader.stage_copy.unstage import unstage

    result = unstage(to, path)
    if json:
        print_json(_removed(to, result))
    else:
        names = ", ".join(result.names)
        what = format_count(result.n_files, "file") if result.n_files else "what was unfinished"
        removed = f"{what}, {format_bytes(result.nbytes)}"
        output_console().print(printable(f"removed {names} from {to}: {removed}"))
    print_warnings([f"{kept} has changed since it was staged and stays" for kept in result.kept])


def _removed(to: Path, result: Unstaged) -> dict[str, Any]:
    return {
        "schema_version": 1,
        "command": "stage",
        "target": str(to),
        "removed": list(result.names),
        "n_files": result.n_files,
        "nbytes": result.nbytes,
        "kept": list(result.kept),
    }


def _document(result: Staged) -> dict[str, Any]:
    return {
        "schema_version": 1,
        "command": "stage",
        "target": result.source,
        "path": result.path,
        "filesystem": result.filesystem or None,
        "n_files": result.n_files,
        "nbytes": result.nbytes,
        "nbytes_copied": result.nbytes_copied,
        "nbytes_verified": result.nbytes_verified,
        "seconds": result.seconds,
        "gbps": result.nbytes_copied / result.seconds / 1e9 if result.seconds else 0.0,
        "warnings": list(result.warnings),
    }


def _print(result: Staged, path: Path, to: Path, *, is_new: bool) -> None:
    import shlex

    from wan_loader.cli.render import output_console
    from wan_loader.console import marked
    from wan_loader.printable import printable
    from wan_loader.sizes import format_bytes, format_count, format_rate, format_seconds
    from wan_loader.system.mounts import IN_MEMORY

    console = output_console()
    where = f" on {result.filesystem}" if result.filesystem else ""
    n_files, nbytes = format_count(result.n_files, "file"), format_bytes(result.nbytes)
    console.print(marked("[bold]{}[/]\n{}, {}{}", result.path, n_files, nbytes, where))
    if result.nbytes_copied:
        rate = format_rate(result.nbytes_copied / result.seconds)
        console.print(
            f"copied {format_bytes(result.nbytes_copied)} in {format_seconds(result.seconds)} = {rate}, "
            f"{format_bytes(result.nbytes_verified)} read back and compared"
        )
    else:
        compared = f", {format_bytes(result.nbytes_verified)} compared" if result.nbytes_verified else ""
        console.print(f"nothing was left to copy{compared}")
    if is_new:
        console.print(f"{printable(str(to))} did not exist, and was made", style="dim")
    if result.filesystem in IN_MEMORY:
        console.print("it takes that much memory until it is removed", style="dim")
    console.print(printable(f"use it:    name {shlex.quote(result.path)} instead of {shlex.quote(str(path))}"))
    command = f"wan-loader stage {shlex.quote(str(path))} --remove --to {shlex.quote(str(to))}"
    console.print(f"remove it: {printable(command)}")
