"""`wan-loader doctor`: what this machine can do, what is wrong with it, what to change."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from wan_loader.cli.options import Device, JsonOut, Verbose

__all__ = ["doctor"]


def doctor(
    path: Annotated[
        Path | None,
        typer.Argument(metavar="PATH", help="A checkpoint, or a directory with several: its disk is measured."),
    ] = None,
    device: Device = "auto",
    refresh: Annotated[bool, typer.Option("--refresh", help="Measure again what was measured before.")] = False,
    json: JsonOut = False,
    verbose: Verbose = False,
) -> None:
    """Measure disk, page cache, copies and casts in under ten seconds, and check limits and settings. Only reads.

    Example:

        wan-loader doctor Wan2.2-T2V-A14B
    """
    from wan_loader.cli.output import print_json
    from wan_loader.cli.render import output_console

    document = _document(path, device, refresh=refresh)
    if json:
        print_json(document)
    else:
        _print(output_console(), document)


def _document(path: Path | None, device: str, *, refresh: bool) -> dict[str, Any]:
    from wan_loader.loader.devices import device_card, resolve_device
    from wan_loader.machine import machine_card
    from wan_loader.profiler.ceilings import find_ceilings
    from wan_loader.profiler.diagnosis import diagnose, weight_paths
    from wan_loader.profiler.storage import limits, storage_facts
    from wan_loader.source.evict import resident_bytes

    target = resolve_device(device)
    files = weight_paths(path) if path else []
    found = find_ceilings(files, device=str(target), refresh=refresh)
    document: dict[str, Any] = {
        "schema_version": 1,
        "command": "doctor",
        "target": str(path) if path else None,
        "device": str(target),
        "machine": {**machine_card(), **device_card(target)},
        "limits": limits(),
        "storage": storage_facts(files[0]) if files else {},
        "files": {"n": len(files), "nbytes": sum(Path(f).stat().st_size for f in files)},
        "ceilings": dict(found.values),
        "measured_now": list(found.measured),
        "notes": list(found.notes),
    }
    document["files"]["resident"] = resident_bytes(files)
    document["advice"] = diagnose(document)
    return document


def _print(console: Any, document: dict[str, Any]) -> None:
    from rich.markup import escape
    from rich.table import Table

    from wan_loader.sizes import format_bytes

    facts = Table(box=None, pad_edge=False, show_header=False)
    for section in ("machine", "limits", "storage", "files"):
        for key, value in document[section].items():
            if value is not None:
                shown = format_bytes(value) if key.endswith("_bytes") or key in ("nbytes", "resident") else str(value)
                facts.add_row(key.removesuffix("_bytes").replace("_", " "), escape(shown))
    console.print(facts)
    rates = Table("\nwhat", "\nat best", box=None, pad_edge=False, header_style="bold")
    for key, value in document["ceilings"].items():
        unit, name = ("GB/s", key[:-5]) if key.endswith("_gbps") else ("s", key[:-2])
        rates.add_row(name.replace("_", " "), f"{value:.2f} {unit}")
    console.print(rates)
    if not document["measured_now"]:
        console.print("measured before; --refresh measures again", style="dim")
    for note in document["notes"]:
        console.print(f"note: {escape(note)}", style="dim")
    console.print()
    for number, item in enumerate(document["advice"], 1):
        console.print(f"[bold]{number}. {escape(item['text'])}[/bold]\n   {escape(item['evidence'])}")
    if not document["advice"]:
        console.print("[bold green]nothing is wrong with this machine[/]")
