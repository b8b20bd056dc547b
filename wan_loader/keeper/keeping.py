"""A load whose tensors are put into memory that outlives this process, and given to the keeper."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from wan_loader.arguments import checked_count, checked_strings
from wan_loader.devices.resolve import import_torch, resolve_device
from wan_loader.devices.shared_memory import chunk_sizes
from wan_loader.dtypes import dtype_name
from wan_loader.errors import KeepError
from wan_loader.formats.checkpoint_facts import contiguous_strides
from wan_loader.keeper.checksum import checksum
from wan_loader.keeper.client import need_keeper
from wan_loader.keeper.identity import file_mark, identify, shared_memory_of
from wan_loader.keeper.messages import close_all
from wan_loader.keeper.table import KeptStorage, KeptTable, KeptTensor, Origin, padded, write_table
from wan_loader.loading.load_session import LoadSession
from wan_loader.plan.dtype_policy import DtypePolicy
from wan_loader.plan.layout import plan_storages
from wan_loader.plan.request import LoadRequest
from wan_loader.sizes import parse_size

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    import torch

    from wan_loader.cancel import CancelToken
    from wan_loader.devices.shared_memory import SharedMemory, SharedRange
    from wan_loader.events import Observer
    from wan_loader.formats import Checkpoint
    from wan_loader.keeper.client import KeeperLink
    from wan_loader.keeper.shelf import Identity
    from wan_loader.loading.report import LoadReport
    from wan_loader.loading.result import LoadResult
    from wan_loader.plan.plan import LoadPlan
    from wan_loader.types import IoMode, StrPath

__all__ = ["Kept", "keep"]

#: How long to wait for memory that the keeper has let go of: the driver may free it a little later.
_PATIENCE_S = 2.0
_PAUSE_S = 0.01


@dataclass(frozen=True, slots=True)
class Kept:
    """Weights that the keeper has."""

    identity: Identity
    device: str
    report: LoadReport | None
    """The report of the load; None if they were kept already."""
    dropped: tuple[str, ...] = ()
    """The paths of what had to go for them."""


class _Loaded(NamedTuple):
    """What was loaded into shared memory, with descriptors that are ours to close."""

    result: LoadResult
    table: KeptTable
    memory: SharedRange
    """Keeps the memory mapped, until the keeper has it."""
    sizes: list[int]
    fds: list[int]


def keep(
    path: StrPath | Sequence[StrPath] | Checkpoint,
    device: str | int | torch.device = "cuda",
    *,
    dtype: torch.dtype | str | None = None,
    part: str | None = None,
    keep_fp32: Sequence[str] = (),
    limit: int | str | None = None,
    io: IoMode = "auto",
    threads: int | None = None,
    cancel: CancelToken | None = None,
    observer: Observer | None = None,
) -> Kept:
    """Load a checkpoint and leave it in the device's memory, for loads of other processes that say `keep=True`.

    A keeper is started for this user where there is none: a small process in the background, which holds the memory and
    nothing else. What was kept of earlier states of the files goes.

    Args:
        path: As for `load_file`.
        device: As for `load_file`. On "cpu", the weights are kept in the host's memory.
        dtype: As for `load_file`. Only loads that ask for the same dtype find them.
        part: As for `load_file`.
        keep_fp32: As for `load_file`. It counts as part of the dtype.
        limit: The bytes that may be kept on this device in all, such as "60GB"; None: as it was, which at first is
            all of it. What nobody uses goes first, longest unused first.
        io: As for `load_file`.
        threads: As for `load_file`.
        cancel: As for `load_file`.
        observer: As for `load_file`.

    Raises:
        KeepError: They do not fit into the limit, another process keeps them right now, or there is no keeper.
        DeviceMemoryError: They do not fit on the device.
        DeviceError: The device's memory cannot be shared. Other errors are those of `load_file`.
    """
    policy = DtypePolicy(dtype_name(dtype), checked_strings(keep_fp32, "keep_fp32"))
    request = LoadRequest(
        source=path, device=device, policy=policy, part=part, io=io, threads=threads, owned=True, makes_values=True
    )
    most = parse_size(limit) if isinstance(limit, str) else limit
    if most is not None:
        checked_count(most, "limit")
    import_torch()
    with LoadSession(cancel=cancel, observer=observer) as session:
        checkpoint = session.open(request)
        policy.check(checkpoint, request.select(checkpoint))
        on = resolve_device(device, session.observer)
        memory = shared_memory_of(on)
        identity = identify(checkpoint, policy, memory.name)
        with need_keeper() as keeper:
            dropped = _reserve(keeper, identity, memory, _estimate(checkpoint, policy), most)
            if dropped is None:
                return Kept(identity, str(on), None)
            loaded = _load(session, replace(request, source=checkpoint, device=on), checkpoint, memory)
            _put(keeper, loaded)
    return Kept(identity, str(on), loaded.result.report, dropped)


def _estimate(checkpoint: Checkpoint, policy: DtypePolicy) -> int:
    """Return about how much memory the weights will take."""
    storages = plan_storages(checkpoint.tensors, policy)
    return sum(padded(one.nbytes_loaded(checkpoint.storages[one.storage].nbytes)) for one in storages)


def _reserve(
    keeper: KeeperLink, identity: Identity, memory: SharedMemory, nbytes: int, limit: int | None
) -> tuple[str, ...] | None:
    """Have the keeper make room; return what went for it. None: it has the weights already."""
    fields = {**identity._asdict(), "nbytes": nbytes, "free": memory.free_nbytes(), "limit": limit}
    reply, _ = keeper.ask("reserve", **fields)
    if reply["state"] == "kept":
        return None
    if reply["state"] == "busy":
        raise KeepError.because(f"another process loads {identity.label} to be kept", "wait for it, then ask again")
    end = time.monotonic() + (_PATIENCE_S if reply["dropped"] else 0)
    while (memory.free_nbytes() or nbytes) < nbytes and time.monotonic() < end:
        time.sleep(_PAUSE_S)
    return tuple(one["label"] for one in reply["dropped"])


def _load(session: LoadSession, request: LoadRequest, checkpoint: Checkpoint, memory: SharedMemory) -> _Loaded:
    """Load into shared memory; into torch's first, where some tensors are made of others once these have arrived."""
    plan = session.plan(request, checkpoint)
    if not _is_direct(plan):
        transfer = session.run(plan)
        storages = {_place(tensor): tensor for tensor in transfer.tensors.values()}
        arena = _Arena(memory, [nbytes for _, nbytes in storages])
        try:
            transfer.tensors = arena.copies(transfer.tensors)
            return _loaded(session, plan, transfer, arena, memory)
        except BaseException:
            close_all(arena.fds)
            raise
    arena = _Arena(memory, plan.layout.copied_nbytes)
    try:
        return _loaded(session, plan, session.run(plan, memory=arena), arena, memory)
    except BaseException:
        close_all(arena.fds)
        raise


def _is_direct(plan: LoadPlan) -> bool:
    """Say whether every tensor ends up where its bytes are copied to."""
    return not (plan.through_torch or plan.values or any(storage.late for storage in plan.storages))


class _Arena:
    """Shared memory that storages are placed in, one behind the other."""

    def __init__(self, memory: SharedMemory, sizes: Sequence[int]) -> None:
        self.sizes = chunk_sizes(sum(map(padded, sizes)), memory.alignment)
        self.range, self.fds = memory.make(self.sizes)
        self._used = 0

    def __call__(self, nbytes: int) -> torch.Tensor:
        """Return the next bytes as a flat tensor."""
        start = self._used
        self._used += padded(nbytes)
        return self.range.tensor(start, nbytes)

    def copies(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return copies of tensors here, which share what these share."""
        import torch

        made, out = dict[tuple[int, int], Any](), dict[str, torch.Tensor]()
        for name, tensor in tensors.items():
            if (place := _place(tensor)) not in made:
                old = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())
                made[place] = self(place[1])
                made[place].copy_(old)
            new = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
            memory = made[place].untyped_storage()
            out[name] = new.set_(memory, tensor.storage_offset(), tensor.shape, tensor.stride())
        return out


def _place(tensor: torch.Tensor) -> tuple[int, int]:
    """Return where the storage of a tensor is, and its length."""
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.nbytes()


def _loaded(session: LoadSession, plan: LoadPlan, transfer: Any, arena: _Arena, memory: SharedMemory) -> _Loaded:
    """End a load: describe where everything is."""
    table = _tabulate(transfer.tensors, arena.range, _origins(plan), map(file_mark, plan.checkpoint.files))
    memory.flush()
    return _Loaded(session.result(plan, transfer), table, arena.range, arena.sizes, arena.fds)


def _origins(plan: LoadPlan) -> dict[str, Origin]:
    """Return the tensors that are all of their storage in a file, and that storage."""
    found = {}
    for storage in plan.layout.copied if _is_direct(plan) else ():
        facts, place = storage.tensors[0], plan.checkpoint.storages[storage.storage]
        if facts.nbytes == place.nbytes and facts.stride == contiguous_strides(facts.shape):
            found[facts.name] = Origin(place.file, place.start, place.nbytes, facts.dtype)
    return found


def _tabulate(
    tensors: Mapping[str, torch.Tensor], memory: SharedRange, origins: Mapping[str, Origin], files: Iterable[str]
) -> KeptTable:
    numbers, storages, found = dict[tuple[int, int], int](), list[KeptStorage](), list[KeptTensor]()
    for name, tensor in tensors.items():
        address, nbytes = place = _place(tensor)
        if place not in numbers:
            start = address - memory.address if nbytes else 0
            numbers[place] = len(storages)
            storages.append(KeptStorage(start, nbytes, checksum(memory, start, nbytes)))
        dtype = str(tensor.dtype).removeprefix("torch.")
        shape, stride = tuple(tensor.shape), tuple(tensor.stride())
        offset, origin = int(tensor.storage_offset()), origins.get(name)
        found.append(KeptTensor(name, dtype, shape, numbers[place], stride, offset, origin))
    return KeptTable(tuple(storages), tuple(found), tuple(files))


def _put(keeper: KeeperLink, loaded: _Loaded) -> None:
    """Give the keeper what was loaded; descriptors are closed here."""
    fds = list(loaded.fds)
    try:
        fds.insert(0, write_table(loaded.table))
        keeper.ask("put", fds, sizes=loaded.sizes, n_tensors=len(loaded.table.tensors), files=loaded.table.files)
    finally:
        close_all(fds)
