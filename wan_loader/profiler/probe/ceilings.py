"""The ceilings of this machine: measured once, kept in `~/.cache/wan-loader`, measured again on request.

Each is the best of some samples, which are kept too: what they differ by is how far anything that is computed from
them may be off.

Rates of the machine are kept per machine (processor, kernel, GPU, torch), those of disks per device number. The cache
is written whole or not at all; a damaged one is measured anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wan_loader.documents import is_measured
from wan_loader.errors import CheckpointError
from wan_loader.formats.strict_json import parse_object
from wan_loader.profiler.probe import measure
from wan_loader.profiler.probe.busy import busy_note, others_note, processor_times
from wan_loader.system.files import write_text
from wan_loader.system.machine import machine_card

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

__all__ = ["Ceilings", "cache_file", "find_ceilings", "known_ceilings"]

_KEYS = (
    "disk_gbps",
    "page_cache_gbps",
    "copy_gbps",
    "cast_cpu_gbps",
    "cast_gpu_gbps",
    "h2d_pinned_gbps",
    "h2d_pageable_gbps",
    "register_gbps",
    "fill_gbps",
    "convert_gbps",
    "start_s",
    "import_torch_s",
    "cuda_init_s",
)
#: Of a cached entry: when its oldest value was measured.
_SINCE = "since"
#: GB/s or seconds: nothing that was measured is less.
_LEAST = 1e-9
#: Of a cached entry: all samples by name.
_SAMPLES_KEY = "samples"
_SAMPLES = 3
#: As many are kept when they are measured again.
_KEPT = 9
#: No further sample is taken of what has taken longer.
_LONG_S = 2.5


@dataclass(frozen=True, slots=True)
class Ceilings:
    """Names to GB/s (`..._gbps`) or seconds (`..._s`), and why some are absent."""

    values: Mapping[str, float]
    notes: tuple[str, ...] = ()
    measured: tuple[str, ...] = field(default=())
    """The names of those that were measured now rather than taken from the cache."""
    samples: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """All samples of each; `values` has the best."""
    since: float | None = None
    """The moment when the oldest of them was measured, in seconds since the epoch; None if the cache does not say."""

    def get(self, name: str) -> float | None:
        """Return a ceiling, or None where it is not known."""
        return self.values.get(name)


def cache_file() -> Path:
    """Return the place where measured ceilings are kept: $XDG_CACHE_HOME/wan-loader, else ~/.cache/wan-loader."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "wan-loader" / "ceilings.json"


def find_ceilings(
    paths: Sequence[str], *, device: str = "cpu", refresh: bool = False, quick: bool = False, file: Path | None = None
) -> Ceilings:
    """Find the ceilings of loads of these files, in the cache or by measuring, which costs up to ten seconds.

    Args:
        paths: The files.
        device: The device to load to.
        refresh: Measure again what is cached.
        quick: Leave out the start of a fresh interpreter (seconds).
        file: The cache; None is the user's.
    """
    file = file or cache_file()
    store = _read(file)
    machine, disk = _machine_key(device), _disk_key(paths)
    entries = [] if refresh else [store[key] for key in (machine, disk) if key in store]
    known = _values(*entries)
    found, notes = dict(known), list[str]()
    samples = {key: tuple(many) for part in (machine, disk) for key, many in _samples(store.get(part, {})).items()}
    busy, before = busy_note(), processor_times()  # before: measuring is work, too
    for names, measurement in _measurements(paths, device, quick=quick):
        if all(name in known for name in names):
            continue
        try:
            for name, taken in _sampled(measurement).items():
                samples[name] = (*samples.get(name, ()), *taken)[-_KEPT:]
                found[name] = _best(name, samples[name])
        except measure.UnmeasuredError as reason:
            notes.append(str(reason))
        except (OSError, RuntimeError, MemoryError) as error:
            notes.append(f"{', '.join(names)} not measured: {error}")
    new = tuple(k for k in found if found[k] != known.get(k))
    if new:
        during = others_note(before, processor_times(), "while it was measured", os.cpu_count() or 1)
        notes += filter(None, [busy or during])
        now = {_SINCE: time.time()}
        # kept under the disk, not under the machine: both may change without the other
        on_disk: dict[str, Any] = {k: v for k, v in found.items() if k == "disk_gbps"}
        rest: dict[str, Any] = {k: v for k, v in found.items() if k != "disk_gbps"}
        rest[_SAMPLES_KEY] = {k: list(v) for k, v in samples.items() if k != "disk_gbps"}
        on_disk |= {_SAMPLES_KEY: {k: list(v) for k, v in samples.items() if k == "disk_gbps"}} if on_disk else {}
        # the date of the oldest value stays, unless all are new
        kept = {k: v for k, v in store.get(machine, {}).items() if k != _SINCE or not refresh}
        store = {**store, machine: {**now, **kept, **rest}}
        if on_disk and disk:
            store[disk] = {**now, **on_disk} if "disk_gbps" in new else store[disk]
        _write(file, store)
    dates = [entry[_SINCE] for entry in entries if _SINCE in entry]
    since = min(dates) if dates and len(dates) == len(entries) else None
    return Ceilings(found, tuple(notes), new, samples, since)


def known_ceilings(paths: Sequence[str], *, device: str = "cpu", file: Path | None = None) -> Ceilings:
    """Return what was measured before on this machine, one sample of what earlier versions measured; measure nothing.

    Args:
        paths: The files.
        device: "cpu", or "cuda" for any GPU that was measured.
        file: The cache; None is the user's.
    """
    store = _read(file or cache_file())
    here = [entry for key, entry in store.items() if key.startswith(f"machine {device}")]
    entries = (*here, store.get(_disk_key(paths), {}))
    values = _values(*entries)
    samples: dict[str, tuple[float, ...]] = {name: (value,) for name, value in values.items()}
    samples |= {name: tuple(many) for entry in entries for name, many in _samples(entry).items() if many}
    return Ceilings(values, samples=samples)


def _sampled(measurement: Callable[[], dict[str, float]]) -> dict[str, list[float]]:
    """Measure several times, unless that takes long."""
    taken: dict[str, list[float]] = {}
    start_s = time.monotonic()
    for _ in range(_SAMPLES):
        for name, value in measurement().items():
            taken.setdefault(name, []).append(value)
        if time.monotonic() - start_s > _LONG_S:
            break
    return taken


def _best(name: str, samples: Sequence[float]) -> float:
    return max(samples) if name.endswith("_gbps") else min(samples)


def _values(*entries: Mapping[str, Any]) -> dict[str, float]:
    """Join cached entries, the last one wins; their dates and samples are left out."""
    return {k: v for entry in entries for k, v in entry.items() if k not in (_SINCE, _SAMPLES_KEY)}


def _samples(entry: Mapping[str, Any]) -> dict[str, list[float]]:
    samples: dict[str, list[float]] = entry.get(_SAMPLES_KEY, {})
    return samples


def _measurements(
    paths: Sequence[str], device: str, *, quick: bool
) -> list[tuple[tuple[str, ...], Callable[[], dict[str, float]]]]:
    steps: list[tuple[tuple[str, ...], Callable[[], dict[str, float]]]] = []
    if paths:
        steps.append((("disk_gbps",), lambda: {"disk_gbps": measure.measure_disk(paths)}))
    steps += [
        (("page_cache_gbps",), lambda: {"page_cache_gbps": measure.measure_page_cache(paths)}),
        (("copy_gbps",), lambda: {"copy_gbps": measure.measure_copy()}),
        (("cast_cpu_gbps",), lambda: {"cast_cpu_gbps": measure.measure_cast()}),
        (("fill_gbps", "convert_gbps"), measure.measure_fill),
    ]
    if device.startswith("cuda"):
        index = int(device.partition(":")[2] or 0)
        steps.append((("h2d_pinned_gbps", "cast_gpu_gbps"), lambda: measure.measure_device(index)))
    if not quick:
        names = ("import_torch_s", "start_s", *(("cuda_init_s",) if device.startswith("cuda") else ()))
        steps.append((names, measure.measure_start))
    return steps


def _machine_key(device: str) -> str:
    facts: dict[str, Any] = dict(machine_card())
    facts["device"] = device
    with suppress(PackageNotFoundError):
        facts["torch"] = version("torch")
    if device.startswith("cuda"):
        import torch

        facts["gpu"] = torch.cuda.get_device_name(device)
    return f"machine {device} " + hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _disk_key(paths: Sequence[str]) -> str:
    for path in paths:
        with suppress(OSError):
            return f"disk {os.stat(path).st_dev}"
    return ""


def _read(file: Path) -> dict[str, dict[str, Any]]:
    """Read what is cached and has the right form."""
    try:
        document = parse_object(file.read_bytes(), path=str(file), what="the document")
    except (OSError, CheckpointError):
        return {}
    return {str(key): _read_entry(entry) for key, entry in document.items() if isinstance(entry, dict)}


def _read_entry(entry: dict[str, Any]) -> dict[str, Any]:
    known: dict[str, Any] = {k: float(v) for k, v in entry.items() if k in (*_KEYS, _SINCE) and _is_value(v)}
    samples = entry.get(_SAMPLES_KEY)
    if isinstance(samples, dict):
        known[_SAMPLES_KEY] = {
            k: [float(v) for v in many if _is_value(v)]
            for k, many in samples.items()
            if k in _KEYS and isinstance(many, list)
        }
    return known


def _is_value(value: Any) -> bool:
    return is_measured(value) and value >= _LEAST


def _write(file: Path, store: dict[str, dict[str, Any]]) -> None:
    with suppress(OSError):  # a home that cannot be written: measured again next time
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps(store, indent=1))
