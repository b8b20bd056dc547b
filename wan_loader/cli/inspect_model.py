"""`wan-loader inspect` for a whole model's directory: its parts, and what is missing."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any

import typer

from wan_loader.printable import printable

if TYPE_CHECKING:
    from pathlib import Path

    from wan_loader.formats import Checkpoint
    from wan_loader.formats.inventory import Inventory

__all__ = ["inspect_model"]

_MAX_NAMED = 8


def inspect_model(path: Path, inventory: Inventory, *, json: bool) -> None:
    """Print what the directory holds; exits with 1 if it is not complete."""
    from wan_loader.cli.output import print_json, say
    from wan_loader.cli.render import print_warnings
    from wan_loader.sizes import format_count

    document = _document(path, inventory)
    if json:
        print_json(document)
    else:
        _print(path, inventory, document)
    print_warnings(document["warnings"])
    if inventory.complete:
        return
    what = [f"{_names(inventory)} missing"] if inventory.model.missing else []
    what += [f"{format_count(len(inventory.damaged), 'part')} damaged"] if inventory.damaged else []
    say(printable(f"error: {path} is not complete: {'; '.join(what)}: {_advice(path, inventory)}"))
    raise typer.Exit(1)


def _names(inventory: Inventory) -> str:
    names = [missing.path for missing in inventory.model.missing]
    names[_MAX_NAMED:] = [f"{len(names) - _MAX_NAMED} more"] if len(names) > _MAX_NAMED else []
    return f"{', '.join(names[:-1])} and {names[-1]} are" if len(names) > 1 else f"{names[0]} is"


def _advice(path: Path, inventory: Inventory) -> str:
    first = "delete what is damaged; " if inventory.damaged else ""
    if (repository := inventory.model.download_from) is None:
        return f"{first}finish the download"
    return f"{first}wan-loader download {repository} --to {shlex.quote(str(path))} gets what is missing"


def _document(path: Path, inventory: Inventory) -> dict[str, Any]:
    from wan_loader.system.page_cache import describe

    model, parts = inventory.model, inventory.parts
    files = [file.path for part in parts.values() for file in part.files]
    return {
        "schema_version": 1,
        "command": "inspect",
        "target": str(path),
        "format": "model",
        "layout": model.layout,
        "repository": model.repository,
        "revision": model.revision,
        "complete": inventory.complete,
        "n_tensors": sum(len(part.tensors) for part in parts.values()),
        "nbytes": sum(part.nbytes for part in parts.values()),
        "nbytes_file": sum(part.nbytes_file for part in parts.values()),
        "parts": [_part(name, part) for name, part in parts.items()],
        "missing": [{"path": a.path, "nbytes": a.nbytes, "nbytes_here": a.nbytes_here} for a in model.missing],
        "damaged": [{"part": name, "error": error} for name, error in inventory.damaged],
        "warnings": [*(w for part in parts.values() for w in part.warnings), *describe(files)],
    }


def _part(name: str, part: Checkpoint) -> dict[str, Any]:
    from wan_loader.warming.evict import resident_bytes

    return {
        "name": name,
        "path": part.path,
        "format": part.format,
        "n_tensors": len(part.tensors),
        "nbytes": part.nbytes,
        "nbytes_file": part.nbytes_file,
        "dtypes": sorted({tensor.dtype for tensor in part.tensors}),
        "n_files": len(part.files),
        "resident": resident_bytes([file.path for file in part.files]),
    }


def _print(path: Path, inventory: Inventory, document: dict[str, Any]) -> None:
    from wan_loader.cli.render import output_console
    from wan_loader.console import marked
    from wan_loader.sizes import format_bytes, format_share
    from wan_loader.tables import Column, Columns

    console, model = output_console(), inventory.model
    titles = {part.name: part.title for part in model.parts}
    console.print(marked("[bold]{}[/]", path))
    origin = f", from {model.repository} at {str(model.revision)[:12]}" if model.repository else ""
    console.print(printable(f"{model.family}, {model.layout} layout{origin}") + "\n")
    numbers = (Column("files", right=True, drop=1), Column("tensors", right=True, drop=2), Column("bytes", right=True))
    parts = Columns("part", *numbers, Column("dtypes", least=12), Column("page cache", right=True))
    for row in document["parts"]:
        share = format_share(row["resident"], row["nbytes_file"])
        title, dtypes = titles[row["name"]], ", ".join(row["dtypes"])
        sizes = (str(row["n_files"]), str(row["n_tensors"]), format_bytes(row["nbytes"]))
        parts.add_row(title, *sizes, dtypes, share)
    if document["parts"]:
        console.print(parts)
    for name, error in inventory.damaged:
        console.print(marked("\n[bold red]damaged[/]: {}: {}", titles.get(name, name), error))
    if model.missing:
        console.print("\nmissing", style="bold")
    for file in model.missing:
        size = "" if file.nbytes is None else f", {format_bytes(file.nbytes)}"
        here = f", {format_bytes(file.nbytes_here)} of that are here" if file.nbytes_here else ""
        console.print(f"{printable(file.path)}{size}{here}")
