"""Ceilings that a session itself has shown to be too low. Pure.

A ceiling is one measurement of a machine that may have been busy then. What a recording reached can be had.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from wan_loader.verdict import ideal_seconds

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from wan_loader.verdict import Evidence

__all__ = ["IN_THIS_RUN", "describe_ceilings", "raise_ceilings"]

#: Where a ceiling is from that a recording has exceeded.
IN_THIS_RUN = "measured in this run"

#: Less is too little to have a rate.
_LEAST_BYTES = 64 << 20
_LEAST_S = 0.01
_READ = ("disk_gbps", "copy_gbps", "page_cache_gbps")


def raise_ceilings(e: Evidence) -> tuple[dict[str, float], tuple[str, ...]]:
    """Return the ceilings, with those that were exceeded put to what was reached, and a note for each."""
    ceilings, notes = dict(e.ceilings), []
    kinds = {
        "h2d": ("h2d_pinned_gbps" if e.cuda else "copy_gbps",),
        "cast": ("cast_gpu_gbps" if e.cuda else "cast_cpu_gbps",),
        "register": ("register_gbps",),
        "read": _READ,
    }
    for name, keys in kinds.items():
        phase, ideal = e.phases.get(name), ideal_seconds(e, name)
        if phase is None or not ideal or phase.nbytes < _LEAST_BYTES or phase.busy_s < _LEAST_S:
            continue
        factor = ideal / phase.busy_s
        if factor > 1:
            # what was read is a mixture of cold, of cached and of new: all that was compared with was too low
            ceilings |= {key: e.ceilings[key] * factor for key in keys if key in e.ceilings}
            measured = phase.nbytes / ideal / 1e9
            notes.append(
                f"{name} reached {phase.gbps:.2f} GB/s, more than the {measured:.2f} GB/s that were measured before: "
                f"the ceiling is what was {IN_THIS_RUN}"
            )
    return ceilings, tuple(notes)


def describe_ceilings(
    before: Mapping[str, float],
    after: Mapping[str, float],
    samples: Mapping[str, Sequence[float]],
    measured: Sequence[str],
) -> dict[str, dict[str, Any]]:
    """Say of each ceiling where it is from, and between what its samples lie.

    Args:
        before: The ceilings as they were measured.
        after: With those that the recording exceeded.
        samples: All that was measured of each.
        measured: The names of those that were measured for this recording.
    """
    details = {}
    for name, value in after.items():
        many = samples.get(name) or (before.get(name, value),)
        origin = "measured after the run" if name in measured else "measured before"
        if value != before.get(name):
            origin, many = IN_THIS_RUN, (*many, value)
        details[name] = {"origin": origin, "least": min(many), "most": max(many), "n_samples": len(many)}
    return details
