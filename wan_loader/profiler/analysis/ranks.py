"""The sessions of one distributed load side by side: who was slow, who read what, how long the exchange took. Pure."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from wan_loader.errors import SessionError
from wan_loader.loading.report import SCHEMA_VERSION

if TYPE_CHECKING:
    from collections.abc import Sequence

    from wan_loader.profiler.analysis.session import Session

__all__ = ["Member", "Spread", "spread"]


@dataclass(frozen=True, slots=True)
class Member:
    """One process of a distributed load."""

    rank: int
    seconds: float
    nbytes_read: int
    """What it read itself."""
    nbytes_received: int
    """What came from others."""
    read_s: float
    """Busy with reading."""
    shard_s: float
    """Busy with collectives, waiting for the others included."""
    device_peak_bytes: int
    host_peak_bytes: int


@dataclass(frozen=True, slots=True)
class Spread:
    """All of them."""

    target: str
    n_processes: int
    """Of the load; sessions of some of them may be missing."""
    members: tuple[Member, ...]

    @property
    def nbytes_read(self) -> int:
        """By all of them."""
        return sum(m.nbytes_read for m in self.members)

    @property
    def sentence(self) -> str:
        """What stands out."""
        slowest, fastest = (choose(self.members, key=lambda m: m.read_s) for choose in (max, min))
        middle = statistics.median(m.read_s for m in self.members)
        late = slowest.read_s - fastest.read_s
        if middle > 0 and late > 0.2 * max(m.seconds for m in self.members):
            return (
                f"process {slowest.rank} reads for {slowest.read_s:.2f} s, {late:.2f} s longer than process "
                f"{fastest.rank}: all wait for it; look at its machine and its disk"
            )
        share = statistics.median(m.shard_s / m.seconds if m.seconds else 0.0 for m in self.members)
        return f"the processes are even; {share:.0%} of the time goes into collectives"

    def to_json(self) -> dict[str, Any]:
        """The document of `report --json` for several sessions."""
        return {
            "schema_version": SCHEMA_VERSION,
            "command": "report",
            "target": self.target,
            "n_processes": self.n_processes,
            "nbytes_read": self.nbytes_read,
            "summary": self.sentence,
            "processes": [{name: getattr(m, name) for name in Member.__dataclass_fields__} for m in self.members],
        }


def spread(sessions: Sequence[Session]) -> Spread:
    """Sessions of the processes of one load, by rank. `SessionError` for sessions of different loads."""
    members = sorted((_member(session) for session in sessions), key=lambda m: m.rank)
    first = sessions[0].report
    sizes = {(s.report.target, s.report.settings.get("processes")) for s in sessions}
    if len(sizes) > 1 or len({m.rank for m in members}) < len(members):
        raise SessionError("these are not sessions of one distributed load, one of each process")
    return Spread(first.target, int(first.settings["processes"]), tuple(members))


def _member(session: Session) -> Member:
    report, settings = session.report, session.report.settings
    whole = [settings.get(name) for name in ("rank", "processes", "nbytes_read", "nbytes_received")]
    if not all(isinstance(value, int) and value >= 0 for value in whole):
        raise SessionError("a session is of a load by one process: several sessions make a report of a distributed one")
    busy = {phase.name: phase.busy_s for phase in report.phases}
    return Member(
        rank=settings["rank"],
        seconds=report.seconds,
        nbytes_read=settings["nbytes_read"],
        nbytes_received=settings["nbytes_received"],
        read_s=busy.get("read", 0.0),
        shard_s=busy.get("shard", 0.0),
        device_peak_bytes=report.memory.device_peak_bytes,
        host_peak_bytes=report.memory.host_peak_bytes,
    )
