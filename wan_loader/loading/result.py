"""The result of a load: the tensors, the plan that was carried out, the counters, and the report about it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

from wan_loader.devices.resolve import device_card
from wan_loader.loading.report import Bottleneck, IoReport, LoadReport, MemoryReport
from wan_loader.plan.blocks import Transport
from wan_loader.sizes import format_bytes, format_count
from wan_loader.system.machine import machine_card

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import torch

    from wan_loader.engine import TransferStats
    from wan_loader.events import Span
    from wan_loader.loading.report import CacheReport, KeptReport
    from wan_loader.plan.plan import LoadPlan

__all__ = ["EntryBuild", "LoadResult"]

#: What stands in the place of transports, where no bytes came from files.
_KEPT_MODE = "kept"


class EntryBuild(Protocol):
    """A cache entry that is being written in the background."""

    nbytes: int
    nbytes_written: int
    nbytes_from_source: int
    failure: str | None
    path: Path | None
    """The entry, once it is complete."""

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait for the end, at most `timeout_s` seconds; return whether it has come."""

    def stop(self) -> None:
        """Give up; return when what was written is removed."""


# no slots: the cached report lives in the instance's dict
@dataclass(frozen=True, repr=False, kw_only=True)
class LoadResult:
    """The outcome of one load."""

    tensors: dict[str, torch.Tensor]
    """The loaded tensors by their names in the checkpoint, in the order in which they were asked for."""
    plan: LoadPlan
    stats: TransferStats
    seconds: float
    memory: MemoryReport
    spans: tuple[Span, ...] = ()
    """The spans of work; empty where nobody observed the load."""
    warnings: tuple[str, ...] = ()
    """Warnings beside those of the plan and of the transfer."""
    settings: Mapping[str, object] = field(default_factory=dict)
    """Settings for the report, beside those of the plan."""
    cache: CacheReport | None = None
    kept: KeptReport | None = None
    """How the keeper took part, if it was asked."""
    build: EntryBuild | None = None
    """The cache entry that is being written from this load."""

    def __repr__(self) -> str:
        devices = ", ".join(sorted({str(tensor.device) for tensor in self.tensors.values()})) or "no device"
        nbytes = sum(tensor.nbytes for tensor in self.tensors.values())
        building = ", a cache entry is being written" if self.build is not None else ""
        return f"LoadResult({format_count(len(self.tensors), 'tensor')}, {format_bytes(nbytes)} on {devices}{building})"

    @cached_property
    def report(self) -> LoadReport:
        """The report, made when it is asked for. It keeps none of the tensors.

        Making it takes milliseconds, for which nobody waits who only wants the tensors.
        """
        return _report(self)

    def after(self, before: Sequence[Span]) -> LoadResult:
        """Return the result of a load that counts what was done for it before it began: the opening of its checkpoint.

        Args:
            before: Spans of that time. What lies between them and the load, such as imports, does not count.
        """
        begun_ns = min((span.start_ns for span in self.spans), default=0)
        moved: list[Span] = []
        for span in reversed(before):
            start_ns = begun_ns - (span.end_ns - span.start_ns)
            moved.insert(0, replace(span, start_ns=start_ns, end_ns=begun_ns))
            begun_ns = start_ns
        seconds = sum(span.end_ns - span.start_ns for span in before) / 1e9
        return replace(self, spans=(*moved, *self.spans), seconds=self.seconds + seconds)


def _report(result: LoadResult) -> LoadReport:
    report = _report_of_plan(result)
    kept = result.kept
    if kept is None or kept.state == "source":
        return report
    # the plan had nothing to move: all tensors were there
    nbytes = sum(tensor.nbytes for tensor in result.tensors.values())
    io = IoReport(_KEPT_MODE, kept.reason, None)
    return replace(report, n_tensors=len(result.tensors), nbytes_device=nbytes, io=io)


def _report_of_plan(result: LoadResult) -> LoadReport:
    from wan_loader.spans import summarize  # a load that nobody asks for its report does without

    plan, stats = result.plan, result.stats
    transports = [transport for transport in Transport if stats.nbytes[transport]]
    return LoadReport(
        command="load",
        target=plan.checkpoint.path,
        device=plan.facts.device,
        dtype=plan.request.policy.dtype,
        seconds=result.seconds,
        nbytes_file=plan.nbytes_file,
        nbytes_device=plan.nbytes_loaded if plan.through_torch else plan.layout.nbytes_loaded + plan.nbytes_grown,
        n_tensors=len(plan.tensors),
        io=IoReport(
            "+".join(transport.value for transport in transports) or "none",
            plan.reason,
            plan.resident,
            nbytes_mapped=stats.nbytes[Transport.MAPPED],
            nbytes_direct=stats.nbytes[Transport.DIRECT],
            nbytes_buffered=stats.nbytes[Transport.BUFFERED],
            nbytes_viewed=0 if plan.through_torch else plan.layout.nbytes_viewed,
        ),
        phases=summarize(result.spans),
        bottleneck=_bottleneck(result),
        memory=result.memory,
        machine={**machine_card(), **device_card(plan.facts.device)},
        settings={**_settings(plan, stats), **result.settings},
        warnings=tuple(dict.fromkeys((*plan.warnings, *result.warnings, *stats.fallbacks))),
        cache=result.cache,
        kept=result.kept,
    )


def _settings(plan: LoadPlan, stats: TransferStats) -> dict[str, Any]:
    settings: dict[str, Any] = {"io": plan.request.io}
    if plan.checkpoint.part is not None:
        settings["part"] = plan.checkpoint.part
    if plan.through_torch:
        return settings
    used = plan.settings
    settings |= {"threads": used.threads, "slot_bytes": used.slot_bytes, "n_slots": used.n_slots}
    if stats.in_place_nbytes:
        settings["nbytes_straight"] = stats.in_place_nbytes
    return settings


def _bottleneck(result: LoadResult) -> Bottleneck:
    if not result.spans:
        return Bottleneck("other", "nothing was measured: the load had no observer")
    from wan_loader.verdict import judge_load

    verdict = judge_load(result.spans, result.seconds, result.plan.facts.device)
    return Bottleneck(verdict.phase, verdict.why)
