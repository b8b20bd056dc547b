"""The public call: a module whose blocks stay in the checkpoint's files, and come to the device as it runs.

Every value is checked here; `steps` does the rest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from wan_loader.arguments import check_cache, check_cancel, check_module, check_observer, checked_count, checked_strings
from wan_loader.cancel import CancelToken
from wan_loader.devices.resolve import import_torch
from wan_loader.dtypes import dtype_name
from wan_loader.errors import OptionError
from wan_loader.loading.bind import Into
from wan_loader.loading.fill_module import is_distributed
from wan_loader.plan.dtype_policy import DtypePolicy
from wan_loader.plan.request import LoadRequest
from wan_loader.sizes import parse_size
from wan_loader.streaming.decision import Limits
from wan_loader.streaming.steps import Use, stream

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from wan_loader.events import Observer
    from wan_loader.formats import Checkpoint
    from wan_loader.loading.match import KeyMap
    from wan_loader.streaming.handle import StreamedBlocks
    from wan_loader.streaming.workspace import Workspace
    from wan_loader.types import IoMode, StrPath

__all__ = ["stream_blocks"]

_MAX_BUFFERS = 64


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
    use = Use(_checked_share(share), cache, cache_dir)
    return stream(request, into, names, limits, use, cancel or CancelToken(), observer)


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
