"""What `wan-pipeline load` prints: each network, and what the time of the start went into."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from wan_loader.cli import Column, Columns, marked, output_console
from wan_loader.sizes import format_bytes, format_seconds
from wan_pipeline.families import TITLES

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__all__ = ["print_load_report", "time_shares"]

#: Packages that are named.
_MOST_NAMED = 3


def print_load_report(report: Mapping[str, Any]) -> None:
    """Print a report of a start that has generated nothing."""
    console = output_console()
    numbers = (Column(title, right=True) for title in ("in the files", "loaded", "at", "took", "GB/s"))
    table = Columns("network", *numbers, Column("how", drop=1))
    for load in report["pipeline"]["loads"]:
        table.add_row(*_row(load))
    console.print(table)
    seconds, shares = report["seconds"], time_shares(report)
    told = ", ".join(f"{what} {format_seconds(share)}" for what, share in shares.items())
    console.print(marked("\n[bold]{}[/] since the start: {}", format_seconds(seconds), told))
    packages = {name: spent for name, spent in report["pipeline"]["imports"].items() if name != "others"}
    longest = sorted(packages, key=lambda name: packages[name], reverse=True)[:_MOST_NAMED]
    most = max(shares, key=lambda what: shares[what])
    why = f"{most} took most of it ({shares[most] / seconds:.0%})" if seconds else ""
    if most == "imports" and longest:
        why += f": {', '.join(f'{name} {format_seconds(packages[name])}' for name in longest)}"
    elif most == "loads" and report["bottleneck"] is not None:
        why += f"; of the longest load: {report['bottleneck']['why']}"
    console.print(marked("verdict: {}", why))


def _row(load: Mapping[str, Any]) -> tuple[str, ...]:
    kept = load.get("kept", {}).get("state") == "attached"
    return (
        TITLES.get(load["name"], load["name"]),
        format_bytes(load["nbytes"]),
        format_bytes(load["nbytes_device"]),
        f"{load['start_s']:.2f} s",
        format_seconds(load["seconds"]),
        f"{load['gbps']:.2f}" if load["gbps"] else "",
        "kept, attached" if kept else load["io"],
    )


def time_shares(report: Mapping[str, Any]) -> dict[str, float]:
    """Divide the seconds of a start into imports, loads, and what was neither. Pure.

    Loads that ran while packages were imported count as loads.
    """
    imports: float = sum(phase["busy_s"] for phase in report["phases"] if phase["name"] == "import")
    loads = _union((load["start_s"], load["start_s"] + load["seconds"]) for load in report["pipeline"]["loads"])
    loads = min(loads, report["seconds"])
    imports = min(imports, report["seconds"] - loads)
    return {"imports": imports, "loads": loads, "all else": report["seconds"] - loads - imports}


def _union(intervals: Iterable[tuple[float, float]]) -> float:
    whole = reached = 0.0
    for start, end in sorted(intervals):
        whole += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return whole
