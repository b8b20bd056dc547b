"""`wan-loader inspect`: what a checkpoint holds, from its headers alone."""

from __future__ import annotations

import os
from collections import Counter
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wan_loader.cli.options import JsonOut, Part, PathArgument, Verbose

if TYPE_CHECKING:
    from wan_loader.formats import Checkpoint

__all__ = ["inspect"]


def inspect(
    path: PathArgument,
    part: Part = None,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    json: JsonOut = False,
    verbose: Verbose = False,
) -> None:
    """Show tensors, bytes, dtypes, files, and how much lies in the page cache. Reads headers only.

    Of a whole model's directory it shows the parts and what is missing, by name; the exit code is 1 if something is.

    Examples:

        wan-loader inspect model

        wan-loader inspect model/transformer

        wan-loader inspect model.safetensors --tensors
    """
    from wan_loader.cli.inspect_model import inspect_model
    from wan_loader.cli.output import print_json
    from wan_loader.formats import open_checkpoint
    from wan_loader.formats.inventory import take_inventory

    if part is None and (inventory := take_inventory(path)) is not None:
        inspect_model(path, inventory, json=json)
        return
    checkpoint = open_checkpoint(path, part=part)
    document = _document(checkpoint, tensors=tensors)
    if json:
        print_json(document)
    else:
        _print(checkpoint, document)


def _document(checkpoint: Checkpoint, *, tensors: bool) -> dict[str, Any]:
    from wan_loader.plan.dtype_policy import DtypePolicy
    from wan_loader.system.page_cache import describe
    from wan_loader.warming.evict import resident_bytes

    types = {t.name: checkpoint.quantised[t.name].kind for t in checkpoint.tensors if t.name in checkpoint.quantised}
    counts = Counter(types.get(t.name, t.dtype) for t in checkpoint.tensors)
    nbytes: Counter[str] = Counter()
    for tensor in checkpoint.tensors:
        nbytes[types.get(tensor.name, tensor.dtype)] += tensor.nbytes
    document: dict[str, Any] = {
        "schema_version": 1,
        "command": "inspect",
        "target": checkpoint.path,
        "format": checkpoint.format,
        "n_tensors": len(checkpoint.tensors),
        "nbytes": checkpoint.nbytes,
        "nbytes_file": checkpoint.nbytes_file,
        "dtypes": [{"dtype": d, "n_tensors": counts[d], "nbytes": nbytes[d]} for d, _ in nbytes.most_common()],
        "files": [{"path": f.path, "nbytes": f.nbytes, "resident": resident_bytes([f.path])} for f in checkpoint.files],
        "warnings": [
            *checkpoint.warnings,
            *DtypePolicy().check(checkpoint, checkpoint.tensors),
            *describe(f.path for f in checkpoint.files),
        ],
    }
    if tensors:
        document["tensors"] = [
            {
                "name": t.name,
                "dtype": types.get(t.name, t.dtype),
                "shape": list(checkpoint.quantised[t.name].value.shape if t.name in types else t.shape),
                "nbytes": t.nbytes,
            }
            for t in checkpoint.tensors
        ]
    return document


def _print(checkpoint: Checkpoint, document: dict[str, Any]) -> None:
    from wan_loader.cli.render import output_console, print_warnings
    from wan_loader.console import marked
    from wan_loader.sizes import format_bytes, format_count, format_share
    from wan_loader.tables import Column, Columns

    console = output_console()
    console.print(marked("[bold]{}[/]", checkpoint.path))
    n_tensors = format_count(document["n_tensors"], "tensor")
    console.print(f"{document['format']}, {n_tensors}, {format_bytes(document['nbytes'])}\n")
    nbytes = Column("bytes", right=True)
    dtypes = Columns("dtype", Column("tensors", right=True), nbytes)
    for row in document["dtypes"]:
        dtypes.add_row(row["dtype"], str(row["n_tensors"]), format_bytes(row["nbytes"]))
    console.print(dtypes)
    console.print()
    files = Columns(Column("file", least=30), nbytes, Column("in the page cache", right=True))
    for row in document["files"]:
        share = format_share(row["resident"], row["nbytes"])
        files.add_row(os.path.basename(row["path"]), format_bytes(row["nbytes"]), share)
    console.print(files)
    if "tensors" in document:
        listing = Columns(Column("tensor", least=30), "dtype", "shape", nbytes)
        for row in document["tensors"]:
            shape = "x".join(map(str, row["shape"])) or "scalar"
            listing.add_row(row["name"], row["dtype"], shape, format_bytes(row["nbytes"]))
        console.print()
        console.print(listing)
    print_warnings(document["warnings"])
