"""The report of a load: one frozen value, and the JSON document of it that other tools rely on.

Phases are computed from spans. They overlap, so their busy times do not add up to the wall time.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from wan_loader.sizes import format_bytes, format_count, format_seconds

if TYPE_CHECKING:
    from wan_loader.spans import PhaseSummary

__all__ = [
    "SCHEMA_VERSION",
    "Bottleneck",
    "CacheReport",
    "IoReport",
    "KeptReport",
    "LoadReport",
    "MemoryReport",
]

SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True)
class IoReport:
    """The transports of the bytes, and why so."""

    mode: str
    reason: str
    resident_before: int | None
    """Bytes of the wanted ranges that lay in the page cache before the load; None where that is unknown."""
    nbytes_mapped: int = 0
    nbytes_direct: int = 0
    nbytes_buffered: int = 0
    nbytes_viewed: int = 0
    """The bytes of `nbytes_mapped` that are views of the file. Nothing was moved; pages are read when first used."""


@dataclass(frozen=True, slots=True)
class MemoryReport:
    """Peaks in bytes. `host_peak_bytes` is the process's resident size; pages of mapped files count in it."""

    host_peak_bytes: int
    pinned_bytes: int
    """The pinned ring. Registered page-cache pages are not in it: they are the page cache's own."""
    device_peak_bytes: int
    registered_bytes: int = 0
    """Page-cache pages registered for the GPU, until shortly after the load."""


@dataclass(frozen=True, slots=True)
class CacheReport:
    """The converted cache's share in a load."""

    state: str
    """"hit": read from an entry; "building": read from the source, an entry is being written in the background;
    "source": read from the source, and why."""
    reason: str
    entry: str | None = None
    """The directory of the entry that was read."""


@dataclass(frozen=True, slots=True)
class KeptReport:
    """The keeper's share in a load."""

    state: str
    """"attached": the tensors are those that the keeper holds; "copied": they are copies of these, made on the device;
    "source": the keeper has them not, and they were loaded."""
    reason: str


@dataclass(frozen=True, slots=True)
class Bottleneck:
    """The phase that set the pace, against what it could do at best, where that was measured."""

    phase: str
    why: str
    ceiling_gbps: float | None = None
    reached: float | None = None
    advice: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class LoadReport:
    """The record of one load."""

    command: str
    target: str
    device: str
    dtype: str | None
    seconds: float
    nbytes_file: int
    """The bytes of tensor data in the files."""
    nbytes_device: int
    """The bytes of the tensors once loaded."""
    n_tensors: int
    io: IoReport
    phases: tuple[PhaseSummary, ...]
    bottleneck: Bottleneck
    memory: MemoryReport
    machine: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    cache: CacheReport | None = None
    """None where no cache was asked for."""
    kept: KeptReport | None = None
    """None where nobody asked for weights that are kept."""

    def __str__(self) -> str:
        """Say in one line what, how much, how long, by which transports; in a second one if there are warnings."""
        size = f"{format_count(self.n_tensors, 'tensor')}, {format_bytes(self.nbytes_file)}"
        rate = f" ({self.gbps:.3g} GB/s)" if self.gbps else ""
        line = f"{self.target} to {self.device}: {size} in {format_seconds(self.seconds)}{rate}, {self.io.mode}"
        return f"{line}\n{format_count(len(self.warnings), 'warning')}: {self.warnings[0]}" if self.warnings else line

    def __repr__(self) -> str:
        shown = ("command", "target", "device", "dtype", "seconds", "nbytes_file", "n_tensors")
        fields = ", ".join(f"{name}={getattr(self, name)!r}" for name in shown)
        return f"LoadReport({fields}, io={self.io.mode!r}, {format_count(len(self.warnings), 'warning')})"

    @property
    def gbps(self) -> float:
        """File bytes that were moved over wall time, in GB/s."""
        moved = self.nbytes_file - self.io.nbytes_viewed
        return moved / self.seconds / 1e9 if self.seconds > 0 else 0.0

    def to_json(self) -> dict[str, Any]:
        """Return the document of `--json`: bytes as integers, seconds as floats."""
        return {
            "schema_version": SCHEMA_VERSION,
            "command": self.command,
            "target": self.target,
            "device": self.device,
            "dtype": self.dtype,
            "seconds": self.seconds,
            "nbytes_file": self.nbytes_file,
            "nbytes_device": self.nbytes_device,
            "gbps": self.gbps,
            "n_tensors": self.n_tensors,
            "io": _fields(self.io),
            "phases": [{**_fields(p), "gbps": p.gbps} for p in self.phases],
            "bottleneck": {**_fields(self.bottleneck), "advice": list(self.bottleneck.advice)},
            "memory": _fields(self.memory),
            "machine": self.machine,
            "settings": self.settings,
            "warnings": list(self.warnings),
            "cache": None if self.cache is None else _fields(self.cache),
            **({} if self.kept is None else {"kept": _fields(self.kept)}),
        }


def _fields(value: Any) -> dict[str, Any]:
    return {name: getattr(value, name) for name in value.__dataclass_fields__}
