"""`wan-loader estimate`: how long a start would take on other hardware, from headers alone."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wan_loader.cli.options import Dtype, JsonOut, Verbose, checked
from wan_loader.errors import OptionError
from wan_loader.sizes import parse_rate

if TYPE_CHECKING:
    from wan_loader.profiler.simulate import Hardware

__all__ = ["estimate"]

#: Where nothing was measured on this machine: PCIe 5 x16 and a current GPU; memory and cores of a workstation.
_DEFAULTS = {"h2d_pinned_gbps": 50.0, "cast_gpu_gbps": 1500.0, "copy_gbps": 5.0, "cast_cpu_gbps": 5.0}
_FIXED_S = {"import_torch_s": 2.0, "cuda_init_s": 0.5}


class DeviceChoice(enum.StrEnum):
    """What weights are loaded to."""

    CUDA = "cuda"
    CPU = "cpu"


def _parse_disk(text: str) -> float:
    """Bytes per second of a known kind of storage, or as written. Raises `OptionError`."""
    from wan_loader.profiler.simulate import STORAGES

    if text in STORAGES:
        return STORAGES[text]
    if not text[:1].isdigit():
        raise OptionError(f"{text!r} is no rate such as 150MB/s, and none of {', '.join(STORAGES)}")
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
    device: Annotated[DeviceChoice, typer.Option(help="What the weights are loaded to.")] = DeviceChoice.CUDA,
    dtype: Dtype = None,
    json: JsonOut = False,
    verbose: Verbose = False,
) -> None:
    """Predict the start on other storage, by playing the load's plan through. Reads headers only.

    Examples:

        wan-loader estimate Wan2.2-T2V-A14B --dtype bf16

        wan-loader estimate model.safetensors --disk 150MB/s --disk nvme-gen4 --pcie 12GB/s
    """
    from wan_loader.cli.output import print_json

    document = _document(path, disk, pcie, device.value, dtype)
    if json:
        print_json(document)
    else:
        _print(document)


def _document(path: Path, disk: list[str] | None, pcie: str | None, device: str, dtype: str | None) -> dict[str, Any]:
    from wan_loader.dtypes import dtype_name
    from wan_loader.profiler.diagnosis import checkpoints_in
    from wan_loader.profiler.simulate import parts_of, simulate

    checkpoints = checkpoints_in(path)
    parts = parts_of(checkpoints, dtype_name(dtype))
    rows = []
    for name, hardware in _choices(disk, pcie, device, [f.path for c in checkpoints for f in c.files]):
        prediction = simulate(parts, hardware)
        rows.append({"storage": name, "disk_bytes_per_s": hardware.disk, **_row(prediction)})
    return {
        "schema_version": 1,
        "command": "estimate",
        "target": str(path),
        "device": device,
        "dtype": dtype,
        "nbytes": sum(p.nbytes for p in parts),
        "nbytes_converted": sum(p.nbytes for p in parts if p.cast),
        "checkpoints": [{"path": c.path, "nbytes": c.nbytes} for c in checkpoints],
        "estimates": rows,
    }


def _choices(disks: list[str] | None, pcie: str | None, device: str, files: list[str]) -> list[tuple[str, Hardware]]:
    """Each storage that was asked for, or all known ones and this machine's own, with the rest of the hardware."""
    from wan_loader.profiler.ceilings import known_ceilings
    from wan_loader.profiler.simulate import STORAGES, Hardware

    known = known_ceilings(files, device=device)
    values = {**_DEFAULTS, **_FIXED_S, **known}
    rates = {name: _parse_disk(name) for name in disks} if disks else dict(STORAGES)
    if not disks and "disk_gbps" in known:
        rates["this disk"] = known["disk_gbps"] * 1e9
    if not disks and "page_cache_gbps" in known:
        rates["page cache"] = known["page_cache_gbps"] * 1e9
    cuda = device == "cuda"
    copy = parse_rate(pcie) if pcie else values["h2d_pinned_gbps" if cuda else "copy_gbps"] * 1e9
    cast = values["cast_gpu_gbps" if cuda else "cast_cpu_gbps"] * 1e9
    fixed = values["import_torch_s"] + (values["cuda_init_s"] if cuda else 0.0)
    ordered = sorted(rates.items(), key=lambda item: item[1])
    return [(n, Hardware(disk=r, copy=copy, cast=cast, cuda=cuda, fixed_s=fixed)) for n, r in ordered]


def _row(prediction: Any) -> dict[str, Any]:
    fields = {name: getattr(prediction, name) for name in ("seconds", "read_s", "copy_s", "cast_s", "fixed_s")}
    return {**fields, "bottleneck": prediction.bottleneck}


def _print(document: dict[str, Any]) -> None:
    from rich.table import Table

    from wan_loader.cli.render import output_console
    from wan_loader.sizes import format_bytes, format_rate, format_seconds

    console = output_console()
    cast = document["nbytes_converted"]
    console.print(
        f"[bold]{document['target']}[/bold]\n{format_bytes(document['nbytes'])} to {document['device']}"
        + (f", {format_bytes(cast)} of it converted" if cast else "")
        + "; cold, everything at its rate, imports before the first byte\n"
    )
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("storage", "reads", "start", "disk", "copy", "cast", "fixed", "limit"):
        table.add_column(title, justify="left" if title in ("storage", "limit") else "right", no_wrap=True)
    for row in document["estimates"]:
        times = [format_seconds(row[k]) if row[k] else "" for k in ("read_s", "copy_s", "cast_s", "fixed_s")]
        start = format_seconds(row["seconds"])
        table.add_row(row["storage"], format_rate(row["disk_bytes_per_s"]), start, *times, row["bottleneck"])
    console.print(table)
