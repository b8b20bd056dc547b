"""The public call: a module whose blocks stay in the checkpoint's files, and come to the device as it runs.

    request -> open -> pair -> lay out, split -> load the rest -> buffers, source, schedule -> bind, hooks

A wrapper around a load: the steps are those of `load_into`, with some between them.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from wan_loader.arguments import check_cache, check_cancel, check_module, check_observer, checked_count, checked_strings
from wan_loader.cancel import CancelToken
from wan_loader.devices.resolve import current, import_torch
from wan_loader.dtypes import dtype_name, torch_dtype
from wan_loader.errors import CheckpointError, OptionError
from wan_loader.formats.known_formats import is_planned
from wan_loader.loading.bind import Into, make_binding
from wan_loader.loading.fill_module import is_distributed
from wan_loader.loading.load_session import LoadSession
from wan_loader.loading.probe import probe
from wan_loader.loading.run import read_tensors
from wan_loader.plan.blocks import Transport
from wan_loader.plan.dtype_policy import DtypePolicy
from wan_loader.plan.request import LoadRequest
from wan_loader.sizes import parse_size
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

    from wan_loader.events import Observer
    from wan_loader.formats import Checkpoint
    from wan_loader.loading.bind import Binding
    from wan_loader.loading.match import KeyMap
    from wan_loader.loading.report import CacheReport, LoadReport
    from wan_loader.plan.facts import Facts
    from wan_loader.streaming.blocks import BlockLayout
    from wan_loader.streaming.decision import Decision
    from wan_loader.streaming.device import StreamDevice
    from wan_loader.streaming.handle import StreamedBlocks
    from wan_loader.types import IoMode, StrPath

__all__ = ["stream_blocks"]

_MAX_BUFFERS = 64
#: A converted segment is a chunk long at most, or less than one element more.
_SCRATCH_BYTES = CHUNK_BYTES + 512


def stream_blocks(
    module: torch.nn.Module,
    path: StrPath | Sequence[StrPath] | Checkpoint,
    blocks: str = "blocks",
    *,
    device: str | int | torch.device,
    dtype: torch.dtype | str | None = None,
    buffers: int = 3,
    device_memory: int | str | None = None,
    pinned_memory: int | str | None = None,
    host_memory: int | str | None = None,
    share: StreamedBlocks | None = None,
    part: str | None = None,
    key_map: KeyMap | None = None,
    strict: bool = True,
    allow_meta: Sequence[str] = (),
    keep_fp32: Sequence[str] = (),
    io: IoMode = "auto",
    threads: int | None = None,
    cache: bool = False,
    cache_dir: StrPath | None = None,
    cancel: CancelToken | None = None,
    observer: Observer | None = None,
) -> StreamedBlocks:
    """Fill a module as `load_into` does, but keep its repeated blocks in the files: each comes just before it runs.

    A device then needs room for a few blocks rather than for all. While one block computes, the next are copied, so
    where a block's computation takes longer than its copy, a forward takes hardly longer than with everything on the
    device; the results are the same, bit for bit.

        with wan_loader.empty_weights():
            model = WanTransformer3DModel.from_config(config)
        with wan_loader.stream_blocks(model, "transformer", device="cuda", dtype="bf16") as streamed, torch.no_grad():
            for latents in steps:
                model(latents)
            print(streamed.report)

    The blocks' parameters are in the module only while their block runs, and stand-ins at all other times: these have
    shape, dtype and device, and every use of their values is an error. What is no parameter of one block alone (buffers
    of the module, weights that blocks share) stays on the device, as everything outside of the blocks does.

    Args:
        module: As for `load_into`; all in one process.
        path: As for `load_file`; not a pickle that only torch can read. The files must stay as they are.
        blocks: The dotted name of the module that holds the blocks, such as a `torch.nn.ModuleList`. They may run in
            any order; in theirs, again and again, they come in time.
        device: As for `load_file`. On the CPU, everything happens at once: for tests.
        dtype: As for `load_file`; conversions happen on the device, each time. So what is quantised stays small in its
            file and on the link.
        buffers: How many streamed blocks have room on the device, 1 to 64: one computes while the others come. Block i
            always has buffer i modulo this. Where the number of streamed blocks is a multiple of it, forwards that
            follow each other do so without a gap.
        device_memory: The bytes that weights may take on the device, or a text such as "12GB": those of the whole
            module, buffers included. As many blocks stay there as fit; None: none does. What computation takes comes on
            top.
        pinned_memory: The bytes of the page cache that may be pinned for the device, so that the host has nothing to do
            but to queue copies; None: half of the memory that is allowed here. Of blocks beyond that, the bytes are
            read each time, by a thread.
        host_memory: The bytes of the page cache that may be relied upon, pinned ones included; None: three quarters of
            the memory that is available now. Blocks beyond that are read from the disk in each forward, past the page
            cache, ahead of the computation: a forward that takes longer than these reads hides them. The report says
            what they cost, before the first forward. The slots that bytes pass through come on top: 400 MB.
        share: Another module's streamed blocks, whose buffers on the device these use, too: for modules of which one
            runs at a time, such as two experts. The limits then count what all of them hold, buffers once. The first
            block of a module that runs after another one is waited for. Each may be closed at any time.
        part: As for `load_file`.
        key_map: As for `load_into`.
        strict: As for `load_into`.
        allow_meta: As for `load_into`.
        keep_fp32: As for `load_into`.
        io: As for `load_file`. For the streamed blocks, "mapped" is what "auto" prefers; "direct" and "buffered" read
            all of them each time.
        threads: As for `load_file`, for what stays on the device.
        cache: Stream from the entry of the converted cache, if there is one: of a checkpoint in float32 that is wanted
            in bfloat16, half the bytes. If there is none, conversions happen each time, and the report says so.
        cache_dir: The directory of the cache; None takes the user's cache directory.
        cancel: As for `load_file`. Also asked by each streamed block: a forward that was cancelled raises.
        observer: As for `load_file`, for what stays on the device.

    Returns:
        The handle: a context manager whose `close` gives back buffers, pinned pages, threads and files, and after which
        the blocks cannot run. The module may also be used without a reference to it. A forward raises `CheckpointError`
        at its end if a file was replaced or modified since it was opened, and `OptionError` where autograd would keep
        streamed weights.

    Raises:
        OptionError: An argument makes no sense, `blocks` names nothing with blocks, or `share` is closed, lies on
            another device, or has smaller buffers.
        CheckpointError: As for `load_file`, or the checkpoint is a pickle that cannot be planned.
        KeyMismatchError: As for `load_into`.
        DeviceMemoryError: `device_memory` is too little even with every block streamed, or the device has no room.
        HostMemoryError: As for `load_file`.
        DeviceError: The device does not exist or cannot be used.
        LoadCancelledError: `cancel` was cancelled.
    """
    check_module(module)
    check_cancel(cancel)
    check_observer(observer)
    check_cache(cache=cache, cache_dir=cache_dir)
    request = LoadRequest(
        source=path,
        device=device,
        policy=DtypePolicy(dtype_name(dtype), checked_strings(keep_fp32, "keep_fp32")),
        part=part,
        io=io,
        threads=threads,
        makes_values=True,
    )
    limits = Limits(
        buffers=checked_count(buffers, "buffers", most=_MAX_BUFFERS),
        device=_checked_size(device_memory, "device_memory"),
        pinned=_checked_size(pinned_memory, "pinned_memory"),
        host=_checked_size(host_memory, "host_memory"),
    )
    import_torch()
    into = Into(module=module, key_map=key_map, strict=strict, allow_meta=tuple(allow_meta))
    names = _block_names(module, blocks)
    use = _Use(_checked_share(share), cache, cache_dir)
    return _stream(request, into, names, limits, use, cancel or CancelToken(), observer)


class _Use(NamedTuple):
    """What the blocks may use that is there already."""

    workspace: Workspace | None
    cache: bool
    cache_dir: StrPath | None


def _checked_share(share: object) -> Workspace | None:
    """Return what is to be shared."""
    if share is None:
        return None
    from wan_loader.streaming.handle import StreamedBlocks

    if not isinstance(share, StreamedBlocks):
        raise OptionError.because(f"share is {type(share).__name__}", "pass what stream_blocks has returned")
    if share.closed:
        raise OptionError.because("the blocks that are to be shared with are closed", "share with some that are not")
    return share.workspace


def _checked_size(size: int | str | None, what: str) -> int | None:
    """Return bytes; None stays None."""
    return parse_size(size) if isinstance(size, str) else None if size is None else checked_count(size, what, least=0)


def _block_names(module: torch.nn.Module, blocks: object) -> list[str]:
    """Return the dotted names of the blocks; `OptionError` where there are none."""
    if is_distributed(module):
        raise OptionError("the module lies on several processes (DTensors): stream a module that lies on one")
    try:
        names = [f"{blocks}.{name}" for name, _ in module.get_submodule(str(blocks)).named_children()]
    except AttributeError:
        names = []
    if not names or not blocks:
        lists = [name for name, one in module.named_modules() if name and type(one).__name__ == "ModuleList"]
        remedy = f"pass one of {', '.join(lists[:5])}" if lists else "pass the dotted name of a list of modules"
        raise OptionError.because(f"blocks={blocks!r:.60} names no list of modules in the module", remedy)
    return names


def _stream(
    request: LoadRequest,
    into: Into,
    names: Sequence[str],
    limits: Limits,
    use: _Use,
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
