"""The phases of a start-up: the one table of what they are called, what they mean, and what is known of each.

Whoever adds a phase adds a line here: the sums of a report, the verdict, the page and the pictures read this table.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["ALL_PHASES", "LOAD_PHASES", "PHASE_TABLE", "PhaseKind", "known_phase"]


@dataclass(frozen=True, slots=True)
class PhaseKind:
    """One kind of work that a start-up consists of."""

    name: str
    meaning: str
    """The work that goes on in it, as a report says it."""
    colour: str
    """The colour in pictures; readable on white and on dark."""
    allowance_s: float | None = None
    """Seconds that it may take without being called slow; None where it is measured against something else."""
    has_rate: bool = False
    """True if the bytes of the checkpoint pass through it, at a rate that hardware limits."""
    is_work: bool = True
    """True if a process that spends its time here does the work of a start-up."""
    in_loads: bool = True
    """False for what only programs of other people do."""


#: In the order in which a report lists them.
PHASE_TABLE = (
    PhaseKind("import", "importing packages", "#8d6fd1", is_work=False),
    PhaseKind("cuda_init", "making the CUDA context", "#b05fb0"),
    PhaseKind("header", "reading headers", "#7c8799", allowance_s=0.1),
    PhaseKind("init", "planning and allocating", "#5f83b5", allowance_s=0.3),
    PhaseKind("construct", "building the modules", "#c98a2b", allowance_s=0.2, in_loads=False),
    PhaseKind(
        "random_init",
        "filling weights with random numbers that are then overwritten",
        "#d9534f",
        allowance_s=0.05,
        in_loads=False,
    ),
    PhaseKind("register", "pinning page-cache pages", "#3d9bb3", has_rate=True),
    PhaseKind("read", "reading the files", "#3b82d6", has_rate=True),
    PhaseKind("wait", "waiting", "#9aa3af", is_work=False),
    PhaseKind("h2d", "copying to the device", "#2fa36b", has_rate=True),
    PhaseKind("cast", "converting the dtype", "#d46a9c", has_rate=True),
    PhaseKind("assign", "binding tensors to modules", "#8aa63a", allowance_s=0.1),
    PhaseKind("shard", "sharding and collectives", "#7a6a55", allowance_s=1.0),
    PhaseKind("other", "the program's own work", "#b9bfc8", is_work=False),
)

#: Names of all phases.
ALL_PHASES = tuple(kind.name for kind in PHASE_TABLE)
#: Names of the phases that a load of ours can have.
LOAD_PHASES = tuple(kind.name for kind in PHASE_TABLE if kind.in_loads)
_NAMES = frozenset(ALL_PHASES)


def known_phase(name: str) -> str:
    """Return the phase of that name; "other" for one that is not known here, such as one of a later version."""
    return name if name in _NAMES else "other"
