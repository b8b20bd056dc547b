"""`wan-loader doctor`: what this machine can do, what is wrong with it, what to change."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wan_loader.cli.options import Device, JsonOut, Part, Verbose

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["doctor"]

_RATES = {
    "disk_gbps": "reads from the disk",
    "page_cache_gbps": "reads from the page cache",
    "copy_gbps": "copies in memory",
    "cast_cpu_gbps": "casts on the processor",
    "cast_gpu_gbps": "casts on the GPU",
    "h2d_pinned_gbps": "copies to the GPU, pinned",
    "h2d_pageable_gbps": "copies to the GPU, not pinned",
    "register_gbps": "registering pages for the GPU",
    "fill_gbps": "loads into host memory",
    "convert_gbps": "loads with a cast, both sides",
    "start_s": "start of a Python that loads",
    "import_torch_s": "import torch",
    "cuda_init_s": "start of CUDA",
}


def doctor(
    path: Annotated[
        Path | None,
        typer.Argument(metavar="PATH", help="A checkpoint, or a directory with several: its disk is measured."),
    ] = None,
    part: Part = None,
    device: Device = "auto",
    refresh: Annotated[bool, typer.Option("--refresh", help="Measure again what was measured before.")] = False,
    json: JsonOut = False,
    verbose: Verbose = False,
) -> None:
    """Measure disk, page cache, copies and casts in under ten seconds, and check limits and settings. Only reads.

    Example:

        wan-loader doctor model
    """
    from wan_loader.cli.output import print_json
    from wan_loader.cli.render import output_console

    document, since = _document(path, part, device, refresh=refresh)
    if json:
        print_json(document)
    else:
        _print(output_console(), document, device=device, since=since)


def _document(
    path: Path | None, part: str | None, device: str, *, refresh: bool
) -> tuple[dict[str, Any], float | None]:
    """Look at everything.

    Returns:
        The findings, and the time at which the oldest of the rates in them was measured.
    """
    from wan_loader.devices.resolve import cuda_build, device_card, resolve_device
    from wan_loader.formats.inventory import checkpoints_in
    from wan_loader.profiler.probe.ceilings import find_ceilings
    from wan_loader.profiler.probe.machine_findings import diagnose
    from wan_loader.profiler.probe.system_facts import limits, nvidia_gpus, storage_facts
    from wan_loader.system.machine import machine_card
    from wan_loader.system.page_cache import describe
    from wan_loader.warming.evict import resident_bytes

    target = resolve_device(device)
    checkpoints = checkpoints_in(path, part) if path else []
    files = [file.path for checkpoint in checkpoints for file in checkpoint.files]
    found = find_ceilings(files, device=str(target), refresh=refresh)
    document: dict[str, Any] = {
        "schema_version": 1,
        "command": "doctor",
        "target": str(path) if path else None,
        "device": str(target),
        "machine": {**machine_card(), **device_card(str(target))},
        "gpus": {
            "here": nvidia_gpus(),
            "wanted": device != "cpu",
            "torch_cuda": cuda_build(),
            "visible": os.environ.get("CUDA_VISIBLE_DEVICES"),
        },
        "limits": limits(),
        "storage": storage_facts(files[0]) if files else {},
        "files": {"n": len(files), "nbytes": sum(Path(f).stat().st_size for f in files)},
        "ceilings": dict(found.values),
        "ceiling_samples": {name: list(many) for name, many in found.samples.items()},
        "measured_now": list(found.measured),
        "notes": list(found.notes),
    }
    document["files"]["resident"] = resident_bytes(files)
    document["notes"] += describe(files)
    document["advice"] = diagnose(document)
    return document, found.since


def _print(console: Any, document: dict[str, Any], *, device: str, since: float | None) -> None:
    from wan_loader.console import marked
    from wan_loader.printable import printable
    from wan_loader.tables import Column, Columns

    facts = Columns("", Column("", least=40, folds=True), show_header=False)
    for title, text in (*_machine(document, device), *_files(document)):
        facts.add_row(title, text)
    console.print(facts)
    console.print()
    rates = Columns("what", Column("at best", right=True), Column("samples", right=True))
    for key, value in document["ceilings"].items():
        many = document["ceiling_samples"].get(key) or [value]
        spread = f"{min(many):.2f} .. {max(many):.2f}" if len(many) > 1 else ""
        rates.add_row(_RATES.get(key, key), f"{value:.2f} {'GB/s' if key.endswith('_gbps') else 's'}", spread)
    console.print(rates)
    if len(document["measured_now"]) < len(document["ceilings"]):
        console.print(_measured_before(document, since), style="dim")
    for note in document["notes"]:
        console.print(f"note: {printable(note)}", style="dim")
    console.print()
    for number, item in enumerate(document["advice"], 1):
        console.print(marked("[bold]{}. {}[/]\n   {}", number, item["text"], item["evidence"]))
    if not document["advice"]:
        console.print("nothing is wrong with this machine", style="bold green")


def _machine(document: dict[str, Any], device: str) -> Iterator[tuple[str, str]]:
    from wan_loader.sizes import format_bytes, format_count, format_seconds

    machine, limits = document["machine"], document["limits"]
    yield "processor", f"{machine['cpu']}, {format_count(machine['cores'], 'core')}"
    allowed, free = limits["memory_limit_bytes"], limits["memory_available_bytes"]
    left = "unknown how much is" if free is None else format_bytes(free)
    yield (
        "memory",
        f"{format_bytes(machine['memory_bytes'])}, {format_bytes(allowed)} of it allowed here, {left} available",
    )
    if "gpu" in machine:
        yield "GPU", f"{machine['gpu']}, {format_bytes(machine['gpu_memory_bytes'])}, CUDA {machine['cuda']}"
    elif device != "auto":
        yield "GPU", f"not looked at: --device {device}"
    else:
        here = document["gpus"]["here"]
        none = f"{here} here, and none that torch can use" if here else "none found that torch can use"
        yield "GPU", f"{none}: loads go to host memory"
    yield "system", f"Linux {machine['kernel']}, Python {machine['python']}, torch {machine['torch']}"
    locked = limits.get("memlock_bytes")
    yield "lockable memory", "unlimited" if locked is None else format_bytes(locked)
    if "transparent_huge_pages" in limits:
        yield "huge pages", limits["transparent_huge_pages"]
    if "memory_stall_s" in limits:
        yield "short of memory", f"for {format_seconds(limits['memory_stall_s'])} since this machine's start"


def _files(document: dict[str, Any]) -> Iterator[tuple[str, str]]:
    from wan_loader.sizes import format_bytes, format_count

    files, storage = document["files"], document["storage"]
    if not files["n"]:
        yield "files", "none given: name a checkpoint to have its disk looked at"
        return
    resident = files["resident"]
    cached = "unknown how much" if resident is None else format_bytes(resident)
    yield "files", f"{format_count(files['n'], 'file')}, {format_bytes(files['nbytes'])}, {cached} in the page cache"
    if "filesystem" in storage:
        kind = ", in memory" if storage["in_memory"] else ", over a network" if storage["network"] else ""
        yield "file system", f"{storage['filesystem']}{kind}, {storage['source']} at {storage['mounted_at']}"
    if "rotational" in storage:
        turns = "rotating, by what it says of itself" if storage["rotational"] else "solid state"
        ahead = f", reads {format_bytes(storage['read_ahead_bytes'])} ahead" if "read_ahead_bytes" in storage else ""
        yield "disk", turns + ahead


def _measured_before(document: dict[str, Any], since: float | None) -> str:
    import time

    from wan_loader.sizes import format_age

    some = "in part " if document["measured_now"] else ""
    when = "" if since is None else f", the oldest {format_age(time.time() - since)} ago"
    return f"{some}measured before{when}; --refresh measures again"
