"""The public calls: `load_file` for a dict of tensors, `load_into` for a module."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from wan_loader.dtypes import dtype_name
from wan_loader.errors import CacheError, CheckpointError, KeyMismatchError
from wan_loader.formats import open_checkpoint
from wan_loader.loader.binding import Match, bind, match
from wan_loader.loader.cached import CachedLoad, CacheOptions
from wan_loader.loader.dtype_rule import DtypeRule
from wan_loader.loader.load import Choice, Loaded, LoadOptions, load_checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

    from wan_loader.events import Observer
    from wan_loader.formats.facts import Checkpoint, TensorFacts
    from wan_loader.loader.binding import KeyMap
    from wan_loader.report import LoadReport
    from wan_loader.types import IoMode, StrPath

__all__ = ["load", "load_file", "load_into"]


def load_file(
    path: StrPath | Sequence[StrPath],
    *,
    device: str | int | torch.device = "cpu",
    dtype: torch.dtype | str | None = None,
    names: Sequence[str] | None = None,
    keep_fp32: Sequence[str] = (),
    io: IoMode = "auto",
    threads: int | None = None,
    cache: bool = False,
    cache_dir: StrPath | None = None,
    verify: bool = False,
    observer: Observer | None = None,
) -> dict[str, torch.Tensor]:
    """Load a checkpoint into a dict of tensors: `safetensors.torch.load_file` and `torch.load` in one, and faster.

    path: a .safetensors, .pth/.pt/.bin file, a *.index.json, a directory holding one checkpoint, or a list of files.
    device: "cpu", "cuda" (the current device), "cuda:N", "auto", an index, or a torch.device.
    dtype: floating tensors are converted to it on the target, bit for bit as `.to(dtype)` does; None keeps the file's.
    names: only these tensors, the most urgent first; None loads all, in file order, which is fastest.
    keep_fp32: with a dtype, tensors whose dotted name contains one of these parts become float32.
    io: "auto" chooses from what lies in the page cache; "mapped", "direct", "buffered" force one way.
    threads: readers, 1 to 64; None chooses.
    cache: keep the converted tensors in the converted cache, and read them from there as long as the source is
        unchanged. The entry is written in the background from what was loaded: the process waits for it at exit.
        Where the cache cannot be used, the source is loaded, and a warning in the report says why.
    cache_dir: where the cache is; None takes the user's cache directory.
    verify: check a cache entry against its checksums while it is read; a damaged one is set aside and built again.
    observer: told of each span of work, from several threads.

    Returns contiguous tensors (strides and shared storages as in the file for .pth), each owning its memory. On the
    CPU, tensors that need no conversion are private mappings of the file: free, lazily read, and writable without
    changing the file; as with any mapping, shortening the file later takes the memory away (io="buffered" copies).
    On CUDA, everything has arrived when this returns. Staging takes at most 512 MiB of host memory.

    Raises `CheckpointError`, `MissingFileError`, `DeviceError`, `DeviceMemoryError`, `HostMemoryError`, `OptionError`;
    then nothing stays allocated.
    """
    return load(
        path,
        device=device,
        dtype=dtype,
        names=names,
        keep_fp32=keep_fp32,
        io=io,
        threads=threads,
        cache=cache,
        cache_dir=cache_dir,
        verify=verify,
        observer=observer,
    ).tensors


def load(
    path: StrPath | Sequence[StrPath],
    *,
    device: str | int | torch.device = "cpu",
    dtype: torch.dtype | str | None = None,
    names: Sequence[str] | None = None,
    keep_fp32: Sequence[str] = (),
    io: IoMode = "auto",
    threads: int | None = None,
    cache: bool = False,
    cache_dir: StrPath | None = None,
    verify: bool = False,
    observer: Observer | None = None,
) -> Loaded:
    """As `load_file`, and returns the report along with the tensors, and the cache entry that is being written."""
    options = LoadOptions(device=device, io=io, threads=threads, observer=observer)
    rule = DtypeRule(dtype_name(dtype), tuple(keep_fp32))

    def choose() -> Choice:
        checkpoint = open_checkpoint(path)
        return Choice(checkpoint, checkpoint.tensors if names is None else _select(checkpoint, names), rule)

    return _load(choose, options, CacheOptions(enabled=cache, directory=cache_dir, verify=verify))


def _load(
    choose: Callable[[], Choice],
    options: LoadOptions,
    cache: CacheOptions,
    bind: Callable[[dict[str, torch.Tensor]], list[str]] | None = None,
) -> Loaded:
    """Load through the cache, if that is wanted; an entry that turns out to be damaged is not the end."""
    with CachedLoad(cache, options.device) as cached:
        try:
            loaded = load_checkpoint(lambda: cached.choose(choose()), options, bind)
        except (CacheError, CheckpointError) as error:
            if not cached.hit:
                raise
            cached.set_aside(error)
            loaded = load_checkpoint(lambda: cached.choose(choose()), options, bind)
        build = cached.keep(loaded.tensors)
    warnings = (*loaded.report.warnings, *cached.warnings)
    report = replace(loaded.report, cache=cached.report, warnings=warnings)
    return replace(loaded, tensors=cached.in_order(loaded.tensors), report=report, build=build)


def _select(checkpoint: Checkpoint, names: Sequence[str]) -> list[TensorFacts]:
    by_name = {tensor.name: tensor for tensor in checkpoint.tensors}
    if missing := [name for name in names if name not in by_name]:
        raise KeyMismatchError(f"{checkpoint.path} lacks {len(missing)} of the names asked for: {', '.join(missing)}")
    return [by_name[name] for name in dict.fromkeys(names)]


def load_into(
    module: torch.nn.Module,
    path: StrPath | Sequence[StrPath],
    *,
    device: str | int | torch.device,
    dtype: torch.dtype | str | None = None,
    key_map: KeyMap | None = None,
    strict: bool = True,
    keep_fp32: Sequence[str] = (),
    io: IoMode = "auto",
    threads: int | None = None,
    cache: bool = False,
    cache_dir: StrPath | None = None,
    verify: bool = False,
    observer: Observer | None = None,
) -> LoadReport:
    """Fill a module's parameters and persistent buffers from a checkpoint, in place.

    module: may be on the meta device (build it under `torch.device("meta")`: no memory, no random initialisation).
        Parameters that are one object under several names stay so; `requires_grad` is kept; non-persistent buffers
        are left alone, and reported if they are still on meta.
    key_map: checkpoint name -> module name, as a mapping (names not in it stay) or a function; a name mapped to None
        is left out.
    strict: missing or unexpected names are an error. Wrong shapes always are.
    keep_fp32: with a dtype, tensors whose dotted name in the module contains one of these parts become float32.
    device, dtype, io, threads, cache, cache_dir, verify, observer: as for `load_file`.

    Raises `KeyMismatchError` listing all missing, unexpected and mis-shaped names, before any weight is read, and what
    `load_file` raises; the module is changed only when everything has arrived.
    """
    options = LoadOptions(device=device, io=io, threads=threads, observer=observer)
    target_dtype = dtype_name(dtype)
    found = Match((), {})

    def choose() -> Choice:
        nonlocal found
        checkpoint = open_checkpoint(path)
        found = match(module, checkpoint, key_map, strict=strict)
        module_names = {name: slots[0] for name, slots in found.slots.items()}
        return Choice(checkpoint, found.facts, DtypeRule(target_dtype, tuple(keep_fp32), module_names))

    def bind_and_tell(tensors: dict[str, torch.Tensor]) -> list[str]:
        left_on_meta = bind(module, found, tensors)
        notes = {
            "not in the checkpoint": found.missing,
            "in the checkpoint, but not in the module": found.unexpected,
            "still on the meta device, compute them before use": left_on_meta,
        }
        return [f"{title}: {', '.join(names)}" for title, names in notes.items() if names]

    caching = CacheOptions(enabled=cache, directory=cache_dir, verify=verify)
    return _load(choose, options, caching, bind_and_tell).report
