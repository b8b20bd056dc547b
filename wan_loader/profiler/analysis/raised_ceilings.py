"""Ceilings that a session itself has shown to be too low. Pure.

A ceiling is one measurement of a machine that may have been busy then. What a recording reached can be had.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from wan_loader.verdict import ideal_seconds

if TYPE_CHECKING:
    from wan_loader.verdict import Evidence

__all__ = ["raise_ceilings"]

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
                "taken as what can be had"
            )
    return ceilings, tuple(notes)
