"""`wan-loader download`: WAN2.2 from the Hugging Face Hub, or from ModelScope."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wan_loader.cli import JsonOut, Verbose

if TYPE_CHECKING:
    from wan_pipeline.hub.download import Downloaded

__all__ = ["download"]


class LayoutChoice(enum.StrEnum):
    """Arrangements of a checkpoint's files."""

    NATIVE = "native"
    DIFFUSERS = "diffusers"


class SourceChoice(enum.StrEnum):
    """Where the files come from."""

    HUB = "hub"
    MODELSCOPE = "modelscope"


def download(
    to: Annotated[Path, typer.Option("--to", metavar="DIR", help="Where it goes, or what is to be completed.")],
    repository: Annotated[
        str | None, typer.Argument(metavar="REPO", help="OWNER/NAME.", show_default="Wan-AI/Wan2.2-T2V-A14B")
    ] = None,
    layout: Annotated[
        LayoutChoice | None,
        typer.Option(help="As for generate.py, or as for diffusers.", show_default="native, or what REPO holds"),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit.", show_default="main")] = None,
    source: Annotated[
        SourceChoice, typer.Option(help="The Hugging Face Hub, or ModelScope, which has the same files.")
    ] = SourceChoice.HUB,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what is missing, and download nothing.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace files that differ from the hub's.")] = False,
    threads: Annotated[int, typer.Option(min=1, max=64, help="Files at a time.")] = 8,
    json: JsonOut = False,
    verbose: Verbose = False,
) -> None:
    """Download what text-to-video needs of WAN2.2, or what is missing of it, and check every file's hash.

    The same command goes on where it was stopped. A token for gated or private repositories is taken from HF_TOKEN or
    `hf auth login`, the hub's address from HF_ENDPOINT (a mirror's, for instance).

    Examples:

        wan-loader download --to Wan2.2-T2V-A14B

        wan-loader download --source modelscope --to Wan2.2-T2V-A14B

        wan-loader download --layout diffusers --to Wan2.2-T2V-A14B-Diffusers --dry-run
    """
    from wan_loader.cli import print_json, progress_bars
    from wan_pipeline.hub import download as downloading

    with progress_bars() as progress:
        result = downloading.download(
            to,
            repository,
            layout=None if layout is None else layout.value,
            revision=revision,
            source=source.value,
            dry_run=dry_run,
            force=force,
            threads=threads,
            progress=progress,
        )
    if json:
        print_json(_document(result, dry_run=dry_run))
    else:
        _print(result, dry_run=dry_run)


def _document(result: Downloaded, *, dry_run: bool) -> dict[str, Any]:
    return {
        "schema_version": 1,
        "command": "download",
        "target": result.directory,
        "repository": result.repository,
        "revision": result.revision,
        "layout": result.layout,
        "dry_run": dry_run,
        "nbytes": result.nbytes,
        "nbytes_missing": result.nbytes_missing,
        "nbytes_received": result.nbytes_received,
        "nbytes_hashed": result.nbytes_hashed,
        "seconds": result.seconds,
        "gbps": result.nbytes_received / result.seconds / 1e9 if result.seconds else 0.0,
        "files": [
            {"path": f.path, "nbytes": f.nbytes, "digest": f.digest, "found": status} for f, status in result.files
        ],
    }


def _print(result: Downloaded, *, dry_run: bool) -> None:
    from wan_loader.cli import marked, output_console, printable
    from wan_loader.sizes import format_bytes, format_count, format_rate, format_seconds

    console = output_console()
    console.print(marked("[bold]{}[/]", result.directory))
    console.print(marked("{} at {}, {} layout", result.repository, result.revision[:12], result.layout))
    if dry_run:
        console.print()
        for file, status in result.files:
            console.print(f"{status:9} {format_bytes(file.nbytes):>8}  {printable(file.path)}")
        missing = format_bytes(result.nbytes_missing)
        console.print(f"\n{missing} of {format_bytes(result.nbytes)} are to be downloaded")
        return
    if result.nbytes_received:
        rate = format_rate(result.nbytes_received / result.seconds)
        received = format_bytes(result.nbytes_received)
        console.print(f"received {received} in {format_seconds(result.seconds)} = {rate}")
    if result.nbytes_hashed:
        console.print(f"{format_bytes(result.nbytes_hashed)} were there")
    console.print(
        f"{format_count(len(result.files), 'file')}, {format_bytes(result.nbytes)}: complete, every hash is the hub's"
    )
