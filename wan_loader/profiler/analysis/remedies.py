"""What remedies leave of a program's time: each alone, and several together. Pure.

The wall time is shared out among *parts*, of which each moment belongs to one. A remedy says how many seconds it leaves
of the parts that it touches. Several that touch the same part leave what the best of them leaves: two that save the
same seconds save them once. So what they save together is never more than there was, nor than the sum of what each
saves, but for what one adds (the imports of our loader) and another leaves out again.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

from wan_loader.profiler.analysis.commands import fits

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from wan_loader.profiler.analysis.session import Advice
    from wan_loader.verdict import Evidence

__all__ = ["Part", "Parts", "Remedy", "parts_of", "remaining_s", "saved_s", "worth_following"]

#: More is not read.
_MOST = 5


class Part(NamedTuple):
    """A share of the wall time: a phase, and what kind of work it was."""

    phase: str
    label: str = ""


#: Seconds by part, which add up to the whole.
Parts = dict[Part, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Remedy:
    """Something to change, and what it leaves of the time."""

    advice: Advice
    leaves: Mapping[Part, float] = field(default_factory=dict)
    """Seconds that remain of the parts that it touches."""
    adds: Mapping[Part, float] = field(default_factory=dict)
    """Seconds that it adds, where another remedy may leave them out again."""


def parts_of(e: Evidence) -> Parts:
    """Share out the wall time: each phase's seconds among the kinds of its work, as these were busy."""
    parts: Parts = {}
    for phase, seconds in e.blame.items():
        rows = e.labels(phase)
        busy_s = sum(row[1] for row in rows)
        if phase == "other" or not busy_s:
            # what has a name among the program's own work is not all of it
            named_s = min(busy_s, seconds)
            parts[Part(phase)] = seconds - named_s
        else:
            named_s = seconds
        for label, label_s, _ in rows:
            parts[Part(phase, label)] = named_s * label_s / busy_s if busy_s else 0.0
    return {part: seconds for part, seconds in parts.items() if seconds > 0}


def remaining_s(parts: Parts, remedies: Iterable[Remedy]) -> float:
    """Return the seconds that remain when all these remedies are followed."""
    remedies = tuple(remedies)
    total = 0.0
    for part in parts.keys() | {part for r in remedies for part in r.adds}:
        # what several bring is brought once
        seconds = max([parts.get(part, 0.0), *(r.adds.get(part, 0.0) for r in remedies)])
        total += min([seconds, *(r.leaves[part] for r in remedies if part in r.leaves)])
    return total


def saved_s(parts: Parts, remedies: Iterable[Remedy]) -> float:
    """Return the seconds that remedies save together."""
    return sum(parts.values()) - remaining_s(parts, remedies)


def worth_following(parts: Parts, remedies: Sequence[Remedy], least_s: float, most: int = _MOST) -> tuple[Advice, ...]:
    """Choose remedies that fit: the one that saves most, then whichever saves most beside those before, and so on.

    Args:
        parts: Where the time went.
        remedies: All that apply.
        least_s: One that saves less beside those before is left out.
        most: So many at most.

    Returns:
        Their advice, in this order, with what each saves alone and beside those before.
    """
    chosen: list[Remedy] = []
    left = list(remedies)
    advice: list[Advice] = []
    while len(chosen) < most:
        before_s = remaining_s(parts, chosen)
        gains = [(before_s - remaining_s(parts, [*chosen, r]), r) for r in left]
        beside_s, best = max(gains, key=lambda gain: gain[0], default=(0.0, None))
        if best is None or beside_s < least_s:
            break
        chosen.append(best)
        left = [r for r in left if r is not best and fits(r.advice.command, best.advice.command)]
        # alone it may cost more than it saves, where others bring what it needs, too
        advice.append(replace(best.advice, gain_s=max(0.0, saved_s(parts, [best])), beside_s=beside_s))
    return tuple(advice)
