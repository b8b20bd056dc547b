"""What the fast path did in a process: what it fetched, what the program was spared, what was left and why.

Several threads may tell at once. A tally can be written as plain values and added to another, so that a command can sum
up the processes that it started.
"""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from wan_loader.sizes import format_bytes, format_count, format_rate, format_seconds

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["Served", "Tally"]


@dataclass(slots=True)
class Served:
    """What was fetched under one name: so many plans, bytes of files, and seconds of the program's time."""

    n_plans: int = 0
    nbytes: int = 0
    seconds: float = 0.0

    def add(self, n_plans: int, nbytes: int, seconds: float) -> None:
        """Add to the sums."""
        self.n_plans += n_plans
        self.nbytes += nbytes
        self.seconds += seconds


@dataclass(slots=True)
class Tally:
    """The counts of one process, or the sum of several."""

    components: dict[str, Served] = field(default_factory=dict)
    """What was fetched, by the class of a module or the function that asked."""
    spared: Counter[str] = field(default_factory=Counter)
    """How many operations of a kind were not done, in words that read after a number: `casts on the CPU`."""
    spared_nbytes: Counter[str] = field(default_factory=Counter)
    """The bytes that those would have written."""
    left: Counter[str] = field(default_factory=Counter)
    """Reasons why the original did something, with the bytes that it moved; 0 where that is not known."""
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def served(self, component: str, nbytes: int, seconds: float) -> None:
        """Count a plan that has fetched bytes of files for somebody."""
        with self._lock:
            self.components.setdefault(component, Served()).add(1, nbytes, seconds)

    def saved(self, what: str, count: int = 1, nbytes: int = 0) -> None:
        """Count operations that were not done, as `spared` names them."""
        with self._lock:
            self.spared[what] += count
            self.spared_nbytes[what] += nbytes

    def leave(self, reason: str, nbytes: int = 0) -> None:
        """Count what was left to the original."""
        with self._lock:
            self.left[reason] += nbytes

    def leave_after(self, error: BaseException, nbytes: int = 0, *, doing: str = "") -> None:
        """Count what was left to the original as something failed, by the first line of the error.

        Args:
            error: What failed.
            nbytes: As for `leave`.
            doing: What was tried, if there is more to say than what failed.
        """
        line = f"{type(error).__name__}: {error}".splitlines()[0]
        self.leave(f"{doing}{line}", nbytes)

    @property
    def total(self) -> Served:
        """All that was fetched."""
        total = Served()
        with self._lock:
            for served in self.components.values():
                total.add(served.n_plans, served.nbytes, served.seconds)
        return total

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON; `add` takes them."""
        with self._lock:
            return {
                "components": {name: [s.n_plans, s.nbytes, s.seconds] for name, s in self.components.items()},
                "spared": dict(self.spared),
                "spared_nbytes": dict(self.spared_nbytes),
                "left": dict(self.left),
            }

    def add(self, other: Mapping[str, Any]) -> None:
        """Add the counts of another process, as `as_dict` has written them."""
        with self._lock:
            for name, sums in other["components"].items():
                self.components.setdefault(name, Served()).add(*sums)
            self.spared.update(other["spared"])
            self.spared_nbytes.update(other["spared_nbytes"])
            self.left.update(other["left"])

    def summary(self) -> str:
        """Sum up in one line for the user."""
        total = self.total
        words = [f"{format_count(total.n_plans, 'load')} took the fast path"]
        if total.n_plans:
            rate = f" ({format_rate(total.nbytes / total.seconds)})" if total.seconds else ""
            words[0] += f": {format_bytes(total.nbytes)} in {format_seconds(total.seconds)}{rate}"
        if spared := [f"{count} {what}" for what, count in self.spared.most_common() if count]:
            words.append(f"spared {', '.join(spared)}")
        if reasons := [self._reason(reason) for reason, _ in self.left.most_common()]:
            words.append(f"left to the original: {', '.join(reasons)}")
        return "; ".join(words)

    def _reason(self, reason: str) -> str:
        nbytes = self.left[reason]
        return f"{format_bytes(nbytes)} {reason}" if nbytes else reason

    def report(self) -> str:
        """Return the counts as a table of plain text, a line for each component, saving and reason."""
        lines = []
        if self.components:
            lines.append(f"{'fetched by plan':40} {'loads':>6} {'bytes':>10} {'seconds':>9}")
        for name, served in sorted(self.components.items(), key=lambda item: -item[1].nbytes):
            lines.append(
                f"  {name:38} {served.n_plans:6} {format_bytes(served.nbytes):>10} {format_seconds(served.seconds):>9}"
            )
        if self.spared:
            lines.append("not done")
            for what, count in self.spared.most_common():
                nbytes = self.spared_nbytes[what]
                lines.append(f"  {count} {what}" + (f", {format_bytes(nbytes)}" if nbytes else ""))
        if self.left:
            lines.append("left to the original")
            lines += [f"  {self._reason(reason)}" for reason, _ in self.left.most_common()]
        return "\n".join(lines or ["nothing was fetched, spared or left"])
