"""The life of a streamed module, from the request to the hooks.

    request -> open -> pair -> lay out, split -> load the rest -> buffers, source, schedule -> bind, hooks

A wrapper around a load: the steps are those of `load_into`, with some between them.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from wan_loader.devices.resolve import current
from wan_loader.dtypes import torch_dtype
from wan_loader.errors import CheckpointError, OptionError
from wan_loader.formats.known_formats import is_planned
from wan_loader.loading.bind import Into, make_binding
from wan_loader.loading.load_session import LoadSession
from wan_loader.loading.probe import probe
from wan_loader.loading.run import read_tensors
from wan_loader.plan.blocks import Transport
from wan_loader.plan.request import LoadRequest
from wan_loader.streaming.converted import find_converted
from wan_loader.streaming.decision import Limits, decide, lay_out_all
from wan_loader.streaming.device import HostStreamDevice
from wan_loader.streaming.ledger import Held, Ledger
from wan_loader.streaming.report import StreamReport
from wan_loader.streaming.schedule import Schedule, course
from wan_loader.streaming.source import CHUNK_BYTES, FileSource
from wan_loader.streaming.workspace import Workspace

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

    from wan_loader.cancel import CancelToken
    from wan_loader.events import Observer
    from wan_loader.formats import Checkpoint
    from wan_loader.loading.bind import Binding
    from wan_loader.loading.report import CacheReport, LoadReport
    from wan_loader.plan.facts import Facts
    from wan_loader.streaming.blocks import BlockLayout
    from wan_loader.streaming.decision import Decision
    from wan_loader.streaming.device import StreamDevice
    from wan_loader.streaming.handle import StreamedBlocks
    from wan_loader.types import StrPath

__all__ = ["Use", "stream"]

#: A converted segment is a chunk long at most, or less than one element more.
_SCRATCH_BYTES = CHUNK_BYTES + 512


class Use(NamedTuple):
    """What the blocks may use that is there already."""

    workspace: Workspace | None
    cache: bool
    cache_dir: StrPath | None


def stream(
    request: LoadRequest,
    into: Into,
    names: Sequence[str],
    limits: Limits,
    use: Use,
    cancel: CancelToken,
    observer: Observer | None,
) -> StreamedBlocks:
    """Load the rest of the module, and have its blocks come."""
    with LoadSession(cancel=cancel, observer=observer) as session, ExitStack() as resources:
        checkpoint = session.open(request)
        if not is_planned(checkpoint):
            reason, remedy = "is a pickle that only torch can read", "save it as safetensors, or use load_into"
            raise CheckpointError.because(reason, remedy, path=checkpoint.path)
        binding, cached = make_binding(request, checkpoint, into), None
        if use.cache:
            checkpoint, cached = find_converted(checkpoint, binding.request.policy, use.cache_dir, resources)
            binding = make_binding(request, checkpoint, into)
        decision, facts = _decide(binding, checkpoint, names, limits, use.workspace)
        plan = session.plan(replace(binding.request, names=decision.resident), checkpoint)
        with current(facts.device):
            workspace = _join(resources, decision, facts, use.workspace)
            transfer = session.run(plan)
            schedule, source = _begin(resources, decision, checkpoint, workspace)
            with session.span("assign"):
                notes = binding.bind(transfer.tensors | _views(decision, workspace.device), facts.device)
        load = session.result(plan, transfer, warnings=notes).report
        report = partial(_report, decision, names, load, source, schedule, cached)
        return _handle(binding, decision, schedule, source, workspace, resources.pop_all(), report, cancel)


def _join(resources: ExitStack, decision: Decision, facts: Facts, shared: Workspace | None) -> Workspace:
    """Make the buffers, or join those that have some."""
    ledger = Ledger() if shared is None else shared.ledger
    if shared is not None and shared.shared() is not None:
        workspace = shared
    else:
        workspace = Workspace(_make_device(decision, facts), facts.device, CHUNK_BYTES, ledger)
    workspace.join()
    resources.callback(workspace.leave)
    workspace.reserve(decision.scratch_nbytes, decision.scratch_nbytes + decision.half_done_nbytes)
    me = object()
    resources.callback(ledger.strike, me)
    ledger.note(me, decision.held)
    return workspace


def _begin(
    resources: ExitStack, decision: Decision, checkpoint: Checkpoint, workspace: Workspace
) -> tuple[Schedule, FileSource]:
    """Have the first blocks come, unless another module's are in the buffers."""
    device, n_blocks, n_buffers = workspace.device, len(decision.layouts), decision.split.n_buffers
    scales = _scales(decision.layouts, checkpoint, workspace.device_name)
    device.synchronize()  # before another stream uses them
    source = FileSource(
        checkpoint.files,
        decision.layouts,
        device,
        workspace.slots,
        pinned=decision.pinned,
        transport=decision.transport,
        course=course(n_blocks, n_buffers),
        scales=scales,
    )
    resources.callback(source.close)
    schedule = Schedule(n_blocks, n_buffers, device, source, workspace.occupancy)
    resources.callback(schedule.close)
    schedule.start()
    return schedule, source


def _decide(
    binding: Binding, checkpoint: Checkpoint, names: Sequence[str], limits: Limits, shared: Workspace | None
) -> tuple[Decision, Facts]:
    """Ask the system what must be known of it, and decide."""
    request, found, into = binding.request, binding.found, binding.into
    assert found is not None
    assert into is not None
    wanted = request.select(checkpoint)
    request.policy.check(checkpoint, wanted)
    parameters = frozenset(name for name, _ in into.module.named_parameters(remove_duplicate=False))
    layouts = lay_out_all(names, found, parameters, checkpoint, request.policy)
    in_blocks = tuple(place.name for layout in layouts for place in layout.places)
    facts = probe(checkpoint, replace(request, names=in_blocks))
    if shared is not None and shared.device_name != facts.device:
        reason = f"the blocks to share with lie on {shared.device_name}, these are for {facts.device}"
        raise OptionError.because(reason, "stream both on one device, or share nothing")
    decision = decide(
        layouts,
        wanted,
        checkpoint,
        request.policy,
        facts,
        limits,
        io=request.io,
        chunk_nbytes=_SCRATCH_BYTES,
        shared=None if shared is None else shared.shared(),
        taken=Held() if shared is None else shared.ledger.total(),
    )
    return decision, facts


def _make_device(decision: Decision, facts: Facts) -> StreamDevice:
    n_buffers, nbytes = decision.split.n_buffers, decision.split.buffer_nbytes
    if not facts.cuda:
        return HostStreamDevice(n_buffers, nbytes)
    from wan_loader.streaming.cuda_device import CudaStreamDevice

    return CudaStreamDevice(int(facts.device.partition(":")[2]), n_buffers, nbytes)


def _scales(layouts: Sequence[BlockLayout], checkpoint: Checkpoint, device: str) -> dict[str, torch.Tensor]:
    """Load what the scaled tensors of all blocks are multiplied by, in float32: it stays on the device."""
    scaled = {one.value.name: one.scale for layout in layouts for one in layout.quantised if one.scale is not None}
    if not scaled:
        return {}
    wanted = {scale.name: scale for scale in scaled.values()}
    request = LoadRequest(source=replace(checkpoint, tensors=tuple(wanted.values()), quantised={}), owned=True)
    held = {name: tensor.float().reshape(-1).to(device) for name, tensor in read_tensors(request).items()}
    return {name: held[scale.name] for name, scale in scaled.items()}


def _views(decision: Decision, device: StreamDevice) -> dict[str, torch.Tensor]:
    """Return each streamed tensor, by its name in the checkpoint: a view of the buffer that it always comes to."""
    views: dict[str, torch.Tensor] = {}
    for number, layout in enumerate(decision.layouts):
        buffer = device.buffers[number % decision.split.n_buffers]
        for place in layout.places:
            flat = buffer[place.start : place.start + place.nbytes].view(torch_dtype(place.dtype))
            views[place.name] = flat.view(place.shape)
    return views


def _handle(
    binding: Binding,
    decision: Decision,
    schedule: Schedule,
    source: FileSource,
    workspace: Workspace,
    resources: ExitStack,
    report: Callable[[], StreamReport],
    cancel: CancelToken,
) -> StreamedBlocks:
    """Put the hooks in place."""
    from wan_loader.streaming.handle import StreamedBlocks, take_parameters

    assert binding.into is not None
    assert binding.found is not None
    module, slots = binding.into.module, binding.found.slots
    return StreamedBlocks(
        module,
        {
            layout.name: take_parameters(module, [name for place in layout.places for name in slots[place.name]])
            for layout in decision.layouts
        },
        schedule,
        check_files=source.check_unchanged,
        workspace=workspace,
        resources=resources,
        report=report,
        cancel=cancel,
    )


def _report(
    decision: Decision,
    names: Sequence[str],
    load: LoadReport,
    source: FileSource,
    schedule: Schedule,
    cached: CacheReport | None,
) -> StreamReport:
    travel = source.travel()
    return StreamReport(
        load=load,
        blocks=tuple(names),
        streamed=tuple(layout.name for layout in decision.layouts),
        n_buffers=decision.split.n_buffers,
        buffer_nbytes=decision.split.buffer_nbytes,
        device_nbytes=decision.split.nbytes,
        n_mapped=travel[Transport.MAPPED][0],
        nbytes_mapped=travel[Transport.MAPPED][1],
        n_direct=travel[Transport.DIRECT][0],
        nbytes_direct=travel[Transport.DIRECT][1],
        n_buffered=travel[Transport.BUFFERED][0],
        nbytes_buffered=travel[Transport.BUFFERED][1],
        pinned_nbytes=source.pinned_nbytes,
        read_rate=source.read_rate(),
        cache=cached,
        reason=decision.reason,
        n_fetched=schedule.n_fetched,
        n_late=schedule.n_late,
        warnings=tuple(dict.fromkeys(source.fallbacks)),
    )
