"""The verdict on a load or a start: what set the pace, and how far it is from what the machine can do.

Pure: a function of what was recorded. Every moment of the wall time is given to one phase (`spans.attribute`). A
phase's *loss* is the time it got, less the time it would need at its ceiling. A loss of more than 15 % of the whole (of
a program: of its start) is the culprit; without one, the load is at its limit, and the phase with most of the time
names the limit.

Some phases have no rate: random initialisation is avoidable, so all of it is loss; imports are compared with a bare
`import torch`, bookkeeping with a small allowance. Waiting for a slot of the pinned ring is lost where the pace-setter
itself was idle meanwhile: then the stages took turns.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from wan_loader.phases import PHASE_TABLE
from wan_loader.spans import attribute, by_label, by_phase, overlap_ns, summarize, union

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from wan_loader.events import Span
    from wan_loader.spans import PhaseSummary

__all__ = ["Evidence", "Verdict", "ideal_seconds", "judge", "judge_load"]

_CULPRIT = 0.15
#: Below this share of its ceiling a phase is slow, above it is at it: measurements scatter by that much.
_REACHED = 0.5
_IMPORTS_S = 0.5
#: Phases of which a label says more than their name.
_WITH_LABELS = ("import", "construct", "h2d", "cast", "wait", "other")
_KINDS = {kind.name: kind for kind in PHASE_TABLE}
_WITH_RATE = tuple(kind.name for kind in PHASE_TABLE if kind.has_rate)


@dataclass(frozen=True, slots=True)
class Verdict:
    """A judgement of what set the pace."""

    kind: str
    """The outcome: "slow" (a phase does worse than it could), "limit" (at what the hardware can do: it is healthy), or
    "unknown" (nothing to compare with).
    """
    phase: str
    why: str
    lost_s: float = 0.0
    """Seconds that would be won at the ceiling."""
    share: float = 0.0
    """Share of the wall time that this phase set the pace for."""
    reached_gbps: float | None = None
    ceiling_gbps: float | None = None


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """The facts that verdict and advice work on: one process's spans, and what is known around them.

    What follows from the spans alone is computed once: there are many, and every rule asks.
    """

    kind: str
    """"load" of ours, or "program" of other people."""
    seconds: float
    spans: Sequence[Span]
    start_ns: int
    end_ns: int
    device: str
    ceilings: Mapping[str, float] = field(default_factory=dict)
    """Rates and times of the machine at its best; what is absent was not measured."""
    cold_bytes: int = 0
    """Bytes that were read and not in the page cache before."""
    nbytes_file: int = 0
    fresh_bytes: int = 0
    """Bytes at most that were read into memory that was new."""
    dtype: str | None = None
    fp32_bytes: int = 0
    """Bytes of the files in fp32."""
    storage: Mapping[str, Any] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    limits: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def phases(self) -> dict[str, PhaseSummary]:
        """Busy time and bytes of each phase that occurred, by its name."""
        return {p.name: p for p in summarize(self.spans)}

    @cached_property
    def blame(self) -> dict[str, float]:
        """Seconds of the wall time by the phase that set the pace."""
        return attribute(self.spans, self.start_ns, self.end_ns)

    @cached_property
    def _by_phase(self) -> dict[str, list[Span]]:
        return by_phase(self.spans)

    def of_phase(self, name: str) -> Sequence[Span]:
        """Return the spans of one phase."""
        return self._by_phase.get(name, ())

    def labels(self, name: str) -> list[tuple[str, float, int]]:
        """Return (label, busy seconds, bytes) of one phase, the longest first."""
        return by_label(self.of_phase(name), name)

    @cached_property
    def slot_wait_s(self) -> float:
        """Seconds in which readers waited for a slot while the phase that set the pace was idle as well."""
        if self.kind != "load":
            return 0.0
        waits = union(s for s in self.of_phase("wait") if s.track.startswith("reader"))
        moving = [p for p in self.phases.values() if p.name in _WITH_RATE]
        if not waits or not moving:
            return 0.0
        busy = union(self.of_phase(max(moving, key=lambda p: p.busy_s).name))
        # Beyond the last read, readers that wait are only on their way out.
        last_read_ns = max((s.end_ns for s in self.of_phase("read")), default=0)
        waits = [(a, min(b, last_read_ns)) for a, b in waits if a < last_read_ns]
        total = sum(b - a for a, b in waits)
        return (total - overlap_ns(waits, busy)) / 1e9

    @cached_property
    def waits_after_s(self) -> float:
        """Seconds that were waited after the last work of a start, as a service waits for what it is asked."""
        work_ns = max((s.end_ns for s in self.spans if s.name not in ("wait", "other")), default=self.start_ns)
        return sum(b - max(a, work_ns) for a, b in union(self.of_phase("wait")) if b > work_ns) / 1e9

    @property
    def cuda(self) -> bool:
        """True if the weights go to a GPU."""
        return self.device.startswith("cuda")


def ideal_seconds(e: Evidence, name: str) -> float | None:
    """Return the seconds that a phase would need at its ceiling; None where that is not known."""
    nbytes = e.phases[name].nbytes if name in e.phases else 0
    match name:
        case "read":
            cold = min(nbytes, e.cold_bytes)
            # the rest was in the page cache and goes to memory that was used before, which is the quickest
            fresh = min(nbytes - cold, e.fresh_bytes)
            seconds = (
                _at(e, cold, "disk_gbps"),
                _at(e, fresh, "copy_gbps"),
                _at(e, nbytes - cold - fresh, "page_cache_gbps"),
            )
            return None if None in seconds else sum(s or 0.0 for s in seconds)
        case "h2d":
            return _at(e, nbytes, "h2d_pinned_gbps" if e.cuda else "copy_gbps")
        case "cast":
            return _at(e, nbytes, "cast_gpu_gbps" if e.cuda else "cast_cpu_gbps")
        case "register":
            return _at(e, nbytes, "register_gbps")
        case "import":
            bare = e.ceilings.get("import_torch_s")
            return None if bare is None else bare * 1.25 + _IMPORTS_S
        case "cuda_init":
            return e.ceilings.get("cuda_init_s", 1.0) * 1.5
    return _KINDS[name].allowance_s if name in _KINDS else None


def _at(e: Evidence, nbytes: int, ceiling: str) -> float | None:
    if not nbytes:
        return 0.0
    rate = e.ceilings.get(ceiling)
    return None if not rate else nbytes / rate / 1e9


def judge(e: Evidence) -> Verdict:
    """Judge one load or program."""
    blame = e.blame
    losses = {name: loss for name in blame if (loss := _loss(e, name, blame[name])) is not None}
    losses["wait"] = e.slot_wait_s
    worst = max(losses, key=lambda name: losses[name], default="other")
    pace = _pace_setter(blame)
    # A program goes on after its start: what it does then is no measure for its start.
    whole = e.seconds - (blame.get("other", 0.0) + e.waits_after_s if e.kind == "program" else 0.0)
    # 20 ms: shorter losses are noise, whatever their share
    if losses.get(worst, 0.0) >= max(_CULPRIT * whole, 0.02) and losses[worst] >= _unknown(e, blame):
        return _verdict("slow", e, worst, losses[worst], blame)
    if pace == "wait" and e.kind == "program":
        return _verdict("unknown", e, pace, 0.0, blame)
    kind = "limit" if pace in losses or pace in ("other", "wait") else "unknown"
    return _verdict(kind, e, pace, losses.get(pace, 0.0), blame)


def judge_load(spans: Sequence[Span], seconds: float, device: str) -> Verdict:
    """Judge a load of ours by its spans alone: as `judge` does where nothing was measured of the machine.

    Args:
        spans: What an observer of the load was told.
        seconds: How long the load took, counted from its first span.
        device: Where the tensors lie now.
    """
    if not spans:
        return Verdict("unknown", "other", "nothing was recorded: only a load with an observer is")
    start_ns = min(span.start_ns for span in spans)
    end_ns = start_ns + int(seconds * 1e9)
    return judge(Evidence(kind="load", seconds=seconds, spans=spans, start_ns=start_ns, end_ns=end_ns, device=device))


def _pace_setter(blame: Mapping[str, float]) -> str:
    return max(blame, key=lambda name: blame[name], default="other")


def _unknown(e: Evidence, blame: Mapping[str, float]) -> float:
    """Return the loss that a phase without a ceiling outweighs, as it took most of the time: half of what it took.

    Of waiting in the middle of a program's start, all is loss.
    """
    rates = [s / 2 for name, s in blame.items() if name in _WITH_RATE and ideal_seconds(e, name) is None]
    waited = blame.get("wait", 0.0) - e.waits_after_s if e.kind == "program" else 0.0
    return max([*rates, waited])


def _loss(e: Evidence, name: str, seconds: float) -> float | None:
    if name == "wait":
        return 0.0
    if name == "other":
        return seconds if e.kind == "load" else 0.0
    ideal = ideal_seconds(e, name)
    if ideal is None:
        return None
    if name in _WITH_RATE and ideal >= _REACHED * seconds:
        return 0.0
    return max(0.0, seconds - ideal)


def _verdict(kind: str, e: Evidence, name: str, lost_s: float, blame: Mapping[str, float]) -> Verdict:
    phase = e.phases.get(name)
    seconds = blame.get(name, 0.0)
    ideal = ideal_seconds(e, name)
    nbytes = phase.nbytes if phase and name in _WITH_RATE else 0
    ceiling = nbytes / ideal / 1e9 if ideal and nbytes else None
    reached = nbytes / seconds / 1e9 if nbytes and seconds else None
    # the phase may have gone on while another set the pace: no rate above the ceiling or what was measured
    if ceiling and phase and kind == "limit" and reached:
        reached = min(reached, max(ceiling, phase.gbps))
    share = seconds / e.seconds if e.seconds else 0.0
    why = _why(kind, e, name, lost_s if (kind, name) == ("slow", "wait") else seconds, reached, ceiling)
    return Verdict(kind, name, why, lost_s, share, reached, ceiling)


def _why(kind: str, e: Evidence, name: str, seconds: float, reached: float | None, ceiling: float | None) -> str:
    share = f"{seconds / e.seconds:.0%}" if e.seconds else "0%"
    text = f"{_KINDS[name].meaning} set the pace for {seconds:.2f} s of {e.seconds:.2f} s ({share})"
    if name == "wait" and kind == "slow":
        waited = f"{seconds:.2f} s of {e.seconds:.2f} s"
        text = f"readers waited for a free slot of the pinned ring for {waited}, nothing was limiting"
    if reached and ceiling:
        text += f", at {reached:.2f} GB/s where {ceiling:.2f} GB/s can be had"
    if name in _WITH_LABELS and (rows := e.labels(name)):
        text += f": {rows[0][0]} took {rows[0][1]:.2f} s"
    if kind == "limit":
        return "healthy: " + text
    if kind == "unknown" and name != "wait":
        return text + "; what could be had was not measured"
    return text
