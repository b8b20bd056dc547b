"""`wan-loader estimate`: how long a start would take on other hardware, from headers alone."""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wan_loader.cli.options import Dtype, JsonOut, Part, Verbose, checked
from wan_loader.errors import OptionError
from wan_loader.sizes import parse_rate

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from wan_loader.profiler.analysis.simulate import Prediction, SimulatedBlock

__all__ = ["estimate"]

#: Where nothing was measured on this machine: PCIe 5 x16 and a current GPU; memory and cores of a workstation.
_DEFAULTS = {"h2d_pinned_gbps": 50.0, "cast_gpu_gbps": 1500.0, "fill_gbps": 5.0, "convert_gbps": 7.5}
_FIXED_S = {"cuda": 2.5, "cpu": 2.0}
#: The share by which rates and starts on a quiet machine differ, whatever few samples say.
_UNSTEADY = 0.1


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
    from wan_loader.profiler.analysis.simulate import blocks_of, plan_elsewhere, start_range
    from wan_loader.profiler.probe.busy import busy_reason, crowding
    from wan_loader.profiler.probe.ceilings import known_ceilings

    checkpoints = checkpoints_in(path, part)
    plans = [plan_elsewhere(c, dtype_name(dtype), cuda=device == "cuda") for c in checkpoints]
    blocks, slots = [block for plan in plans for block in blocks_of(plan)], min(plan.settings.n_slots for plan in plans)
    known = known_ceilings([f.path for c in checkpoints for f in c.files], device=device).samples
    rates = _rates(pcie, device, known)
    # what nobody has measured does not depend on what this machine is doing
    busy = busy_reason() if known else ""
    crowd = crowding() if busy else 1.0
    rows = []
    for name, disk_rate in _storages(disk, known):
        seconds = {key: _played(blocks, slots, device, disk_rate, rates, key) for key in ("typical", "most", "least")}
        row = {"storage": name, "disk_bytes_per_s": disk_rate.typical, **_row(seconds["typical"])}
        best, typical, worst = (seconds[key].seconds for key in ("most", "typical", "least"))
        fastest_s, slowest_s = start_range(best, typical, worst, crowd)
        rows.append(row | {"fastest_s": fastest_s, "slowest_s": slowest_s})
    return {
        "schema_version": 1,
        "command": "estimate",
        "target": str(path),
        "device": device,
        "dtype": dtype,
        "nbytes": sum(p.nbytes for p in blocks),
        "nbytes_converted": sum(p.nbytes for p in blocks if p.cast),
        "checkpoints": [{"path": c.path, "nbytes": c.nbytes} for c in checkpoints],
        "rates": {name: rate.to_json("seconds" if name == "fixed" else "bytes_per_s") for name, rate in rates.items()},
        "estimates": rows,
        "notes": [f"the machine is busy now ({busy}): a start may take half as long, or {crowd:.1f} times"]
        if busy
        else [],
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


@dataclass(frozen=True, slots=True)
class _Rate:
    """A rate, or seconds, with what its samples differ by. The most is what makes a start quickest."""

    typical: float
    least: float
    most: float
    origin: str

    def to_json(self, unit: str) -> dict[str, Any]:
        """Return the document's fields."""
        return {unit: self.typical, "least": self.least, "most": self.most, "origin": self.origin}


def _played(
    blocks: Sequence[SimulatedBlock], slots: int, device: str, disk: _Rate, rates: Mapping[str, _Rate], key: str
) -> Prediction:
    """Play the plan through with the typical, the least or the most of all rates."""
    from wan_loader.profiler.analysis.simulate import Hardware, simulate

    copy, cast, fixed = (getattr(rates[name], key) for name in ("copy", "cast", "fixed"))
    rate = getattr(disk, key)
    return simulate(
        blocks, Hardware(disk=rate, copy=copy, cast=cast, cuda=device == "cuda", slots=slots, fixed_s=fixed)
    )


def _rates(pcie: str | None, device: str, known: Mapping[str, Sequence[float]]) -> dict[str, _Rate]:
    """Return bytes per second of copies and casts, seconds before the first byte, each with where it is from."""
    names = ("h2d_pinned_gbps", "cast_gpu_gbps") if device == "cuda" else ("fill_gbps", "convert_gbps")
    rates = {
        name: _measured(known.get(key, ()), 1e9) or _given(_DEFAULTS[key] * 1e9, "assumed")
        for name, key in zip(("copy", "cast"), names, strict=True)
    }
    if pcie:
        rates["copy"] = _given(parse_rate(pcie), "as asked for")
    # what was measured without a GPU tells nothing of a start with one
    starts = known.get("start_s", ()) if device == "cpu" or "cuda_init_s" in known else ()
    fixed = _measured(starts, 1.0)
    if fixed is not None:
        fixed = replace(fixed, least=fixed.most, most=fixed.least)
    return {**rates, "fixed": fixed or _given(_FIXED_S[device], "assumed")}


def _measured(samples: Sequence[float], unit: float) -> _Rate | None:
    """Return the median, and between what the next sample may be: of few, that is more than what they differ by."""
    from statistics import median

    if not samples:
        return None
    typical = median(samples)
    least, most = min(*samples, typical * (1 - _UNSTEADY)), max(*samples, typical * (1 + _UNSTEADY))
    return _Rate(typical * unit, least * unit, most * unit, "measured here")


def _given(value: float, origin: str) -> _Rate:
    return _Rate(value, value, value, origin)


def _storages(disks: list[str] | None, known: Mapping[str, Sequence[float]]) -> list[tuple[str, _Rate]]:
    """List storages with their rates, slowest first: those asked for, or all known ones and this machine's own."""
    from wan_loader.profiler.analysis.simulate import STORAGES

    asked = {name: _parse_disk(name) for name in disks} if disks else dict(STORAGES)
    rates = {name: _given(rate, "as asked for") for name, rate in asked.items()}
    for name, key in () if disks else (("this disk", "disk_gbps"), ("page cache", "page_cache_gbps")):
        if (rate := _measured(known.get(key, ()), 1e9)) is not None:
            rates[name] = rate
    return sorted(rates.items(), key=lambda item: item[1].typical)


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
    # what goes first where there is little room
    drops = {"reads": 0, "start": 0, "from .. to": 3, "disk": 0, "copy": 2, "cast": 1}
    times = (Column(title, right=True, drop=drop) for title, drop in drops.items())
    table = Columns(Column("storage", least=12), *times, "limit")
    for row in document["estimates"]:
        parts = [format_seconds(row[k]) if row[k] else "" for k in ("read_s", "copy_s", "cast_s")]
        start = format_seconds(row["seconds"])
        spread = f"{row['fastest_s']:.3g} .. {row['slowest_s']:.3g}" if row["slowest_s"] > row["fastest_s"] else ""
        table.add_row(row["storage"], format_rate(row["disk_bytes_per_s"]), start, spread, *parts, row["bottleneck"])
    console.print(table)
    copies, casts, fixed = (document["rates"][name] for name in ("copy", "cast", "fixed"))
    link = "copies to the GPU (PCIe)" if document["device"] == "cuda" else "copies in memory"
    console.print(
        f"{link} at {format_rate(copies['bytes_per_s'])} ({copies['origin']}), "
        f"casts at {format_rate(casts['bytes_per_s'])} ({casts['origin']})\n"
        f"fixed: imports{' and the start of CUDA' if document['device'] == 'cuda' else ''} before the first byte, "
        f"{format_seconds(fixed['seconds'])} ({fixed['origin']}); limit: what works longest\n"
        "disk, copy and cast: how long each works; they overlap, so they do not add up to the start\n"
        "from .. to: with the best and the worst samples of what was measured here",
        style="dim",
    )
    for note in document["notes"]:
        console.print(marked("note: {}", note), style="dim")
