"""What a load came to: the tensors, and the report about it."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from wan_loader.devices.resolve import device_card
from wan_loader.engine import TransferStats
from wan_loader.loading.report import Bottleneck, IoReport, LoadReport, MemoryReport
from wan_loader.plan.blocks import Transport
from wan_loader.sizes import format_bytes, format_count
from wan_loader.spans import summarize
from wan_loader.system.machine import machine_card
from wan_loader.verdict import judge_load

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

    from wan_loader.cache.build import Build
    from wan_loader.events import Span
    from wan_loader.loading.allocate import StoragePlan
    from wan_loader.loading.run import Choice

__all__ = ["LoadResult", "TransferResult", "make_report"]


@dataclass(frozen=True, repr=False)
class LoadResult:
    """Filled tensors by checkpoint name, the report, and the spans that it is made from."""

    tensors: dict[str, torch.Tensor]
    make_report: Callable[[], LoadReport]
    spans: tuple[Span, ...] = ()
    build: Build | None = None
    """The cache entry that is being written from this load."""

    def __repr__(self) -> str:
        devices = ", ".join(sorted({str(tensor.device) for tensor in self.tensors.values()})) or "no device"
        nbytes = sum(tensor.nbytes for tensor in self.tensors.values())
        building = ", a cache entry is being written" if self.build is not None else ""
        return f"Loaded({format_count(len(self.tensors), 'tensor')}, {format_bytes(nbytes)} on {devices}{building})"

    @cached_property
    def report(self) -> LoadReport:
        """Made when it is asked for: that takes milliseconds, for which nobody waits who only wants the tensors."""
        return self.make_report()


@dataclass(slots=True)
class TransferResult:
    """What moving the bytes came to."""

    tensors: dict[str, torch.Tensor]
    nbytes: int
    """Bytes loaded."""
    stats: TransferStats = field(default_factory=TransferStats)
    resident_before: int | None = None
    """None where that is unknown."""
    nbytes_viewed: int = 0
    reason: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def make_report(
    choice: Choice,
    plans: Sequence[StoragePlan],
    io: str,
    device: torch.device,
    moved: TransferResult,
    spans: Sequence[Span],
    seconds: float,
    memory: MemoryReport,
) -> LoadReport:
    """The report of a load. spans, seconds and memory: as they were when it ended."""
    verdict = judge_load(spans, seconds, str(device))
    transports = [transport for transport in Transport if moved.stats.nbytes[transport]]
    return LoadReport(
        command="load",
        target=choice.checkpoint.path,
        device=str(device),
        dtype=choice.rule.dtype,
        seconds=seconds,
        nbytes_file=sum(choice.checkpoint.storages[p.storage].nbytes for p in plans),
        nbytes_device=moved.nbytes,
        n_tensors=len(choice.tensors),
        io=IoReport(
            "+".join(transport.value for transport in transports) or "none",
            moved.reason,
            moved.resident_before,
            nbytes_mapped=moved.stats.nbytes[Transport.MAPPED],
            nbytes_direct=moved.stats.nbytes[Transport.DIRECT],
            nbytes_buffered=moved.stats.nbytes[Transport.BUFFERED],
            nbytes_viewed=moved.nbytes_viewed,
        ),
        phases=summarize(spans),
        bottleneck=Bottleneck(verdict.phase, verdict.why),
        memory=memory,
        machine={**machine_card(), **device_card(device)},
        settings={"io": io, **({} if (part := choice.checkpoint.part) is None else {"part": part}), **moved.settings},
        warnings=tuple(dict.fromkeys((*choice.checkpoint.warnings, *moved.warnings, *moved.stats.fallbacks))),
    )
