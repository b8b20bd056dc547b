"""The run of a plan: it allocates, has the engine move the bytes, and yields what has arrived.

What can be known to fail without reading a weight has failed before, when the plan was made. What is yielded is in
place, but only once everything has arrived it is known that no file was changed meanwhile.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from wan_loader.devices.cpu import CpuWriter
from wan_loader.devices.cuda import CudaWriter
from wan_loader.devices.resolve import is_busy
from wan_loader.dtypes import torch_dtype
from wan_loader.engine import Need, TransferState, convert_blocks, transfer_blocks
from wan_loader.engine.open_files import OpenFiles
from wan_loader.events import span
from wan_loader.formats.known_formats import format_of
from wan_loader.loading.allocate import Allocation, convert_storage
from wan_loader.loading.make_values import ValueMaker
from wan_loader.loading.probe import probe
from wan_loader.plan.blocks import Transport
from wan_loader.plan.engine_settings import TransferMode
from wan_loader.plan.plan import make_plan

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Sequence

    import torch

    from wan_loader.cancel import CancelToken
    from wan_loader.devices.writer import Destination, DeviceWriter
    from wan_loader.engine import Steps
    from wan_loader.engine.open_files import Check
    from wan_loader.events import Observer
    from wan_loader.plan.blocks import Segment
    from wan_loader.plan.plan import LoadPlan
    from wan_loader.plan.request import LoadRequest

__all__ = ["TransferResult", "collect", "convert_late", "read_tensors", "run"]


@dataclass(slots=True)
class TransferResult:
    """The outcome of a run: the tensors, and what is still owed for them."""

    tensors: dict[str, torch.Tensor]
    """The tensors by name, in the order in which they were wanted."""
    state: TransferState
    """The counters, and what must be released once nothing is read from the transfer's memory any more."""
    destinations: Sequence[Destination] = ()
    """The memory of each storage that was copied, in the order of the layout."""


def run(
    plan: LoadPlan,
    *,
    check: Check | None = None,
    memory: Callable[[int], torch.Tensor] | None = None,
    cancel: CancelToken | None = None,
    observer: Observer | None = None,
) -> Generator[dict[str, torch.Tensor], None, TransferResult]:
    """Carry out a plan.

    The caller must call `release` on the result's `state`, once nothing is read from the transfer's memory any more.
    Closing the generator, `cancel`, and the first failure of any thread stop everything; then nothing stays allocated.

    Args:
        plan: The plan.
        check: Is given every block while it is read, and raises if it is not what it was.
        memory: Makes the memory of what is copied (`Allocation`); None: torch does.
        cancel: Stops the run.
        observer: Is told of spans.

    Yields:
        Tensors by name as their bytes arrive, each once. Of a load that is piecemeal, they are the taker's alone.

    Returns:
        All tensors, none where the load is piecemeal, with the state of the transfer.
    """
    if plan.through_torch:
        return (yield from _run_through_torch(plan, cancel, observer))
    import torch

    device, state = torch.device(plan.facts.device), TransferState()
    keeps = not plan.request.piecemeal
    with OpenFiles(plan.checkpoint.files, check) as reader:
        writer: DeviceWriter = CpuWriter(observer) if device.type == "cpu" else CudaWriter(device.index, observer)
        allocation, arrivals, maker = Allocation(plan, device, memory), _Arrivals(plan), ValueMaker(plan, observer)
        if not keeps:  # by nobody else, while it may still be written to: this is the last step of the clean-up
            state.cleanups.append(allocation.let_go)
        move_blocks = convert_blocks if plan.settings.mode is TransferMode.CONVERTED else transfer_blocks
        steps = move_blocks(reader, writer, plan.settings, state, cancel=cancel, observer=observer)
        for segments in _drive(steps, plan, allocation, observer):
            if names := maker.arrived(arrivals.complete(segments), allocation.tensors):
                yield allocation.taken(names, keeps=keeps)
        assert arrivals.is_complete, "a transfer that ends has brought everything"
        try:
            with span(observer, "init"):
                allocation.copied()  # what holds no bytes, or none that are read here
                allocation.viewed(reader.fds)
            # once more at the end: bytes from before and after a change would be mixed
            for file in plan.checkpoint.files:
                file.check_unchanged()
            if not plan.shared:
                with span(observer, "assign"):
                    convert_late(allocation.tensors, plan)
            # what holds no bytes, is late, or is used where it lies
            rest = maker.arrived([name for name in plan.read_names if name not in arrivals.told], allocation.tensors)
            yield allocation.taken(rest, keeps=keeps)
            tensors = {t.name: allocation.tensors[t.name] for t in plan.tensors} if keeps else {}
        except BaseException:
            # whoever would have to is not given the state
            state.release()
            raise
    state.nbytes[Transport.MAPPED] += plan.layout.nbytes_viewed
    return TransferResult(tensors, state, allocation.destinations)


class _Arrivals:
    """The bytes that have yet to arrive, and the tensors that have all of theirs."""

    def __init__(self, plan: LoadPlan) -> None:
        self._storages = plan.layout.copied
        self._missing = [r.end - r.start for r in plan.layout.byte_ranges]
        """The bytes that have yet to arrive, of each copied storage."""
        self.told: set[str] = set()

    @property
    def is_complete(self) -> bool:
        """True if every byte has arrived."""
        return not any(self._missing)

    def complete(self, segments: Sequence[Segment]) -> list[str]:
        """Take note of segments that are in place; return the names of tensors that are complete with them."""
        names: list[str] = []
        for segment in segments:
            self._missing[segment.storage] -= segment.nbytes
            if self._missing[segment.storage] == 0 and not (storage := self._storages[segment.storage]).late:
                names += [facts.name for facts in storage.tensors]
        self.told.update(names)
        return names


def collect(arrivals: Generator[dict[str, torch.Tensor], None, TransferResult]) -> TransferResult:
    """Have all of a run arrive; return its result."""
    with closing(arrivals):
        while True:
            try:
                next(arrivals)
            except StopIteration as end:
                result: TransferResult = end.value
                return result


def _drive(
    steps: Steps, plan: LoadPlan, allocation: Allocation, observer: Observer | None
) -> Iterator[Sequence[Segment]]:
    """Give the engine what it asks for: blocks of the plan, some at a time, and the storages that they need.

    All blocks that are left, where work is queued on the caller's stream: memory may be handed out that it still uses,
    so copies would wait for it anew with each batch. Not of a load that is piecemeal: there need not be room for all.

    Yields:
        Segments that have arrived.
    """
    blocks, batch = iter(plan.blocks), list[Any]()
    answer: Sequence[Any] | None = None
    with closing(steps):
        while True:
            try:
                step = steps.send(answer)
            except StopIteration:
                return
            answer = None
            if step is Need.BLOCKS:
                with span(observer, "init"):
                    at_once = is_busy(allocation.device) and not plan.request.piecemeal
                    answer = batch = list(islice(blocks, None if at_once else plan.batch))
            elif step is Need.MEMORY:
                with span(observer, "init"):
                    # storages are numbered in the order of their reads: this is the last one that is needed
                    answer = allocation.copied(batch[-1].segments[-1].storage + 1)
            else:
                yield step


def _run_through_torch(
    plan: LoadPlan, cancel: CancelToken | None, observer: Observer | None
) -> Generator[dict[str, torch.Tensor], None, TransferResult]:
    """Load pickles that cannot be planned, file by file."""
    checkpoint, state = plan.checkpoint, dict[str, Any]()
    load_whole = format_of(checkpoint).load_whole
    assert load_whole is not None, "a plan goes through torch where its format says how"
    with span(observer, "read", plan.nbytes_file):
        for number, file in enumerate(checkpoint.files):
            if cancel is not None:
                cancel.check()
            held = load_whole(file.path, plan.facts.device, checkpoint.part)
            file.check_unchanged()
            state |= {name: held[name] for name in checkpoint.names_in(number)}
    with span(observer, "cast"):
        for storage in plan.storages:
            if storage.converts:
                convert_storage(state, storage)
    if not plan.shared:
        convert_late(state, plan)
    tensors = {t.name: state[t.name] for t in plan.tensors}
    yield tensors
    return TransferResult(tensors, TransferState())


def convert_late(tensors: dict[str, torch.Tensor], plan: LoadPlan) -> None:
    """Have tensors part that share a storage but need different dtypes; once all of their bytes are there."""
    for facts in (t for storage in plan.storages if storage.late for t in storage.tensors):
        dtype = plan.request.policy.target(facts.name, facts.dtype)
        tensors[facts.name] = tensors[facts.name].to(torch_dtype(dtype))


def read_tensors(request: LoadRequest) -> dict[str, torch.Tensor]:
    """Read and convert tensors into host memory, as a load does, without being one: nothing is measured or reported."""
    checkpoint = request.open()
    transfer = collect(run(make_plan(request, checkpoint, probe(checkpoint, request))))
    transfer.state.release()
    return transfer.tensors
