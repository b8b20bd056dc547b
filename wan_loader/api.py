"""The public calls: `load_file` for a dict of tensors, `load_into` for a module."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from wan_loader.arguments import (
    check_cache,
    check_flag,
    check_group,
    check_key_map,
    check_module,
    check_observer,
    checked_paths,
    checked_strings,
)
from wan_loader.distributed.shard_group import joined
from wan_loader.dtypes import dtype_name
from wan_loader.errors import CacheError, CheckpointError, KeyMismatchError, OptionError
from wan_loader.formats import open_checkpoint
from wan_loader.loading.filling import Filling
from wan_loader.loading.mismatch import some
from wan_loader.loading.run import Choice, LoadOptions, load_checkpoint
from wan_loader.plan.dtype_policy import DtypePolicy

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import torch
    from torch.distributed import ProcessGroup

    from wan_loader.cache.cached_load import CacheOptions
    from wan_loader.distributed.shard_group import ShardGroup
    from wan_loader.events import Observer
    from wan_loader.formats.facts import Checkpoint, TensorFacts
    from wan_loader.loading.bind import KeyMap
    from wan_loader.loading.report import CacheReport, LoadReport
    from wan_loader.loading.result import LoadResult
    from wan_loader.types import IoMode, StrPath

__all__ = ["load", "load_file", "load_into"]


def load_file(
    path: StrPath | Sequence[StrPath],
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
    group: ProcessGroup | None = None,
    observer: Observer | None = None,
) -> dict[str, torch.Tensor]:
    """Load a checkpoint into a dict of tensors: `safetensors.torch.load_file` and `torch.load` in one, and faster.

    path: a file of safetensors or torch.save, a *.index.json, a directory holding one checkpoint, a list of files, or a
        repository in the hub's cache as OWNER/NAME. A shard is that file alone, as for `safetensors.torch.load_file`;
        its index, its directory, or a pattern (`model-*-of-00002.safetensors`) means all of them.
    device: "cpu", "cuda" (the current device), "cuda:N", "auto", an index, or a torch.device.
    dtype: floating tensors are converted to it on the target, bit for bit as `.to(dtype)` does; None keeps the file's.
    part: of a torch file that nests dicts, the dict to load, by its keys joined by dots: "state_dict", "model.ema".
    names: only these tensors, the most urgent first; None loads all, in file order, which is fastest.
    keep_fp32: with a dtype, tensors whose dotted name contains one of these parts become float32.
    io: "auto" chooses from what lies in the page cache; "mapped", "direct", "buffered" force one way.
    threads: reads side by side, 1 to 64 (of which the C library runs 20); None chooses.
    cache: keep the converted tensors in the converted cache, and read them from there as long as the source is
        unchanged. The entry is written in the background from what was loaded: the process waits for it at exit.
        Where the cache cannot be used, the source is loaded, and a warning in the report says why.
    cache_dir: where the cache is; None takes the user's cache directory.
    verify: check a cache entry against its checksums while it is read; a damaged one is set aside and built again.
        Like cache_dir, it is an `OptionError` without cache=True.
    group: processes of torch.distributed that all make this call, such as `torch.distributed.group.WORLD`: each reads
        its part of every tensor, they exchange, and each returns all tensors. The bytes are read once in all. Not
        with cache=True: an entry is what one process loads.
    observer: told of each span of work, from several threads.

    Returns contiguous tensors (strides and shared storages as in the file for .pth), each owning its memory. On the
    CPU, tensors of safetensors files that need no conversion are private mappings of the file, as safetensors' own are:
    free, lazily read, and writable without changing the file, but if the file is later rewritten in place (not
    replaced), they may change with it, and if it is shortened, using them ends the process. io="buffered" copies, and
    io="mapped" maps tensors of a .pth, too, which otherwise are copied, so that it may be saved over itself. A file
    that changes while it is loaded is an error; only stores through somebody's mapping of it cannot always be seen.
    On CUDA, everything has arrived when this returns. Staging takes at most 512 MiB of host memory.

    Raises `CheckpointError`, `MissingFileError`, `DeviceError`, `DeviceMemoryError`, `HostMemoryError`, `OptionError`
    (for arguments that make no sense, such as an open file in place of its path); then nothing stays allocated. With a
    group also `DistributedError`: another process failed or is gone, which is noticed within ten seconds once it has
    come here (before, only if it exits by itself: a killed one is waited for, ten minutes at most), or sees another
    checkpoint. A CPU load of a group copies, it maps nothing.
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
        group=group,
        observer=observer,
    ).tensors


def load(
    path: StrPath | Sequence[StrPath],
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
    group: ProcessGroup | None = None,
    observer: Observer | None = None,
) -> LoadResult:
    """As `load_file`, and returns the report along with the tensors, and the cache entry that is being written."""
    check_group(group)
    with joined(group) as shard_group:
        options = _options(device, io, threads, observer, shard_group)
        caching = _caching(cache, cache_dir, verify, shard_group)
        rule = DtypePolicy(dtype_name(dtype), checked_strings(keep_fp32, "keep_fp32"))
        paths = checked_paths(path)
        wanted = None if names is None else checked_strings(names, "names")

        def choose() -> Choice:
            checkpoint = open_checkpoint(paths, part=part)
            tensors = checkpoint.tensors if wanted is None else _select(checkpoint, wanted)
            return _choice(checkpoint, tensors, rule, shard_group, {})

        return _load(choose, options, caching)


def _options(
    device: str | int | torch.device,
    io: str,
    threads: int | None,
    observer: Observer | None,
    shard_group: ShardGroup | None,
) -> LoadOptions:
    check_observer(observer)
    if shard_group is not None:
        device, observer = shard_group.device(device), shard_group.watch(observer)
    return LoadOptions(device=device, io=io, threads=threads, observer=observer, shard_group=shard_group)


def _caching(
    cache: bool, cache_dir: StrPath | None, verify: bool, shard_group: ShardGroup | None
) -> CacheOptions | None:
    """What a load may do with the cache, whose modules are imported where it is wanted only."""
    check_cache(cache=cache, cache_dir=cache_dir, verify=verify)
    if not cache:
        return None
    if shard_group is not None:
        raise OptionError(
            "the converted cache is for one process, and several load together: leave out cache (--cache)"
        )
    from wan_loader.cache.cached_load import CacheOptions

    return CacheOptions(directory=cache_dir, verify=verify)


def _choice(
    checkpoint: Checkpoint,
    tensors: Sequence[TensorFacts],
    rule: DtypePolicy,
    shard_group: ShardGroup | None,
    targets: Mapping[str, torch.Tensor],
) -> Choice:
    """What this process loads: everything, or what it keeps as a member of a team. targets: the module's tensors."""
    if notes := rule.check(checkpoint, tensors):
        checkpoint = replace(checkpoint, warnings=(*checkpoint.warnings, *notes))
    if shard_group is None:
        return Choice(checkpoint, tensors, rule)
    mine = shard_group.divide(checkpoint, tensors, targets, rule)
    return Choice(mine.checkpoint, mine.tensors, rule)


def _load(
    choose: Callable[[], Choice],
    options: LoadOptions,
    cache: CacheOptions | None,
    bind: Callable[[dict[str, torch.Tensor], torch.device], list[str]] | None = None,
) -> LoadResult:
    """Load through the cache, if that is wanted; an entry that turns out to be damaged is not the end."""
    if cache is None:
        return load_checkpoint(choose, options, bind)
    from wan_loader.cache.cached_load import CachedLoad

    with CachedLoad(cache, options.device) as cached:
        try:
            loaded = load_checkpoint(lambda: cached.choose(choose()), options, bind)
        except (CacheError, CheckpointError) as error:
            if not cached.hit:
                raise
            cached.set_aside(error)
            loaded = load_checkpoint(lambda: cached.choose(choose()), options, bind)
        build = cached.keep(loaded.tensors)
    report = partial(_with_cache, loaded.make_report, cached.report, tuple(cached.warnings))
    return replace(loaded, tensors=cached.in_order(loaded.tensors), make_report=report, build=build)


def _with_cache(make: Callable[[], LoadReport], cache: CacheReport | None, warnings: tuple[str, ...]) -> LoadReport:
    report = make()
    return replace(report, cache=cache, warnings=(*report.warnings, *warnings))


def _select(checkpoint: Checkpoint, names: Sequence[str]) -> list[TensorFacts]:
    by_name = {tensor.name: tensor for tensor in checkpoint.tensors}
    if missing := [name for name in names if name not in by_name]:
        message = f"{checkpoint.path} lacks {len(missing)} of the names asked for: {some(missing)}"
        raise KeyMismatchError(message, missing=missing)
    return [by_name[name] for name in dict.fromkeys(names)]


def load_into(
    module: torch.nn.Module,
    path: StrPath | Sequence[StrPath],
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
    group: ProcessGroup | None = None,
    observer: Observer | None = None,
) -> LoadReport:
    """Fill a module's parameters and persistent buffers from a checkpoint, in place.

    module: may be empty (build it under `with wan_loader.empty_weights()`: no memory, no random initialisation).
        What is one object under several names stays so; classes of parameters, their attributes and `requires_grad`
        are kept. Parameters may be DTensors (after FSDP2's `fully_shard`): then every process of their mesh makes this
        call, reads the rows that it keeps and nothing else, and never holds a whole tensor; what several processes
        keep, they read in parts and exchange.
    device: as for `load_file`. What the module holds beside its weights goes there, too, in its own dtype, so that the
        module runs there: non-persistent buffers, what `strict=False` left as it was, and tensors in plain attributes
        (also in a list, tuple or dict that is an attribute; not in modules that are hidden in one).
    key_map: checkpoint name -> module name, as a mapping (names not in it stay) or a function; a name mapped to None
        is left out.
    strict: missing or unexpected names are an error. Wrong shapes always are.
    allow_meta: a module that would keep something on the meta device (a buffer or attribute that is in no checkpoint,
        a parameter that is not in this one) cannot run and is an error, unless the dotted name contains one of these
        parts: "rope" and "rope.freqs" both allow `blocks.0.rope.freqs`. It is told in the report, for you to fill.
    keep_fp32: with a dtype, tensors whose dotted name in the module contains one of these parts become float32. A
        part that no name contains is a warning in the report.
    group: the processes that make this call; None: those of the module's DTensors, else this one alone. With a group,
        tensors that are no DTensors are read in parts and exchanged, as for `load_file`. With a group or DTensors,
        cache=True is an `OptionError`.
    dtype, part, io, threads, cache, cache_dir, verify, observer: as for `load_file`.

    Raises `KeyMismatchError` before any weight is read, whose fields hold all missing, unexpected and mis-shaped names
    and those that would stay on meta, and what `load_file` raises; the module is changed only when everything has
    arrived.
    """
    check_module(module)
    check_group(group)
    with joined(group, module) as shard_group:
        options = _options(device, io, threads, observer, shard_group)
        caching = _caching(cache, cache_dir, verify, shard_group)
        rule = DtypePolicy(dtype_name(dtype), checked_strings(keep_fp32, "keep_fp32"))
        check_key_map(key_map)
        check_flag(strict, "strict")
        paths, allowed = checked_paths(path), checked_strings(allow_meta, "allow_meta")
        filling = Filling(module=module, key_map=key_map, strict=strict, allow_meta=allowed)

        def choose() -> Choice:
            checkpoint = open_checkpoint(paths, part=part)
            try:
                filling.match(checkpoint)
            except KeyMismatchError:
                rule.check(checkpoint, checkpoint.tensors)  # scales are not the module's: this says more
                raise
            module_names = {name: names[0] for name, names in filling.found.slots.items()}
            named = replace(rule, module_names=module_names)
            return _choice(checkpoint, filling.found.facts, named, shard_group, filling.targets)

        def bind(tensors: dict[str, torch.Tensor], device: torch.device) -> list[str]:
            filling.bind(tensors, device)
            return filling.notes(rule)

        return _load(choose, options, caching, bind).report
