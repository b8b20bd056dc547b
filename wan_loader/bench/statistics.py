"""Numbers and warnings from samples. Pure."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from wan_loader.system.page_cache import Knowledge

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

__all__ = ["MIN_SAMPLES", "Summary", "case_warnings", "summarize_samples"]

_SPREAD = 0.15
#: With fewer, nothing is known of the spread.
MIN_SAMPLES = 3
_OTHERS = 0.2
_COLD = 0.01
_WARM = 0.99


@dataclass(frozen=True, slots=True)
class Summary:
    """A summary of the samples that went well. Seconds, bytes; None where nothing is known."""

    n: int
    median_s: float
    min_s: float
    max_s: float
    spread: float
    """The range of the times as a share of their median: (max - min) / median."""
    cpu_s: float
    read_bytes: int | None
    host_peak_bytes: int | None
    pinned_bytes: int | None
    device_peak_bytes: int | None


def summarize_samples(samples: Sequence[Mapping[str, Any]]) -> Summary | None:
    """Summarize the samples that went well; None where there are none."""
    good = [s for s in samples if s["status"] == "ok"]
    if not good:
        return None
    seconds = [s["seconds"] for s in good]
    read = [s["read_bytes"] for s in good if s["read_bytes"] is not None]
    median = statistics.median(seconds)
    return Summary(
        n=len(good),
        median_s=median,
        min_s=min(seconds),
        max_s=max(seconds),
        spread=(max(seconds) - min(seconds)) / median if median else 0.0,
        cpu_s=statistics.median(s["cpu_seconds"] for s in good),
        read_bytes=int(statistics.median(read)) if read else None,
        host_peak_bytes=_peak(good, "host_peak_bytes"),
        pinned_bytes=_peak(good, "pinned_bytes"),
        device_peak_bytes=_peak(good, "device_peak_bytes"),
    )


def _peak(samples: Sequence[Mapping[str, Any]], key: str) -> int | None:
    known = [s[key] for s in samples if s[key] is not None]
    return max(known) if known else None


def case_warnings(
    where: str, cache: str, results: Mapping[str, Sequence[Mapping[str, Any]]], repeat: int = MIN_SAMPLES
) -> list[str]:
    """Say what makes a case's samples doubtful: one line for each kind of doubt, with the loaders and the remedy.

    Args:
        where: The case, as a line begins with it.
        cache: The state of the page cache that was asked for.
        results: Samples by the loader's label.
        repeat: How many samples were asked for; that these are too few is for the caller to say, once.
    """
    doubts: dict[str, list[str]] = {}
    for label, samples in results.items():
        for kind, detail in _doubts(cache, [s for s in samples if s["status"] == "ok"], repeat):
            doubts.setdefault(kind, []).append(f"{label}: {detail}" if detail else label)
    return [f"{where}: {_REMEDIES[kind].format(', '.join(found))}" for kind, found in doubts.items()]


_REMEDIES = {
    "few": "too few samples to tell the spread ({}): use --repeat 5",
    "spread": f"samples differ by more than {_SPREAD:.0%} of the median ({{}}): raise --repeat, on an idle machine",
    "first": "the first sample is far slower than the rest ({}): something was only warm afterwards; raise --repeat, "
    "so that the median leaves it out",
    "others": "other processes used the processors meanwhile (up to {}): end them, and measure again",
    "unknown": "what was in the page cache is {}: not proved to be in the state asked for",
    "estimated": "what was in the page cache is {}",
    "cold": "not cold, the page cache held some of it before a sample ({}): end what holds it open or mapped",
    "warm": "not warm, the page cache lacked some of it before a sample ({}): free memory, or use --part",
}


def _doubts(cache: str, good: Sequence[Mapping[str, Any]], repeat: int) -> Iterator[tuple[str, str]]:
    summary = summarize_samples(good)
    if summary is None:
        return
    if summary.n < MIN_SAMPLES:
        if summary.n < repeat:
            yield "few", str(summary.n)
    elif summary.spread > _SPREAD:
        # a slow first sample is a finding of its own: caches of the disk or of a driver were cold
        rest = [s["seconds"] for s in good[1:]]
        steady = good[0]["seconds"] == summary.max_s and max(rest) - min(rest) < _SPREAD * summary.median_s
        yield "first" if steady else "spread", f"{summary.spread:.0%}"
    others = [s["others_share"] for s in good if s["others_share"] is not None]
    if others and max(others) > _OTHERS:
        yield "others", f"{max(others):.0%}"
    if cache in ("cold", "warm", "simulated"):
        shares = [s["resident_before"] / max(1, s["nbytes_watched"]) for s in good if s["resident_before"] is not None]
        if not shares:
            yield "unknown", Knowledge.UNKNOWN.value
        elif cache == "cold" and max(shares) > _COLD:
            yield "cold", f"{max(shares):.0%} cached"
        elif cache != "cold" and min(shares) < _WARM:
            yield "warm", f"{min(shares):.0%} cached"
        if any(s.get("residency") == Knowledge.ESTIMATED.name.lower() for s in good):
            yield "estimated", Knowledge.ESTIMATED.value
