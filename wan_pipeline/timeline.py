"""The times at which things happened since the process began, and the one document that says so.

The document has the fields of a `wan-loader load` report for all loads together, and `pipeline` for the rest: stages,
time to the first denoising step, imports by package, how long each network was waited for, and memory.
"""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wan_loader import clock_ns, summarize
from wan_loader.dtypes import dtype_name
from wan_loader.system import machine_card, peak_resident, start_origin, started_process
from wan_pipeline.lean.import_times import import_seconds

if TYPE_CHECKING:
    from collections.abc import Iterator

    from wan_loader import LoadReport, StreamReport
    from wan_pipeline.startup import Started

__all__ = ["Timeline", "process_start_ns"]

_SCHEMA_VERSION = 1
_START_TICKS = 19  # field 22 of /proc/self/stat, counted after the command's name


def process_start_ns() -> int:
    """Return the time when the user has started this process, on the clock of spans; to a hundredth of a second."""
    try:
        text = Path(f"/proc/{started_process()}/stat").read_text()
        # behind the last bracket: the name of a command may hold spaces and brackets
        seconds = int(text.rpartition(")")[2].split()[_START_TICKS]) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return clock_ns()
    # the kernel counts from boot, and goes on while the machine sleeps
    age_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME) - int(seconds * 1e9)
    return clock_ns() - age_ns


@dataclass(slots=True)
class Timeline:
    """Stages of the pipeline as they ran."""

    start_ns: int = field(default_factory=process_start_ns)
    stages: list[tuple[str, int, int]] = field(default_factory=list)
    step_ns: list[int] = field(default_factory=list)
    """The times at which the denoising steps were submitted."""

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Record the body as a stage, also when it raises."""
        start_ns = clock_ns()
        try:
            yield
        finally:
            self.stages.append((name, start_ns, clock_ns()))

    def first_step_s(self, started: Started) -> float | None:
        """Return the seconds from the process's start until the first denoising step could run; None before that."""
        first = started.checkpoint.experts[0].name
        ready = [end for name, _, end in started.residency.log.waits if name == first]
        return (ready[0] - self.start_ns) / 1e9 if ready else None

    def document(self, started: Started) -> dict[str, Any]:
        """Make the report as JSON."""
        log = started.residency.log
        reports = [report for *_, report in log.loads]
        return {
            **_totals(reports),
            "target": str(started.directory),
            "device": str(started.device),
            "dtype": dtype_name(started.preset.dtype),
            "seconds": (clock_ns() - self.start_ns) / 1e9,
            "phases": [
                {"name": p.name, "busy_s": p.busy_s, "nbytes": p.nbytes, "gbps": p.gbps}
                for p in summarize(started.recorder.spans)
            ],
            "memory": _memory(started, reports),
            "machine": reports[0].machine if reports else machine_card(),
            "settings": {"preset": started.preset.name, "preset_reason": started.plan.reason, **_limits(started)},
            "cache": None if started.cache is None else asdict(started.cache.report),
            "pipeline": {
                "time_to_first_step_s": self.first_step_s(started),
                "started": start_origin(),
                "imports": import_seconds(started.imports),
                "stages": [self._interval(*stage) for stage in self.stages],
                "waits": [self._interval(*wait) for wait in log.waits],
                "loads": [
                    {
                        **self._interval(name, start, end),
                        "nbytes": r.nbytes_file,
                        "nbytes_read": r.settings.get("nbytes_read", r.nbytes_file),
                        "nbytes_device": r.nbytes_device,
                        "io": r.io.mode,
                        "gbps": r.gbps,
                        **({} if r.kept is None else {"kept": asdict(r.kept)}),
                    }
                    for name, start, end, r in log.loads
                ],
                **_streams(started),
                "steps_s": [(ns - self.start_ns) / 1e9 for ns in self.step_ns],
            },
        }

    def _interval(self, name: str, start_ns: int, end_ns: int) -> dict[str, Any]:
        return {
            "name": name,
            "start_s": (start_ns - self.start_ns) / 1e9,
            "seconds": (end_ns - start_ns) / 1e9,
        }


def _limits(started: Started) -> dict[str, Any]:
    """Return the limits that were asked for, and what works by tiles; where there is nothing of that, nothing."""
    options, tiled = started.options, sorted(started.plan.tiled)
    found = {"device_memory": options.device_memory, "host_memory": options.host_memory, "tiled": tiled or None}
    return {name: value for name, value in found.items() if value is not None}


def _streams(started: Started) -> dict[str, Any]:
    """Describe the networks that are streamed, where some are."""
    found = started.residency.streams()
    return {"streams": [_stream(name, report) for name, report in found.items()]} if found else {}


def _stream(name: str, report: StreamReport) -> dict[str, Any]:
    """Describe a network that is streamed; amounts are those of one forward."""
    return {
        "name": name,
        "n_blocks": len(report.blocks),
        "n_streamed": len(report.streamed),
        "n_buffers": report.n_buffers,
        "device_nbytes": report.device_nbytes,
        "pinned_nbytes": report.pinned_nbytes,
        "nbytes_mapped": report.nbytes_mapped,
        "nbytes_direct": report.nbytes_direct,
        "nbytes_buffered": report.nbytes_buffered,
        "n_fetched": report.n_fetched,
        "n_late": report.n_late,
        "reason": report.reason,
        "warnings": list(report.warnings),
    }


def _totals(reports: list[LoadReport]) -> dict[str, Any]:
    busy = sum(r.seconds for r in reports)
    nbytes = sum(r.nbytes_file for r in reports)
    resident = [r.io.resident_before for r in reports]
    modes = {mode for r in reports for mode in r.io.mode.split("+")}
    return {
        "schema_version": _SCHEMA_VERSION,
        "command": "generate",
        "nbytes_file": nbytes,
        "nbytes_device": sum(r.nbytes_device for r in reports),
        "n_tensors": sum(r.n_tensors for r in reports),
        "gbps": nbytes / busy / 1e9 if busy else 0.0,
        "io": {
            "mode": "+".join(sorted(modes - {"none"})) or "none",
            "reason": "; ".join(dict.fromkeys(r.io.reason for r in reports)),
            "resident_before": None if None in resident else sum(filter(None, resident)),
            "nbytes_mapped": sum(r.io.nbytes_mapped for r in reports),
            "nbytes_direct": sum(r.io.nbytes_direct for r in reports),
            "nbytes_buffered": sum(r.io.nbytes_buffered for r in reports),
        },
        "bottleneck": _bottleneck(reports),
        "warnings": list(dict.fromkeys(w for r in reports for w in r.warnings)),
    }


def _bottleneck(reports: list[LoadReport]) -> dict[str, Any] | None:
    """Return the verdict on the load that took longest."""
    if not reports:
        return None
    found: dict[str, Any] = max(reports, key=lambda r: r.seconds).to_json()["bottleneck"]
    return found


def _memory(started: Started, reports: list[LoadReport]) -> dict[str, int]:
    started.residency.note_peak()
    return {
        "host_peak_bytes": max([peak_resident(), *(r.memory.host_peak_bytes for r in reports)]),
        "pinned_bytes": max((r.memory.pinned_bytes for r in reports), default=0),
        "device_peak_bytes": started.residency.log.device_peak_nbytes,
        "device_reserved_peak_bytes": started.residency.log.device_reserved_nbytes,
    }
