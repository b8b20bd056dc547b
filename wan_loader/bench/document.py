"""The result of a bench as one JSON document; rendered by `markdown`, `picture` and the command line."""

from __future__ import annotations

import os
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from wan_loader.bench.contract import installed_versions
from wan_loader.bench.statistics import MIN_SAMPLES, case_warnings, summarize_samples

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from wan_loader.bench.runner import Case, Result, Settings

__all__ = ["SCHEMA_VERSION", "to_document"]

SCHEMA_VERSION = 1

#: As a share of the ceiling: more than samples differ by.
_TOO_FAST = 1.15

_SETTINGS = ("FASTSAFETENSORS_", "FLASHPACK_", "INSTANTTENSOR_", "RUNAI_STREAMER_", "SAFETENSORS_")


def to_document(
    settings: Settings, cases: Sequence[Case], *, argv: Sequence[str], machine: Mapping[str, Any], created: str
) -> dict[str, Any]:
    """Describe all that was measured: the samples, and what was made of them. Bytes are integers, seconds floats."""
    document: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "command": "bench",
        "created": created,
        "argv": list(argv),
        "device": settings.device,
        "dtype": settings.dtype,
        "settings": {
            "repeat": settings.repeat,
            "rival_repeat": settings.rival_repeat,
            "time_limit_s": settings.time_limit_s,
            "part_bytes": settings.part,
            "caches": list(settings.caches),
        },
        "machine": dict(machine),
        "environment": _rival_settings(os.environ),
        "loaders": [_loader(entry) for entry in settings.entries],
        "cases": [_case(case, settings) for case in cases],
    }
    document["warnings"] = [*_general(settings), *(w for case in document["cases"] for w in case.pop("warnings"))]
    return document


def _rival_settings(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the environment variables by which loaders are set; nothing that may be a secret."""
    return {
        name: value
        for name, value in sorted(environ.items())
        if name.startswith(_SETTINGS) and not any(word in name for word in ("KEY", "SECRET", "TOKEN", "CREDENTIAL"))
    }


def _general(settings: Settings) -> list[str]:
    notes = []
    if settings.device == "cpu":
        notes.append("no GPU was used: this compares loading into host memory only")
    if _fewest(settings) < MIN_SAMPLES:
        notes.append(f"too few samples to tell the spread ({_fewest(settings)}): use --repeat 5")
    return notes


def _fewest(settings: Settings) -> int:
    """Return the smallest number of samples that was asked for."""
    return min(settings.repeat, settings.rival_repeat or settings.repeat)


def _loader(entry: Any) -> dict[str, Any]:
    versions = installed_versions(entry.loader)
    return {
        "label": entry.label,
        "name": entry.loader.name,
        "version": None if None in versions.values() else next(iter(versions.values())),
        "packages": versions,
        "how": entry.loader.how,
        "io": entry.io if entry.loader.name == "ours" else None,
        "threads": entry.threads,
    }


def _case(case: Case, settings: Settings) -> dict[str, Any]:
    ceiling, name = _ceiling(case)
    results = [_result(result, case, ceiling) for result in case.results]
    where = f"{case.name}, {case.place.label}, {case.cache}"
    samples = {r.entry.label: r.samples for r in case.results}
    warnings = case_warnings(where, case.cache, samples, _fewest(settings))
    if (settings.dtype is None or name == "the disk") and (faster := _faster_than_ceiling(results)):
        warnings.append(
            f"{where}: faster than {name} was measured ({', '.join(faster)}), so that was measured too low: "
            "measure again, with a larger checkpoint or on an idle machine"
        )
    if case.failure:
        warnings.append(f"{where}: nothing was measured: {case.failure}")
    return {
        "path": case.path,
        "name": case.name,
        "storage": {
            "name": case.place.name,
            "label": case.place.label,
            "simulated": case.place.rate is not None,
            "rate_bytes_per_s": case.place.rate,
            "staged": case.place.directory is not None,
            **{f"facts_{k}": v for k, v in case.storage.items() if k in ("filesystem", "source", "rotational")},
        },
        "cache": case.cache,
        "nbytes": case.nbytes,
        "n_tensors": case.n_tensors,
        "n_files": len(case.files),
        "format": case.format,
        "file_dtype": case.file_dtype,
        "is_part": case.is_part,
        "ceilings": dict(case.ceilings),
        "ceiling_gbps": ceiling,
        "ceiling": name,
        "notes": list(case.notes),
        "failure": case.failure,
        "results": results,
        "warnings": warnings,
    }


def _ceiling(case: Case) -> tuple[float | None, str]:
    """Return the slowest that all bytes must pass, and its name; None for the CPU's page cache, which may be mapped."""
    names = {"h2d_pinned_gbps": "pinned copies", "disk_gbps": "the disk", "simulated_gbps": "the simulated rate"}
    known = {name: case.ceilings[name] for name in names if name in case.ceilings}
    if not known or (case.cache == "cold" and "disk_gbps" not in known):
        return None, ""
    slowest = min(known, key=lambda name: known[name])
    return known[slowest], names[slowest]


def _faster_than_ceiling(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """List loaders that did what cannot be. Of those with a format of their own it is not known how much they read."""
    return [
        f"{r['loader']}: {r['of_ceiling']:.2f}"
        for r in results
        if r["conversion_s"] is None and (r["of_ceiling"] or 0.0) > _TOO_FAST
    ]


def _result(result: Result, case: Case, ceiling: float | None) -> dict[str, Any]:
    summary = summarize_samples(result.samples)
    gbps = case.nbytes / summary.median_s / 1e9 if summary and summary.median_s else None
    return {
        "loader": result.entry.label,
        "status": result.status,
        "reason": result.reason,
        "summary": asdict(summary) if summary else None,
        "gbps": gbps,
        "of_ceiling": gbps / ceiling if gbps and ceiling else None,
        "compared_tensors": result.compared_tensors,
        "conversion_s": result.conversion_s,
        "samples": result.samples,
    }
