"""`wan-loader warm`: pages into the page cache."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wan_loader.cli.options import JsonOut, Threads, Verbose, checked
from wan_loader.sizes import parse_size

if TYPE_CHECKING:
    from wan_loader.warming.warm import Warmed

__all__ = ["warm"]


def warm(
    path: Annotated[
        Path, typer.Argument(metavar="PATH", help="A file, an index, or a directory with everything in it.")
    ],
    limit: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Only the first 20GB, in order of first use.", callback=checked(parse_size)),
    ] = None,
    threads: Threads = None,
    json: JsonOut = False,
    verbose: Verbose = False,
) -> None:
    """Read a checkpoint into the page cache, at the disk's speed, so that the next start finds it in memory.

    Refuses, before it reads anything, what the machine or its cgroup cannot hold. Exits with 1 if pages did not stay.

    Examples:

        wan-loader warm model

        wan-loader warm model/transformer --limit 20GB
    """
    from wan_loader.cli.output import print_json
    from wan_loader.cli.progress import byte_progress
    from wan_loader.cli.render import print_warnings
    from wan_loader.system.page_cache import describe
    from wan_loader.warming import warm as warming
    from wan_loader.warming.tree import list_tree

    limit_nbytes = None if limit is None else parse_size(limit)
    tree = list_tree(path, follow=True)
    with byte_progress("warming") as progress:
        result = warming.warm(tree.files, threads=threads, limit_nbytes=limit_nbytes, progress=progress)
    doubts = describe(file.path for file in tree.files)
    warnings = (*tree.warnings, *result.warnings, *_shortfall(result), *doubts)
    if json:
        print_json(_document(tree.path, len(tree.files), result, warnings))
    else:
        _print(tree.path, len(tree.files), result)
    print_warnings(warnings)
    if result.complete is False:
        raise typer.Exit(1)


def _shortfall(result: Warmed) -> tuple[str, ...]:
    from wan_loader.sizes import format_bytes

    if result.resident_after is None or result.complete:
        return ()
    missing = format_bytes(result.nbytes - result.resident_after)
    return (f"{missing} did not stay in the page cache: memory is short, or the file system keeps no pages",)


def _document(target: str, n_files: int, result: Warmed, warnings: tuple[str, ...]) -> dict[str, Any]:
    return {
        "schema_version": 1,
        "command": "warm",
        "target": target,
        "n_files": n_files,
        "nbytes": result.nbytes,
        "resident_before": result.resident_before,
        "resident_after": result.resident_after,
        "nbytes_read": result.nbytes_read,
        "seconds": result.seconds,
        "gbps": result.nbytes_read / result.seconds / 1e9 if result.seconds else 0.0,
        "complete": result.complete,
        "warnings": list(warnings),
    }


def _print(target: str, n_files: int, result: Warmed) -> None:
    from wan_loader.cli.render import output_console
    from wan_loader.console import marked
    from wan_loader.sizes import format_bytes, format_count, format_rate, format_seconds

    console = output_console()
    console.print(marked("[bold]{}[/]", target))
    console.print(f"{format_count(n_files, 'file')}, {format_bytes(result.nbytes)}")
    rate = f" = {format_rate(result.nbytes_read / result.seconds)}" if result.nbytes_read and result.seconds else ""
    console.print(f"in the page cache before: {_share(result.resident_before, result.nbytes)}")
    console.print(f"read {format_bytes(result.nbytes_read)} in {format_seconds(result.seconds)}{rate}")
    console.print(f"in the page cache now:    {_share(result.resident_after, result.nbytes)}")


def _share(part: int | None, whole: int) -> str:
    from wan_loader.sizes import format_bytes

    if part is None:
        return "unknown how much"
    return f"{format_bytes(part)} ({part / whole if whole else 1.0:.0%})"
