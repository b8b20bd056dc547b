"""`wan-loader estimate`: how long a start would take on other hardware, from headers alone."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wan_loader.cli.options import Dtype, JsonOut, Part, Verbose, checked
from wan_loader.errors import OptionError
from wan_loader.sizes import parse_rate

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["estimate"]

#: Where nothing was measured on this machine: PCIe 5 x16 and a current GPU; memory and cores of a workstation.
_DEFAULTS = {"h2d_pinned_gbps": 50.0, "cast_gpu_gbps": 1500.0, "copy_gbps": 5.0, "cast_cpu_gbps": 5.0}
_FIXED_S = {"import_torch_s": 2.0, "cuda_init_s": 0.5}


class DeviceChoice(enum.StrEnum):
    """The kinds of devices that weights are loaded to."""

    CUDA = "cuda"
    CPU = "cpu"


def _parse_disk(text: str) -> float:
    """Read the bytes per second of a known kind of storage, or as written.

    Raises:
        OptionError: It is neither.
    """
    from wan_loader.profiler.analysis.simulate import STORAGES

    if text in STORAGES:
        return STORAGES[text]
    if not text[:1].isdigit():
        raise OptionError.because(f"{text!r} is no rate such as 150MB/s, and none of {', '.join(STORAGES)}")
    return parse_rate(text)


def estimate(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A checkpoint, or a model's directory with several.")],
    disk: Annotated[
        list[str] | None,
        typer.Option(
            help="A rate such as 150MB/s, or a name such as hdd; may be repeated.", callback=checked(_parse_disk)
        ),
    ] = None,
    pcie: Annotated[
        str | None, typer.Option(help="Rate of copies to the GPU, such as 25GB/s.", callback=checked(parse_rate))
    ] = None,
    device: Annotated[
        DeviceChoice, typer.Option(help="What the weights are loaded to; no GPU need be here.")
    ] = DeviceChoice.CUDA,
    dtype: Dtype = None,
    part: Part = None,
    json: JsonOut = False,
    verbose: Verbose = False,
) -> None:
    """Predict the start on other storage, by playing the load's plan through. Reads headers only.

    Examples:

        wan-loader estimate model --dtype bf16

        wan-loader estimate model.safetensors --disk 150MB/s --disk nvme-gen4 --pcie 12GB/s
    """
    from wan_loader.cli.output import print_json
    from wan_loader.cli.render import print_warnings

    document = _document(path, disk, pcie, device.value, dtype, part)
    if json:
        print_json(document)
    else:
        _print(document)
    print_warnings(document["warnings"])


def _document(
    path: Path, disk: list[str] | None, pcie: str | None, device: str, dtype: str | None, part: str | None
) -> dict[str, Any]:
    from wan_loader.dtypes import dtype_name
    from wan_loader.formats.inventory import checkpoints_in
    from wan_loader.profiler.analysis.simulate import Hardware, blocks_of, plan_elsewhere, simulate
    from wan_loader.profiler.probe.ceilings import known_ceilings

    checkpoints = checkpoints_in(path, part)
    plans = [plan_elsewhere(c, dtype_name(dtype), cuda=device == "cuda") for c in checkpoints]
    blocks, slots = [block for plan in plans for block in blocks_of(plan)], min(plan.settings.n_slots for plan in plans)
    known = known_ceilings([f.path for c in checkpoints for f in c.files], device=device)
    rates = _rates(pcie, device, known)
    copy, cast, fixed_s = rates["copy"]["bytes_per_s"], rates["cast"]["bytes_per_s"], rates["fixed"]["seconds"]
    rows = []
    for name, rate in _storages(disk, known):
        hardware = Hardware(disk=rate, copy=copy, cast=cast, cuda=device == "cuda", slots=slots, fixed_s=fixed_s)
        rows.append({"storage": name, "disk_bytes_per_s": rate, **_row(simulate(blocks, hardware))})
    return {
        "schema_version": 1,
        "command": "estimate",
        "target": str(path),
        "device": device,
        "dtype": dtype,
        "nbytes": sum(p.nbytes for p in blocks),
        "nbytes_converted": sum(p.nbytes for p in blocks if p.cast),
        "checkpoints": [{"path": c.path, "nbytes": c.nbytes} for c in checkpoints],
        "rates": rates,
        "estimates": rows,
        "warnings": _missing(path),
    }


def _missing(path: Path) -> list[str]:
    """Return a warning, if parts of a model's directory are not here."""
    from wan_loader.formats.inventory import take_inventory
    from wan_loader.sizes import format_count

    inventory = take_inventory(path)
    if inventory is None or inventory.complete:
        return []
    absent = [file.path for file in inventory.model.missing]
    names = ", ".join([*absent[:1], *(["..."] if absent[1:] else [])])
    what = [f"{format_count(len(absent), 'file')} missing ({names})"] if absent else []
    what += [f"{part} is damaged" for part, _ in inventory.damaged]
    return [f"the model is not complete: {'; '.join(what)}: this is the start of what is here (see wan-loader inspect)"]


def _rates(pcie: str | None, device: str, known: Mapping[str, float]) -> dict[str, dict[str, Any]]:
    """Return bytes per second of copies and casts, seconds before the first byte, each with where it is from."""
    cuda = device == "cuda"
    names = ("h2d_pinned_gbps", "cast_gpu_gbps") if cuda else ("copy_gbps", "cast_cpu_gbps")
    rates = {
        name: {"bytes_per_s": known.get(key, _DEFAULTS[key]) * 1e9, "origin": _origin([key], known)}
        for name, key in zip(("copy", "cast"), names, strict=True)
    }
    if pcie:
        rates["copy"] = {"bytes_per_s": parse_rate(pcie), "origin": "as asked for"}
    fixed = list(_FIXED_S) if cuda else ["import_torch_s"]
    return {
        **rates,
        "fixed": {"seconds": sum(known.get(k, _FIXED_S[k]) for k in fixed), "origin": _origin(fixed, known)},
    }


def _origin(keys: list[str], known: Mapping[str, float]) -> str:
    return "measured here" if all(key in known for key in keys) else "assumed"


def _storages(disks: list[str] | None, known: Mapping[str, float]) -> list[tuple[str, float]]:
    """List storages with bytes per second, slowest first: those asked for, or all known ones and this machine's own."""
    from wan_loader.profiler.analysis.simulate import STORAGES

    rates = {name: _parse_disk(name) for name in disks} if disks else dict(STORAGES)
    if not disks and "disk_gbps" in known:
        rates["this disk"] = known["disk_gbps"] * 1e9
    if not disks and "page_cache_gbps" in known:
        rates["page cache"] = known["page_cache_gbps"] * 1e9
    return sorted(rates.items(), key=lambda item: item[1])


def _row(prediction: Any) -> dict[str, Any]:
    fields = {name: getattr(prediction, name) for name in ("seconds", "read_s", "copy_s", "cast_s", "fixed_s")}
    return {**fields, "bottleneck": prediction.bottleneck}


def _print(document: dict[str, Any]) -> None:
    from wan_loader.cli.render import output_console
    from wan_loader.console import marked
    from wan_loader.sizes import format_bytes, format_rate, format_seconds
    from wan_loader.tables import Column, Columns

    console = output_console()
    cast = document["nbytes_converted"]
    console.print(marked("[bold]{}[/]", document["target"]))
    console.print(
        f"{format_bytes(document['nbytes'])} to {document['device']}"
        + (f", {format_bytes(cast)} of it converted" if cast else "")
        + "; cold, everything at its rate, imports before the first byte\n"
    )
    times = (Column(title, right=True) for title in ("reads", "start", "disk", "copy", "cast", "fixed"))
    table = Columns(Column("storage", least=12), *times, "limit")
    for row in document["estimates"]:
        parts = [format_seconds(row[k]) if row[k] else "" for k in ("read_s", "copy_s", "cast_s", "fixed_s")]
        start = format_seconds(row["seconds"])
        table.add_row(row["storage"], format_rate(row["disk_bytes_per_s"]), start, *parts, row["bottleneck"])
    console.print(table)
    copies, casts, fixed = (document["rates"][name] for name in ("copy", "cast", "fixed"))
    link = "copies to the GPU (PCIe)" if document["device"] == "cuda" else "copies in memory"
    console.print(
        f"{link} at {format_rate(copies['bytes_per_s'])} ({copies['origin']}), "
        f"casts at {format_rate(casts['bytes_per_s'])} ({casts['origin']})\n"
        f"fixed: imports{' and the start of CUDA' if document['device'] == 'cuda' else ''} before the first byte, "
        f"{format_seconds(fixed['seconds'])} ({fixed['origin']}); limit: what works longest\n"
        "disk, copy and cast: how long each works; they overlap, so they do not add up to the start",
        style="dim",
    )
