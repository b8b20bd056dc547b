"""From facts to filled tensors: has it decided what to do, allocates, has the engine carry it out, and reports.

The order is: device, memory, files opened and checked; then plan, room and bytes, in portions. What can be known to
fail without reading a weight fails before the first one is read, and nothing is handed out unless everything arrived.
"""

from __future__ import annotations

import gc
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING

from wan_loader.arguments import check_device, check_io, checked_threads
from wan_loader.devices.cpu import CpuWriter
from wan_loader.devices.cuda import CudaWriter
from wan_loader.devices.resolve import (
    check_room_for_torch,
    check_tensors_are_real,
    current,
    device_peak_bytes,
    is_busy,
    reset_device_peak,
    resolve_device,
)
from wan_loader.dtypes import torch_dtype
from wan_loader.engine import Batch, run_transfer
from wan_loader.engine.activity import loading
from wan_loader.engine.reader import Reader
from wan_loader.events import Recorder, clock_ns, span
from wan_loader.loading.allocate import Allocation, check_host_memory, convert_storage, plan_storages
from wan_loader.loading.report import MemoryReport
from wan_loader.loading.result import LoadResult, TransferResult, make_report
from wan_loader.plan.blocks import Transport
from wan_loader.plan.limits import MAX_READS
from wan_loader.plan.plan import decide
from wan_loader.plan.transport import explain
from wan_loader.system.machine import peak_resident, reset_peak_resident
from wan_loader.system.page_cache import Knowledge
from wan_loader.system.posix_aio import get_ready
from wan_loader.system.threads import in_background
from wan_loader.warming.evict import resident_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import torch

    from wan_loader.devices.writer import Destination, DeviceWriter
    from wan_loader.distributed.shard_group import ShardGroup
    from wan_loader.engine import TransferStats
    from wan_loader.engine.reader import Check
    from wan_loader.events import Observer, Span
    from wan_loader.formats.facts import Checkpoint, TensorFacts
    from wan_loader.loading.allocate import StoragePlan
    from wan_loader.plan.blocks import Block
    from wan_loader.plan.dtype_policy import DtypePolicy

__all__ = ["Choice", "LoadOptions", "load_checkpoint", "paused_gc", "read_storages"]


#: Between two unregistrations in the background: whoever uses the device meanwhile waits for one at most.
_RELEASE_PAUSE_S = 0.001
#: Python freezes some hundred objects of its own. Programs freeze all they have, which is never less than 4000.
_FROZEN_BY_ITSELF = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptions:
    """How to load."""

    device: str | int | torch.device
    io: str = "auto"
    threads: int | None = None
    observer: Observer | None = None
    shard_group: ShardGroup | None = None
    """The processes that load together with this one."""
    owned: bool = False
    """Whether no tensor may stay in the mapped file."""

    def __post_init__(self) -> None:
        check_device(self.device)
        check_io(self.io)
        object.__setattr__(self, "threads", checked_threads(self.threads))


@dataclass(frozen=True, slots=True)
class Choice:
    """What to load, as what: tensors of a checkpoint, the most urgent first."""

    checkpoint: Checkpoint
    tensors: Sequence[TensorFacts]
    rule: DtypePolicy
    check: Check | None = None
    """Is given every block while it is read; then nothing is mapped."""


class _Tee:
    """Records spans, and passes them on to the caller's observer."""

    def __init__(self, observer: Observer | None) -> None:
        self.recorder = Recorder()
        self._observer = observer

    def record(self, span: Span) -> None:
        self.recorder.record(span)
        if self._observer is not None:
            self._observer.record(span)


def load_checkpoint(
    choose: Callable[[], Choice],
    options: LoadOptions,
    bind: Callable[[dict[str, torch.Tensor], torch.device], list[str]] | None = None,
) -> LoadResult:
    """Load what `choose` finds in the headers.

    bind: takes the tensors and the device that they are on, as part of the load, and returns warnings.
    """
    start_ns = clock_ns()
    tee = _Tee(options.observer)
    if str(options.device) != "cpu":
        get_ready(MAX_READS)
    with paused_gc():
        with span(tee, "header"):
            choice = choose()
        reset_peak_resident()
        device = resolve_device(options.device, tee)
        check_tensors_are_real()
        reset_device_peak(device)
        with span(tee, "init"):
            plans = plan_storages(choice.tensors, choice.rule)
        with current(device), loading():
            moved = _move_chosen(choice, plans, options, device, tee)
        with _released_on_failure(moved.stats):
            with span(tee, "assign"):
                _convert_late(moved.tensors, plans, choice.rule)
                ordered = {t.name: moved.tensors[t.name] for t in choice.tensors}
                if options.shard_group is not None:
                    ordered = options.shard_group.cut(ordered)
                    options.shard_group.arrived()
                moved.warnings += bind(ordered, device) if bind is not None else []
            seconds = (clock_ns() - start_ns) / 1e9
            memory = MemoryReport(
                peak_resident(), moved.stats.pinned_nbytes, device_peak_bytes(device), moved.stats.registered_nbytes
            )
            moved.tensors = {}  # the report must not keep what its owner drops
            spans = tuple(tee.recorder.spans)
            report = partial(make_report, choice, plans, options.io, device, moved, spans, seconds, memory)
            if device.type == "cuda":  # unregistering takes time that nobody has to wait for
                in_background(partial(moved.stats.release, _RELEASE_PAUSE_S), "release")
            else:
                moved.stats.release()
    return LoadResult(ordered, report, spans)


@contextmanager
def _released_on_failure(stats: TransferStats) -> Iterator[None]:
    """Memory must not go while the driver still has it registered: a later load would get its old pages."""
    try:
        yield
    except BaseException:
        stats.release()
        raise


@contextmanager
def paused_gc() -> Iterator[None]:
    """Keep the cycle collector away: it walks all of torch's objects, 50 ms at a time, while every thread waits.

    What was made meanwhile counts as long-lived afterwards: else the next object made would have it all looked at,
    for 7 ms.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            if gc.get_freeze_count() < _FROZEN_BY_ITSELF:  # else what the program froze would thaw
                gc.freeze()
                gc.unfreeze()
            gc.enable()


def read_storages(checkpoint: Checkpoint, plans: Sequence[StoragePlan]) -> dict[str, torch.Tensor]:
    """Read and convert storages into host memory, as a load does, without being one: nothing is reported."""
    check_room_for_torch()
    import torch

    moved = _move(checkpoint, plans, LoadOptions(device="cpu", owned=True), torch.device("cpu"), None)
    moved.stats.release()
    return moved.tensors


def _move_chosen(
    choice: Choice, plans: Sequence[StoragePlan], options: LoadOptions, device: torch.device, observer: Observer
) -> TransferResult:
    if choice.checkpoint.format == "torch-pickle":
        return _move_through_torch(choice.checkpoint, plans, options, device, observer)
    return _move(choice.checkpoint, plans, options, device, observer, choice.check)


def _move(
    checkpoint: Checkpoint,
    plans: Sequence[StoragePlan],
    options: LoadOptions,
    device: torch.device,
    observer: Observer | None,
    check: Check | None = None,
) -> TransferResult:
    """Have the engine fill the tensors, which are planned and allocated while earlier bytes are on their way."""
    with Reader(checkpoint.files, check) as reader:
        with span(observer, "init"):
            course = decide(checkpoint, plans, options, device, reader, check)
        layout, settings = course.layout, course.settings
        target: DeviceWriter = CudaWriter(device.index, observer) if device.type == "cuda" else CpuWriter(observer)
        allocation = Allocation(checkpoint, layout, device)
        batches = _batches(course.blocks, allocation, course.batch, observer)
        stats = run_transfer(batches, reader, target, settings, observer)
        used = {"threads": settings.threads, "slot_bytes": settings.slot_bytes, "n_slots": settings.n_slots}
        if stats.straight_nbytes:
            used["nbytes_straight"] = stats.straight_nbytes
        with _released_on_failure(stats):
            with span(observer, "init"):
                allocation.copied()  # what holds no bytes, or none that are read here
                allocation.viewed(reader.fds)
            for file in checkpoint.files:
                file.check_unchanged()
            if options.shard_group is not None:
                used |= options.shard_group.exchange(
                    layout.copied, allocation.destinations, layout.nbytes_read, observer
                )
    viewed = sum(e.end - e.start for e in layout.viewed_ranges)
    stats.nbytes[Transport.MAPPED] += viewed
    reason = explain(options.io, course.io, course.resident, layout.nbytes_read, viewed, course.knowledge)
    resident = None if course.knowledge is Knowledge.UNKNOWN else course.resident
    return TransferResult(
        allocation.tensors, layout.nbytes_loaded, stats, resident, viewed, reason, used, list(layout.warnings)
    )


def _batches(
    blocks: Iterator[Block], allocation: Allocation, size: int | None, observer: Observer | None
) -> Iterator[Batch]:
    """Some blocks at a time, with the storages that they are the first to need.

    size: how many blocks; None: all. All that are left, too, where work is queued on the caller's stream: memory may be
    handed out that it still uses, so copies would wait for it anew with each portion.
    """

    def allocate(count: int) -> list[Destination]:
        with span(observer, "init"):
            return allocation.copied(count)

    while True:
        with span(observer, "init"):
            batch = list(islice(blocks, None if is_busy(allocation.device) else size))
        if not batch:
            return
        yield Batch(batch, partial(allocate, batch[-1].segments[-1].storage + 1))


def _move_through_torch(
    checkpoint: Checkpoint, plans: Sequence[StoragePlan], options: LoadOptions, device: torch.device, observer: Observer
) -> TransferResult:
    """The way for pickles that cannot be planned."""
    from wan_loader.formats.torchpickle import load_torch_pickle

    nbytes = sum(checkpoint.storages[p.storage].nbytes for p in plans)
    check_host_memory(nbytes if device.type == "cpu" else 0, checkpoint.path)
    resident = resident_bytes(file.path for file in checkpoint.files)
    state: dict[str, torch.Tensor] = {}
    with span(observer, "read", nbytes):
        for number, file in enumerate(checkpoint.files):
            held = load_torch_pickle(file.path, str(device), checkpoint.part)
            file.check_unchanged()
            state |= {name: held[name] for name in checkpoint.names_in(number)}
    with span(observer, "cast"):
        for plan in plans:
            if plan.converts:
                convert_storage(state, plan)
    loaded = sum(plan.nbytes_loaded(checkpoint.storages[plan.storage].nbytes) for plan in plans)
    reason = "the file cannot be planned: torch.load read it"
    return TransferResult(state, loaded, resident_before=resident, reason=reason)


def _convert_late(tensors: dict[str, torch.Tensor], plans: Sequence[StoragePlan], rule: DtypePolicy) -> None:
    """Tensors that share a storage but need different dtypes part here."""
    for facts in (t for plan in plans if plan.late for t in plan.tensors):
        tensors[facts.name] = tensors[facts.name].to(torch_dtype(rule.target(facts.name, facts.dtype)))
