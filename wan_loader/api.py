"""The public calls.

`load_file` for a dict of tensors, `load_into` for a module, `load` for the report as well; `iter_file` for tensors as
they arrive, `open_file` for single ones.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Literal, NamedTuple

from wan_loader.arguments import (
    check_cache,
    check_cancel,
    check_group,
    check_keep,
    check_module,
    check_observer,
    checked_slices,
    checked_strings,
)
from wan_loader.devices.resolve import import_torch
from wan_loader.dtypes import dtype_name
from wan_loader.errors import OptionError
from wan_loader.loading.bind import Into, bind, make_binding
from wan_loader.loading.fill_module import is_distributed
from wan_loader.loading.handle import CheckpointHandle
from wan_loader.loading.iterate import iterate
from wan_loader.loading.load_session import LoadSession
from wan_loader.loading.report import KeptReport
from wan_loader.plan.dtype_policy import DtypePolicy
from wan_loader.plan.request import LoadRequest

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import torch
    from torch.distributed import ProcessGroup

    from wan_loader.cancel import CancelToken
    from wan_loader.events import Observer
    from wan_loader.formats import Checkpoint
    from wan_loader.loading.iterate import TensorIterator
    from wan_loader.loading.match import KeyMap
    from wan_loader.loading.report import LoadReport
    from wan_loader.loading.result import LoadResult
    from wan_loader.types import IoMode, Slices, StrPath

__all__ = ["bind", "iter_file", "load", "load_file", "load_into", "open_file"]


def load_file(
    path: StrPath | Sequence[StrPath] | Checkpoint,
    device: str | int | torch.device = "cpu",
    *,
    dtype: torch.dtype | str | None = None,
    part: str | None = None,
    names: Sequence[str] | None = None,
    keep_fp32: Sequence[str] = (),
    io: IoMode = "auto",
    threads: int | None = None,
    cache: bool = False,
    cache_dir: StrPath | None = None,
    verify: bool = False,
    keep: bool | Literal["copy"] = False,
    group: ProcessGroup | None = None,
    cancel: CancelToken | None = None,
    observer: Observer | None = None,
) -> dict[str, torch.Tensor]:
    """Load a checkpoint into a dict of tensors: `safetensors.torch.load_file` and `torch.load` in one, and faster.

    After an error nothing stays allocated. On CUDA, everything has arrived when this returns. The pinned ring takes at
    most 512 MiB of host memory.

    Args:
        path: A checkpoint from `open_checkpoint`, whose headers are then not read again; or what that takes: a file of
            safetensors, torch.save or GGUF, a *.index.json, a directory holding one checkpoint, a list of files, or a
            repository in the hub's cache as OWNER/NAME. A shard is that file alone, as for
            `safetensors.torch.load_file`; its index, its directory, or a pattern (`model-*-of-00002.safetensors`) means
            all of them.
        device: "cpu", "cuda" (the current device), "cuda:N", "auto", an index, or a torch.device.
        dtype: Floating tensors are converted to it on the device, bit for bit as `.to(dtype)` does, and quantised ones
            (GGUF, eight-bit floats with scales) become the numbers that they stand for, rounded once; None keeps the
            file's: of GGUF, uint8 tensors of its blocks.
        part: The dict to load, of a torch file that nests dicts, by its keys joined by dots: "state_dict", "model.ema".
        names: Only these tensors, the most urgent first; None loads all, in file order, which is fastest.
        keep_fp32: With a dtype, tensors whose dotted name contains one of these parts become float32.
        io: "auto" chooses from what lies in the page cache; "mapped", "direct", "buffered" force one transport.
        threads: Reads side by side, 1 to 64 (of which the C library runs 20); None chooses.
        cache: Keep the converted tensors in the converted cache, and read them from there as long as the source is
            unchanged. The entry is written in the background from what was loaded: the process waits for it at exit.
            Where the cache cannot be used, the source is loaded, and a warning in the report says why.
        cache_dir: The directory of the cache; None takes the user's cache directory.
        verify: Check a cache entry against its checksums while it is read; a damaged one is set aside and built again.
            Like cache_dir, it is an `OptionError` without cache=True.
        keep: Take the tensors from what `wan_loader.keep` has left in the device's memory, if it was asked for the same
            checkpoint, dtype and device; nothing is read then, and no memory is taken. They are what other programs use
            at the same time, so they must not be written to: where the driver can shield them, who does is ended by an
            error of CUDA; on the CPU, what is written stays with who writes. "copy" makes copies on the device instead,
            which are ordinary tensors. Where nothing is kept, the checkpoint is loaded, and a warning in the report
            says why. Not with a group.
        group: Processes of torch.distributed that all make this call, such as `torch.distributed.group.WORLD`: each
            reads its part of every tensor, they exchange, and each returns all tensors. The bytes are read once in all.
            A CPU load of a group copies, it maps nothing. Not with cache=True: an entry is what one process loads.
        cancel: A token through which another thread can stop the load; it then raises `LoadCancelledError`.
        observer: Told of each span of work, from several threads. One that raises is told no more, and the report has a
            warning. Without one nothing is recorded, and the report has no phases.

    Returns:
        Contiguous tensors (strides and shared storages as in the file for .pth), each owning its memory. On the
        CPU, tensors of safetensors files that need no conversion are private mappings of the file, as safetensors' own
        are: free, lazily read, and writable without changing the file, but if the file is later rewritten in place (not
        replaced), they may change with it, and if it is shortened, using them ends the process. io="buffered" copies,
        and io="mapped" maps tensors of a .pth, too, which otherwise are copied, so that it may be saved over itself. A
        file that changes while it is loaded is an error; only stores through somebody's mapping of it cannot always be
        seen.

    Raises:
        CheckpointError: A file is damaged, foreign, unsafe, or changed while it was read.
        MissingFileError: A file is not there.
        KeyMismatchError: Names that were asked for are not there.
        DeviceError: The device does not exist or cannot be used.
        DeviceMemoryError: The weights do not fit on the device.
        HostMemoryError: There is too little host memory.
        OptionError: An argument makes no sense, such as an open file in place of its path.
        LoadCancelledError: `cancel` was cancelled.
        DistributedError: Another process of the group failed or is gone, which is noticed within ten seconds once it
            has come here (before, only if it exits by itself: a killed one is waited for, ten minutes at most), or sees
            another checkpoint.
    """
    return load(
        path,
        device,
        dtype=dtype,
        part=part,
        names=names,
        keep_fp32=keep_fp32,
        io=io,
        threads=threads,
        cache=cache,
        cache_dir=cache_dir,
        verify=verify,
        keep=keep,
        group=group,
        cancel=cancel,
        observer=observer,
    ).tensors


def load(
    path: StrPath | Sequence[StrPath] | Checkpoint,
    device: str | int | torch.device = "cpu",
    *,
    dtype: torch.dtype | str | None = None,
    part: str | None = None,
    names: Sequence[str] | None = None,
    keep_fp32: Sequence[str] = (),
    io: IoMode = "auto",
    threads: int | None = None,
    cache: bool = False,
    cache_dir: StrPath | None = None,
    verify: bool = False,
    keep: bool | Literal["copy"] = False,
    group: ProcessGroup | None = None,
    cancel: CancelToken | None = None,
    observer: Observer | None = None,
) -> LoadResult:
    """Load a checkpoint as `load_file` does, and return everything that is known of the load.

    Returns:
        The tensors, the report, and the cache entry that is being written, if one is. Arguments and errors are those of
        `load_file`.
    """
    check_group(group)
    with _told_to_all(group, None):
        request = _request(path, device, dtype, keep_fp32, part, names, io, threads)
        use = _Reuse(cache, cache_dir, verify, keep)
        _check(use, group, None, cancel, observer)
    return _load(request, None, use, group, cancel, observer)


@contextmanager
def _told_to_all(group: ProcessGroup | None, module: torch.nn.Module | None) -> Iterator[None]:
    """Let the others of a group know of an error in the body: they wait for this process, which will not come."""
    try:
        yield
    except Exception as error:
        if group is not None or (module is not None and is_distributed(module)):
            from wan_loader.distributed.shared_load import refuse

            refuse(error, group, module)
        raise


def _check(
    use: _Reuse,
    group: ProcessGroup | None,
    into: Into | None,
    cancel: CancelToken | None,
    observer: Observer | None,
) -> None:
    check_observer(observer)
    check_cancel(cancel)
    check_cache(cache=use.cache, cache_dir=use.directory, verify=use.verify)
    check_keep(use.keep, is_shared=_is_shared(group, into))
    if use.cache and _is_shared(group, into):
        reason = "the converted cache is for one process, and several load together"
        raise OptionError.because(reason, "leave out cache (--cache)")


def _is_shared(group: ProcessGroup | None, into: Into | None) -> bool:
    """Return whether several processes load together."""
    return group is not None or (into is not None and is_distributed(into.module))


def _request(
    path: StrPath | Sequence[StrPath] | Checkpoint,
    device: str | int | torch.device,
    dtype: torch.dtype | str | None,
    keep_fp32: Sequence[str],
    part: str | None,
    names: Sequence[str] | None,
    io: str,
    threads: int | None,
) -> LoadRequest:
    """Check everything that was asked for, and import torch.

    Here, because errors that an import catches may keep the frames alive that led to it: none of them holds a weight.
    """
    request = LoadRequest(
        source=path,
        device=device,
        policy=DtypePolicy(dtype_name(dtype), checked_strings(keep_fp32, "keep_fp32")),
        part=part,
        names=None if names is None else checked_strings(names, "names"),
        io=io,
        threads=threads,
        makes_values=True,
    )
    import_torch()
    return request


class _Reuse(NamedTuple):
    """The arguments about what may take the place of the source: the converted cache, and weights that are kept."""

    cache: bool
    directory: StrPath | None
    verify: bool
    keep: bool | Literal["copy"]


def _load(
    request: LoadRequest,
    into: Into | None,
    use: _Reuse,
    group: ProcessGroup | None,
    cancel: CancelToken | None,
    observer: Observer | None,
) -> LoadResult:
    """Load alone, or through one of the wrappers around a load, whose modules are imported where they are wanted."""
    if _is_shared(group, into):
        from wan_loader.distributed.shared_load import load_together

        return load_together(request, into, group, cancel=cancel, observer=observer)
    if use.keep:
        from wan_loader.keeper.attach import NotKept, load_kept

        found = load_kept(request, into, copy=use.keep == "copy", cancel=cancel, observer=observer)
        if not isinstance(found, NotKept):
            return found
        request, use = replace(request, source=found.checkpoint), use._replace(keep=False)
        loaded = _load(request, into, use, group, cancel, observer)
        warnings = (*loaded.warnings, f"not attached to kept weights: {found.reason}")
        return replace(loaded, kept=KeptReport("source", found.reason), warnings=warnings)
    if use.cache:
        from wan_loader.cache.cached_load import load_cached

        return load_cached(request, into, use.directory, verify=use.verify, cancel=cancel, observer=observer)
    with LoadSession(cancel=cancel, observer=observer) as session:
        checkpoint = session.open(request)
        binding = make_binding(request, checkpoint, into)
        plan = session.plan(binding.request, checkpoint)
        transfer = session.run(plan)
        with session.span("assign"):
            notes = binding.bind(transfer.tensors, plan.facts.device)
        return session.result(plan, transfer, warnings=notes)


def load_into(
    module: torch.nn.Module,
    path: StrPath | Sequence[StrPath] | Checkpoint,
    *,
    device: str | int | torch.device,
    dtype: torch.dtype | str | None = None,
    part: str | None = None,
    key_map: KeyMap | None = None,
    strict: bool = True,
    allow_meta: Sequence[str] = (),
    keep_fp32: Sequence[str] = (),
    io: IoMode = "auto",
    threads: int | None = None,
    cache: bool = False,
    cache_dir: StrPath | None = None,
    verify: bool = False,
    keep: bool | Literal["copy"] = False,
    group: ProcessGroup | None = None,
    cancel: CancelToken | None = None,
    observer: Observer | None = None,
) -> LoadReport:
    """Fill a module's parameters and persistent buffers from a checkpoint, in place.

    Args:
        module: May be empty (build it under `with wan_loader.empty_weights()`: no memory, no random initialisation).
            What is one object under several names stays so; classes of parameters, their attributes and `requires_grad`
            are kept. Parameters may be DTensors (after FSDP2's `fully_shard`): then every process of their mesh makes
            this call, reads the rows that it keeps and nothing else, and never holds a whole tensor; what several
            processes keep, they read in parts and exchange.
        path: As for `load_file`.
        device: As for `load_file`. What the module holds beside its weights goes there, too, in its own dtype, so that
            the module runs there: non-persistent buffers, what `strict=False` left as it was, and tensors in plain
            attributes (also in a list, tuple or dict that is an attribute; not in modules that are hidden in one).
        dtype: As for `load_file`.
        part: As for `load_file`.
        key_map: Checkpoint name -> module name, as a mapping (names not in it stay) or a function; a name mapped to
            None is left out.
        strict: Missing or unexpected names are an error. Wrong shapes always are.
        allow_meta: A module that would keep something on the meta device (a buffer or attribute that is in no
            checkpoint, a parameter that is not in this one) cannot run and is an error, unless the dotted name contains
            one of these
            parts: "rope" and "rope.freqs" both allow `blocks.0.rope.freqs`. It is told in the report, for you to fill.
        keep_fp32: With a dtype, tensors whose dotted name in the module contains one of these parts become float32. A
            part that no name contains is a warning in the report.
        io: As for `load_file`.
        threads: As for `load_file`.
        cache: As for `load_file`. With a group or DTensors, True is an `OptionError`.
        cache_dir: As for `load_file`.
        verify: As for `load_file`.
        keep: As for `load_file`. Not with DTensors.
        group: The processes that make this call; None: those of the module's DTensors, else this one alone. With a
            group, tensors that are no DTensors are read in parts and exchanged, as for `load_file`.
        cancel: As for `load_file`.
        observer: As for `load_file`.

    Returns:
        The report. The module is changed only when everything has arrived.

    Raises:
        KeyMismatchError: Before any weight is read; its fields hold all missing, unexpected and mis-shaped names, and
            those that would stay on meta. Other errors are those of `load_file`.
    """
    # first of all: module and group are needed to tell the others of an error in what follows
    check_module(module)
    check_group(group)
    with _told_to_all(group, module):
        request = _request(path, device, dtype, keep_fp32, part, None, io, threads)
        allowed = checked_strings(allow_meta, "allow_meta")
        into = Into(module=module, key_map=key_map, strict=strict, allow_meta=allowed)
        use = _Reuse(cache, cache_dir, verify, keep)
        _check(use, group, into, cancel, observer)
    return _load(request, into, use, group, cancel, observer).report


def iter_file(
    path: StrPath | Sequence[StrPath] | Checkpoint,
    device: str | int | torch.device = "cpu",
    *,
    dtype: torch.dtype | str | None = None,
    part: str | None = None,
    names: Sequence[str] | None = None,
    slices: Mapping[str, Slices] | None = None,
    keep_fp32: Sequence[str] = (),
    io: IoMode = "auto",
    threads: int | None = None,
    cancel: CancelToken | None = None,
    observer: Observer | None = None,
) -> TensorIterator:
    """Load a checkpoint tensor by tensor: each is handed out as soon as it has arrived, while later ones are read.

    This call reads the headers, plans, and raises what can be known to be wrong; the first `next` begins to read. What
    has been read and not been taken is never more than the pinned ring holds (512 MiB at most), what is under way, and
    the tensors that arrived together. A tensor that the caller lets go of is freed, so more may pass through than fits
    into memory (on CUDA, where a dtype was asked for, the memory comes back when the iteration ends). Between two
    tensors the caller may do anything, other loads included; one caller at a time, in any thread.

        with contextlib.closing(wan_loader.iter_file("model.safetensors", "cuda")) as arrivals:
            for name, tensor in arrivals:
                send(name, tensor)

    Closing the generator ends the load within a second: reading stops, files are closed, pinned memory is given back,
    and so are tensors that were not taken. Python closes it by itself once nothing refers to it, as after a `break`
    out of `for name, tensor in iter_file(...)`.

    Args:
        path: As for `load_file`.
        device: As for `load_file`.
        dtype: As for `load_file`.
        part: As for `load_file`.
        names: As for `load_file`. They are read in this order, and arrive nearly in it: reads that run side by side
            may overtake each other by some blocks.
        slices: For some of the tensors, the part that is wanted: a slice of dimension 0, a pair (start, stop) for the
            same, or a tuple of slices, one for each of the first dimensions. Bounds may be negative or beyond the
            end, and steps greater than 1, as in Python. Of dimension 0, only the bytes of these rows are read; of
            others, whatever lies between the first and the last element is read as well, held for a moment, and left
            out. A tensor that shares a storage with others has its own when it is sliced. Pickles that only torch can
            read are read whole, and so are quantised tensors of which numbers are made.
        keep_fp32: As for `load_file`.
        io: As for `load_file`. On CUDA, "mapped" has all tensors arrive together, at the end.
        threads: As for `load_file`.
        cancel: As for `load_file`. From another thread, it is the way to end an iteration.
        observer: As for `load_file`.

    Yields:
        Pairs of name and tensor, each name once, all of its bytes in place on the device for work of any stream. The
        tensors are those that `load_file` returns, views of the mapped file on the CPU included, and slices of them,
        which are contiguous and own no memory beside their elements. Those that share a storage come together. On the
        CPU, views of the file come last.

    Returns:
        The `LoadReport`, as the value of the generator. Its seconds are those of the caller as well.

    Raises:
        CheckpointError: As for `load_file`. That a file was changed while it was read may only be seen at the end: then
            tensors that were handed out before hold bytes of either.
        KeyMismatchError: A name in `names` or `slices` is not there.
        OptionError: An argument makes no sense, or a slice does not: a tensor has too few dimensions (a number has
            none), or a step is not positive.
        DeviceMemoryError: There is no room on the device, if only for the largest tensor.
        HostMemoryError: The same of the host's memory.
        LoadCancelledError: `cancel` was cancelled.
        DeviceError: The device does not exist or cannot be used.
    """
    check_cancel(cancel)
    check_observer(observer)
    request = _request(path, device, dtype, keep_fp32, part, names, io, threads)
    return iterate(replace(request, slices=checked_slices(slices), piecemeal=True), cancel=cancel, observer=observer)


def open_file(
    path: StrPath | Sequence[StrPath] | Checkpoint,
    device: str | int | torch.device = "cpu",
    *,
    dtype: torch.dtype | str | None = None,
    part: str | None = None,
    keep_fp32: Sequence[str] = (),
    io: IoMode = "auto",
    threads: int | None = None,
) -> CheckpointHandle:
    """Open a checkpoint to load single tensors, or slices of them, as `safetensors.safe_open` does.

        with wan_loader.open_file("model.safetensors", "cuda") as file:
            weight = file.get_tensor("weight")
            rows = file.get_slice("weight")[100:200]

    Headers are read once, here; files stay open until the handle is closed. A call costs some microseconds for a small
    tensor, which is read, and on the CPU for a large one of a safetensors file, which is a view of the mapped file.
    Every other large one is a load of its own, with a pinned ring of its own; to load many, ask for them together
    (`get_tensors`), or use `iter_file`. Each call gives the file's values anew, whatever was done to earlier tensors.

    Args:
        path: As for `load_file`: anything that it reads, a directory of shards or a .pth included.
        device: As for `load_file`.
        dtype: As for `load_file`.
        part: As for `load_file`.
        keep_fp32: As for `load_file`.
        io: As for `load_file`.
        threads: As for `load_file`.

    Returns:
        The handle, a context manager. It may be used by several threads.

    Raises:
        CheckpointError: A file is damaged, foreign or unsafe.
        MissingFileError: A file is not there.
        DeviceError: The device does not exist or cannot be used.
        OptionError: An argument makes no sense.
    """
    return CheckpointHandle(_request(path, device, dtype, keep_fp32, part, None, io, threads))
