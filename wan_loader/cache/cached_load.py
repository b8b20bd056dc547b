"""A load through the converted cache: of an entry if there is a valid one, else of the source, which is then kept.

A wrapper around a load. Whatever is wrong with the cache, the load goes on from the source, with a warning that says
why; only a source that is not there is an error.
"""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import TYPE_CHECKING

from wan_loader.cache.checksums import BlockCheck, check_entry, check_header
from wan_loader.cache.loaded_tensors import prepare_fingerprints
from wan_loader.cache.outline import ENTRY_FILE, outline_checkpoint
from wan_loader.cache.use import CacheUse
from wan_loader.dtypes import ITEMSIZE
from wan_loader.errors import CacheError, CheckpointError
from wan_loader.formats import open_checkpoint
from wan_loader.formats.checkpoint_facts import StorageFacts, TensorFacts
from wan_loader.loading.bind import make_binding
from wan_loader.loading.load_session import LoadSession
from wan_loader.loading.run import read_tensors
from wan_loader.plan.dtype_policy import DtypePolicy
from wan_loader.plan.request import LoadRequest

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from wan_loader.cache.entry import Entry
    from wan_loader.cache.loaded_tensors import TensorSegment
    from wan_loader.cache.outline import CachedFile
    from wan_loader.cancel import CancelToken
    from wan_loader.events import Observer
    from wan_loader.formats import Checkpoint
    from wan_loader.loading.bind import Into
    from wan_loader.loading.result import LoadResult
    from wan_loader.loading.run import TransferResult
    from wan_loader.plan.plan import LoadPlan
    from wan_loader.types import StrPath

__all__ = ["load_cached", "open_entry", "read_segments"]


def load_cached(
    request: LoadRequest,
    into: Into | None,
    directory: StrPath | None,
    *,
    verify: bool = False,
    cancel: CancelToken | None = None,
    observer: Observer | None = None,
) -> LoadResult:
    """Load what is asked for, from the cache where that holds it converted; else keep it there.

    Args:
        request: The load.
        into: The module that is to be filled; None returns the tensors alone.
        directory: The directory of the cache; None is the user's.
        verify: Check an entry against its checksums while it is read.
        cancel: Stops the load.
        observer: Is told of spans.
    """
    with LoadSession(cancel=cancel, observer=observer) as session:
        source = session.open(request)
        with session.span("header"):
            binding = make_binding(request, source, into)
            request = binding.request
            wanted = [t.name for t in request.select(source)]
            request.policy.check(source, request.select(source))
            outline = outline_checkpoint(source, request.policy)
            use = CacheUse(outline, directory, read_segments)
        with use:
            moved = _from_entry(session, request, use, outline.files[0], verify=verify)
            if moved is None:
                if use.report.state == "building":
                    threading.Thread(
                        target=prepare_fingerprints, args=(request.device,), name="prepare fingerprints", daemon=True
                    ).start()
                plan = session.plan(request, source)
                moved = plan, session.run(plan)
            plan, transfer = moved
            transfer.tensors = {name: transfer.tensors[name] for name in wanted}
            with session.span("assign"):
                notes = binding.bind(transfer.tensors, plan.facts.device)
            result = session.result(plan, transfer, warnings=notes)
            use.note(ENTRY_FILE, transfer.tensors)  # before they are handed out
        warnings = (*result.warnings, *use.warnings)
        return replace(result, cache=use.report, build=use.build, warnings=warnings)


def _from_entry(
    session: LoadSession, request: LoadRequest, use: CacheUse, outlined: CachedFile, *, verify: bool
) -> tuple[LoadPlan, TransferResult] | None:
    """Load from the entry; None where there is none, or one that turns out to be damaged, which is then set aside."""
    # again where one was set aside: another process may have put a sound one there since
    while use.entry is not None:
        try:
            with session.span("header"):
                entry, check = _open_entry(request, use, outlined, verify=verify)
            whole = len(request.select(entry)) == len(entry.tensors)
            plan = session.plan(
                replace(request, names=None) if whole else request,
                # the report names what was asked for, not the file in the cache
                replace(entry, path=outlined.checkpoint.path, part=outlined.checkpoint.part),
                read_unit=check.block_bytes if check is not None else None,
            )
            return plan, session.run(plan, check)
        except (CacheError, CheckpointError) as error:
            session.forget()
            use.set_aside(error)
    return None


def open_entry(entry: Entry, outlined: CachedFile) -> tuple[Checkpoint, bool]:
    """Open an entry as a checkpoint.

    Returns:
        The checkpoint; and whether its files are as they were left. If not, only checksums tell that they are sound.

    Raises:
        CacheError: The entry holds other files or tensors than are made from its source, or its checksums are wrong.
    """
    files = entry.manifest.files
    if [file.path for file in files] != [ENTRY_FILE]:
        raise CacheError.because(f"holds other files than {ENTRY_FILE}: damaged or foreign", path=entry.path)
    # before it is parsed: the header says where everything lies
    check_header(entry.path, files[0])
    checkpoint = open_checkpoint(entry.file(ENTRY_FILE))
    as_left = entry.check_files()  # what is changed from here on, the load finds
    held = {(t.name, t.dtype, t.shape) for t in checkpoint.tensors}
    if held != {(t.name, t.dtype, t.source.shape) for t in outlined.tensors}:
        raise CacheError.because(
            "holds other tensors than are made from its source: damaged or foreign", path=entry.path
        )
    return checkpoint, as_left


def _open_entry(
    request: LoadRequest, use: CacheUse, outlined: CachedFile, *, verify: bool
) -> tuple[Checkpoint, BlockCheck | None]:
    """Open the entry as a checkpoint; with it comes the check of its blocks, if that happens while they are read.

    Raises:
        CacheError: The entry holds other files or tensors than are made from its source, or its checksums are wrong.
    """
    entry = use.entry
    assert entry is not None
    checkpoint, as_left = open_entry(entry, outlined)
    use.accept(
        "the source is unchanged" + ("" if as_left else "; the entry's files have new modes: checksums compared")
    )
    if not verify and as_left:
        return checkpoint, None
    if len(request.select(checkpoint)) == len(checkpoint.tensors):
        return checkpoint, BlockCheck(entry.file(ENTRY_FILE), entry.manifest.files[0])
    # a part of the tensors is not made of whole blocks, so everything is compared before
    if wrong := check_entry(entry.path, entry.manifest):
        raise CacheError("; ".join(wrong), path=entry.path)
    return checkpoint, None


def read_segments(file: CachedFile, segments: Sequence[TensorSegment]) -> list[torch.Tensor]:
    """Read segments of tensors from the source, converted: 1-D host tensors that own their memory."""
    storages, tensors = [], []
    for index, segment in enumerate(segments):
        facts = segment.tensor.source
        place, itemsize = file.checkpoint.storages[facts.storage], ITEMSIZE[facts.dtype]
        storages.append(StorageFacts(place.file, place.start + segment.start * itemsize, segment.count * itemsize))
        tensors.append(TensorFacts(str(index), facts.dtype, (segment.count,), index, (1,)))
    trimmed = replace(file.checkpoint, storages=tuple(storages), tensors=tuple(tensors))
    policy = DtypePolicy(exact={str(index): segment.tensor.dtype for index, segment in enumerate(segments)})
    read = read_tensors(LoadRequest(source=trimmed, policy=policy, owned=True))
    return [read[str(index)] for index in range(len(segments))]
