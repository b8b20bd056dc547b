"""`wan-loader evict`: pages out of the page cache, with proof."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wan_loader.cli.options import JsonOut, Verbose

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from wan_loader.warming.evict import Evicted

__all__ = ["evict"]


def evict(
    path: Annotated[
        Path, typer.Argument(metavar="PATH", help="A file, an index, or a directory with everything in it.")
    ],
    json: JsonOut = False,
    verbose: Verbose = False,
) -> None:
    """Push a checkpoint out of the page cache, and prove it: for a cold start, or to give the memory back.

    Pages that stay are listed with the reason, and the exit code is 1.

    Example:

        wan-loader evict model
    """
    from wan_loader.cli.output import print_json
    from wan_loader.cli.render import print_warnings
    from wan_loader.system.page_cache import describe
    from wan_loader.warming import evict as evicting
    from wan_loader.warming.tree import list_tree

    tree = list_tree(path, follow=True)
    results = evicting.evict(file.path for file in tree.files)
    if json:
        print_json(_document(tree.path, results))
    else:
        _print(tree.path, results)
    left = [f"{r.path}: {_left(r)}{r.reason}" for r in results if r.reason]
    print_warnings([*tree.warnings, *left, *describe(r.path for r in results if r.resident_after is not None)])
    if any(r.resident_after != 0 for r in results):
        raise typer.Exit(1)


def _left(result: Evicted) -> str:
    from wan_loader.sizes import format_bytes

    return f"{format_bytes(result.resident_after)} stay: " if result.resident_after else ""


def _document(target: str, results: Sequence[Evicted]) -> dict[str, Any]:
    return {
        "schema_version": 1,
        "command": "evict",
        "target": target,
        "nbytes": sum(r.nbytes for r in results),
        "resident_before": _total(r.resident_before for r in results),
        "resident_after": _total(r.resident_after for r in results),
        "complete": all(r.resident_after == 0 for r in results),
        "files": [
            {
                "path": r.path,
                "nbytes": r.nbytes,
                "resident_before": r.resident_before,
                "resident_after": r.resident_after,
                "reason": r.reason or None,
            }
            for r in results
        ],
    }


def _total(counts: Iterable[int | None]) -> int | None:
    """Return the sum; None if one of them is unknown."""
    known = list(counts)
    return None if None in known else sum(n for n in known if n is not None)


def _print(target: str, results: Sequence[Evicted]) -> None:
    from wan_loader.cli.render import output_console
    from wan_loader.console import marked
    from wan_loader.sizes import format_bytes, format_count

    console = output_console()
    before, after = _total(r.resident_before for r in results), _total(r.resident_after for r in results)
    n_files, nbytes = format_count(len(results), "file"), format_bytes(sum(r.nbytes for r in results))
    console.print(marked("[bold]{}[/]\n{}, {}", target, n_files, nbytes))
    for when, resident in (("before: ", before), ("now:    ", after)):
        cached = "unknown how much" if resident is None else format_bytes(resident)
        console.print(f"in the page cache {when}{cached}")
