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

__all__ = ["RankComparison", "RankSummary", "compare_ranks"]


@dataclass(frozen=True, slots=True)
class RankSummary:
    """One process of a distributed load."""

    rank: int
    seconds: float
    nbytes_read: int
    """Bytes that it read itself."""
    nbytes_received: int
    """Bytes that came from others."""
    read_s: float
    """Seconds busy with reading."""
    shard_s: float
    """Seconds busy with collectives, waiting for the others included."""
    device_peak_bytes: int
    host_peak_bytes: int


@dataclass(frozen=True, slots=True)
class RankComparison:
    """The processes of one load, side by side."""

    target: str
    n_processes: int
    """The number of processes of the load; sessions of some of them may be missing."""
    ranks: tuple[RankSummary, ...]

    @property
    def nbytes_read(self) -> int:
        """Bytes read by all of them."""
        return sum(m.nbytes_read for m in self.ranks)

    @property
    def sentence(self) -> str:
        """The sentence that says what stands out."""
        slowest, fastest = (choose(self.ranks, key=lambda m: m.read_s) for choose in (max, min))
        middle = statistics.median(m.read_s for m in self.ranks)
        late = slowest.read_s - fastest.read_s
        if middle > 0 and late > 0.2 * max(m.seconds for m in self.ranks):
            return (
                f"process {slowest.rank} reads for {slowest.read_s:.2f} s, {late:.2f} s longer than process "
                f"{fastest.rank}: all wait for it; look at its machine and its disk"
            )
        share = statistics.median(m.shard_s / m.seconds if m.seconds else 0.0 for m in self.ranks)
        return f"the processes are even; {share:.0%} of the time goes into collectives"

    def to_json(self) -> dict[str, Any]:
        """Return the document of `report --json` for several sessions."""
        return {
            "schema_version": SCHEMA_VERSION,
            "command": "report",
            "target": self.target,
            "n_processes": self.n_processes,
            "nbytes_read": self.nbytes_read,
            "summary": self.sentence,
            "processes": [{name: getattr(m, name) for name in RankSummary.__dataclass_fields__} for m in self.ranks],
        }


def compare_ranks(sessions: Sequence[Session]) -> RankComparison:
    """Compare sessions of the processes of one load, by rank.

    Raises:
        SessionError: They are of different loads, or of a load by one process.
    """
    ranks = sorted((_summary(session) for session in sessions), key=lambda m: m.rank)
    first = sessions[0].report
    sizes = {(s.report.target, s.report.settings.get("processes")) for s in sessions}
    if len(sizes) > 1 or len({m.rank for m in ranks}) < len(ranks):
        raise SessionError("these are not sessions of one distributed load, one of each process")
    return RankComparison(first.target, int(first.settings["processes"]), tuple(ranks))


def _summary(session: Session) -> RankSummary:
    report, settings = session.report, session.report.settings
    whole = [settings.get(name) for name in ("rank", "processes", "nbytes_read", "nbytes_received")]
    if not all(isinstance(value, int) and value >= 0 for value in whole):
        raise SessionError.because(
            "a session is of a load by one process", "several sessions make a report of a distributed one"
        )
    busy = {phase.name: phase.busy_s for phase in report.phases}
    return RankSummary(
        rank=settings["rank"],
        seconds=report.seconds,
        nbytes_read=settings["nbytes_read"],
        nbytes_received=settings["nbytes_received"],
        read_s=busy.get("read", 0.0),
        shard_s=busy.get("shard", 0.0),
        device_peak_bytes=report.memory.device_peak_bytes,
        host_peak_bytes=report.memory.host_peak_bytes,
    )
