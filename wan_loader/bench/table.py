"""The rows of a bench's tables, once for the terminal and for Markdown. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from wan_loader.sizes import format_bytes, format_count, format_seconds
from wan_loader.tables import Column

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = [
    "HEADERS",
    "case_rows",
    "case_title",
    "columns",
    "footnotes",
    "machine_line",
    "ordered",
    "why_no_time",
]

HEADERS = (
    "loader",
    "median",
    "min .. max",
    "spread",
    "GB/s",
    "of ceiling",
    "CPU s",
    "from disk",
    "host peak",
    "pinned",
    "GPU peak",
    "samples",
    "checked",
)

_IMPORTANCE = (
    "loader",
    "median",
    "GB/s",
    "of ceiling",
    "CPU s",
    "from disk",
    "spread",
    "checked",
    "host peak",
    "GPU peak",
    "pinned",
    "min .. max",
    "samples",
)


def machine_line(machine: Mapping[str, Any]) -> str:
    """Describe the machine in one line."""
    parts = [
        str(machine.get("gpu") or "no GPU"),
        f"{machine.get('cores', '?')} cores of {machine.get('cpu', 'an unknown CPU')}",
        f"{format_bytes(machine.get('memory_limit_bytes') or 0)} memory",
        f"Linux {machine.get('kernel', '?')}",
        f"Python {machine.get('python', '?')}",
        f"torch {machine.get('torch', '?')}",
    ]
    return ", ".join(parts)


def case_title(case: Mapping[str, Any], document: Mapping[str, Any]) -> str:
    """Say what was loaded from where to where."""
    part = f"part of {case['name']} ({format_count(case['n_files'], 'file')})" if case["is_part"] else case["name"]
    dtype = f" as {document['dtype']}" if document["dtype"] else ""
    where = "" if case["storage"]["name"] == "here" else f", on {case['storage']['label']}"
    cache = "" if case["cache"] == "simulated" else f", {case['cache']}"
    size = format_bytes(case["nbytes"])
    what = f"{format_count(case['n_tensors'], 'tensor')}, {size} {case['file_dtype']}"
    return f"{part}: {what}{where}{cache}, to {document['device']}{dtype}"


def ordered(case: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the results, the fastest first, those without a time last."""
    return sorted(case["results"], key=lambda r: r["summary"]["median_s"] if r["summary"] else float("inf"))


def case_rows(case: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Make one row for each loader under `HEADERS`; one without a time says why in the second cell, the rest empty."""
    return [_row(result) for result in ordered(case)]


def _row(result: Mapping[str, Any]) -> tuple[str, ...]:
    summary = result["summary"]
    if summary is None:
        return (result["loader"], why_no_time(result), *[""] * (len(HEADERS) - 2))
    checked, cpu_s = result["compared_tensors"], summary["cpu_s"]
    state = "" if result["status"] == "ok" else f" ({result['status']})"
    return (
        result["loader"] + state,
        format_seconds(summary["median_s"]),
        _range(summary),
        f"{summary['spread']:.0%}" if summary["n"] > 1 else "",
        f"{result['gbps']:.3g}" if result["gbps"] else "",
        f"{result['of_ceiling']:.2f}" if result["of_ceiling"] else "",
        f"{cpu_s:.2f}" if cpu_s >= 1 else f"{cpu_s:.3g}",
        _bytes(summary["read_bytes"]),
        _bytes(summary["host_peak_bytes"]),
        _bytes(summary["pinned_bytes"]),
        _bytes(summary["device_peak_bytes"]),
        str(summary["n"]),
        f"{checked} equal" if checked is not None else "no",
    )


def _range(summary: Mapping[str, Any]) -> str:
    fastest = format_seconds(summary["min_s"])
    return f"{fastest} .. {format_seconds(summary['max_s'])}" if summary["n"] > 1 else fastest


def why_no_time(result: Mapping[str, Any]) -> str:
    """Say what became of a loader without a sample; one that was well had no turn before the bench was interrupted."""
    state = "not measured" if result["status"] == "ok" else result["status"]
    return f"{state}: {result['reason']}" if result["reason"] else str(state)


def columns(rows: Sequence[tuple[str, ...]]) -> dict[int, Column]:
    """Return the columns under `HEADERS` that say anything, by their places; those that matter least go first."""
    told = [i for i in range(len(HEADERS)) if any(row[i] not in ("", "?") for row in rows if row[2])]
    return {i: Column(HEADERS[i], right=i > 0, drop=_drop(HEADERS[i])) for i in told}


def _drop(header: str) -> int:
    place = _IMPORTANCE.index(header)
    return len(_IMPORTANCE) - place if place > 1 else 0


def _bytes(nbytes: int | None) -> str:
    return "?" if nbytes is None else format_bytes(nbytes)


def footnotes(case: Mapping[str, Any]) -> list[str]:
    """List the ceiling, conversions that were not timed, failures after good samples, and notes."""
    lines = []
    if case["ceiling_gbps"]:
        lines.append(f"ceiling: {case['ceiling']}, {case['ceiling_gbps']:.3g} GB/s, measured in this run")
    elif "page_cache_gbps" in case["ceilings"]:
        rate = case["ceilings"]["page_cache_gbps"]
        lines.append(f"the page cache gives 8 reading threads {rate:.3g} GB/s; who maps files does not copy at all")
    if case["storage"]["simulated"]:
        rate = format_bytes(case["storage"]["rate_bytes_per_s"])
        source = "the bytes come from the page cache (io=direct: off the real disk)"
        lines = [f"simulated: our reads are held to {rate}/s; {source}"]
    for result in case["results"]:
        if result["conversion_s"] is not None:
            lines.append(
                f"{result['loader']} loads a file in its own format; writing that took "
                f"{format_seconds(result['conversion_s'])}, which is not in its time"
            )
        if result["summary"] and result["status"] != "ok":
            n_samples = format_count(result["summary"]["n"], "sample")
            lines.append(f"{result['loader']} {result['status']} after {n_samples}: {result['reason']}")
    return lines + list(case["notes"])
