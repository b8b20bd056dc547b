"""Reports as text for a terminal. Results go to stdout, progress and warnings to stderr."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.text import Text

from wan_loader.console import PlainConsole, marked
from wan_loader.printable import printable
from wan_loader.sizes import format_bytes, format_count, format_seconds
from wan_loader.tables import Column, Columns

if TYPE_CHECKING:
    from collections.abc import Sequence

    from wan_loader.loading.report import CacheReport, LoadReport
    from wan_loader.profiler.analysis.ranks import RankComparison

__all__ = [
    "error_console",
    "output_console",
    "print_load",
    "print_note",
    "print_ranks",
    "print_warnings",
]


def output_console() -> PlainConsole:
    """Return the console for results."""
    return PlainConsole()


def error_console() -> PlainConsole:
    """Return the console for progress and warnings."""
    return PlainConsole(stderr=True)


def print_load(report: LoadReport) -> None:
    """Print the summary and the phase table."""
    console = output_console()
    console.print(marked("[bold]{}[/]", report.target))
    console.print(_sizes_and_time(report))
    console.print(printable(f"transport: {report.io.mode} ({report.io.reason})"))
    if report.cache is not None:
        console.print(printable(f"cache: {_cache_line(report.cache)}"))
    console.print()
    console.print(_phase_table(report))
    console.print("phases overlap, so they do not add up to the whole", style="dim")
    memory = report.memory
    parts = [f"host peak {format_bytes(memory.host_peak_bytes)}", f"pinned {format_bytes(memory.pinned_bytes)}"]
    if memory.registered_bytes:
        parts.append(f"page cache registered {format_bytes(memory.registered_bytes)}")
    if memory.device_peak_bytes:
        parts.append(f"device peak {format_bytes(memory.device_peak_bytes)}")
    console.print(f"memory: {', '.join(parts)}")
    console.print(printable(f"verdict: {report.bottleneck.why}"))


def _sizes_and_time(report: LoadReport) -> Text:
    sizes = f"{format_count(report.n_tensors, 'tensor')}, {format_bytes(report.nbytes_file)}"
    target = f"{format_bytes(report.nbytes_device)} on {report.device}" + (
        f" as {report.dtype}" if report.dtype else ""
    )
    line = marked("{} -> {} in [bold]{}[/]", sizes, target, format_seconds(report.seconds))
    rate = marked(" = [bold]{} GB/s[/]", f"{report.gbps:.3g}") if report.gbps else Text(", nothing was copied")
    return line + rate


def _cache_line(cache: CacheReport) -> str:
    if cache.state == "hit":
        return f"read from the entry {cache.entry} ({cache.reason})"
    return f"read from the source ({cache.reason})"


def _phase_table(report: LoadReport) -> Columns:
    table = Columns("phase", *(Column(title, right=True) for title in ("busy", "bytes", "GB/s", "share of wall")))
    for phase in report.phases:
        share = phase.busy_s / report.seconds if report.seconds else 0.0
        table.add_row(
            phase.name,
            format_seconds(phase.busy_s),
            format_bytes(phase.nbytes) if phase.nbytes else "",
            f"{phase.gbps:.1f}" if phase.nbytes else "",
            f"{share:.0%}",
        )
    return table


def print_ranks(console: PlainConsole, found: RankComparison) -> None:
    """Print the processes of a distributed load, one a line."""
    table = Columns(
        *(Column(title, right=True) for title in ("process", "seconds", "read", "received")),
        *(Column(title, right=True, drop=4 - i) for i, title in enumerate(("read s", "collect s"))),
        *(Column(title, right=True, drop=2 - i) for i, title in enumerate(("host peak", "device peak"))),
    )
    for m in found.ranks:
        sizes = (m.nbytes_read, m.nbytes_received, m.host_peak_bytes, m.device_peak_bytes)
        read, received, host, device = map(format_bytes, sizes)
        times = (f"{m.seconds:.3f}", f"{m.read_s:.3f}", f"{m.shard_s:.3f}")
        table.add_row(str(m.rank), times[0], read, received, times[1], times[2], host, device)
    console.print(f"{printable(found.target)}: {len(found.ranks)} of {found.n_processes} processes")
    console.print(table)
    console.print(f"{format_bytes(found.nbytes_read)} read in all; {found.sentence}")


def print_warnings(warnings: Sequence[str]) -> None:
    """Print warnings on stderr, one a line; on a terminal folded between words."""
    for warning in warnings:
        print_note(f"warning: {warning}", style="yellow")


def print_note(text: str, style: str = "") -> None:
    """Print a line on stderr; on a terminal folded between words."""
    console = error_console()
    console.print(printable(text), style=style, no_wrap=not console.is_terminal)
