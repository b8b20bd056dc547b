"""Processes that load together: torch.distributed's groups and DTensors on one side, the plan's numbers on the other.

    open_shard_group    who takes part, from the module's DTensors or from the group that was given
    divide              everybody sees the same checkpoint and wants the same of it, before anything is read
    exchange            what each has read travels to those that need it

Reading and exchanging follow each other within a load: collectives of a load never run beside others of the caller's
thread, and their order is the same on every process.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import threading
from collections import defaultdict
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakKeyDictionary

from wan_loader.cancel import CancelToken
from wan_loader.devices.resolve import check_room_for_torch
from wan_loader.distributed.exchange import carry_out, check_usable
from wan_loader.distributed.liveness import Liveness, own_connection
from wan_loader.distributed.processes import run_liveness
from wan_loader.distributed.sharding import TensorSharding, borders, divide, exchanges
from wan_loader.dtypes import ITEMSIZE
from wan_loader.errors import DistributedError, OptionError
from wan_loader.events import span
from wan_loader.loading.fill_module import is_dtensor
from wan_loader.plan.layout import plan_storages
from wan_loader.system.forks import without_forks

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import torch
    from torch.distributed import ProcessGroup

    from wan_loader.distributed.sharding import LocalShare
    from wan_loader.events import Observer
    from wan_loader.formats.checkpoint_facts import Checkpoint, TensorFacts
    from wan_loader.loading.bind import Binding
    from wan_loader.loading.run import TransferResult
    from wan_loader.plan.dtype_policy import DtypePolicy
    from wan_loader.plan.plan import LoadPlan
    from wan_loader.plan.request import LoadRequest

__all__ = ["ShardGroup", "open_shard_group"]

#: How long a load waits for a process that has not called it yet.
PATIENCE_S = 600.0
_SAMPLE_BYTES = 4096
#: Loads of each group so far: names of what they leave in the store.
_counts: dict[str, int] = {}
#: Loads of one group follow each other: their collectives would meet those of another load of the same group.
_turns: defaultdict[tuple[int, ...], threading.Lock] = defaultdict(threading.Lock)
#: torch's store -> a connection to it.
_connections: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()
_connecting = threading.Lock()


@dataclass(slots=True)
class ShardGroup:
    """The processes of one load, as one of them sees it."""

    liveness: Liveness
    group: ProcessGroup
    groups: dict[tuple[int, ...], ProcessGroup]
    """Process groups by the ranks in them."""
    n_local: int = 1
    """The number of processes of the group on this machine."""
    local_share: LocalShare | None = None
    shared_borders: dict[int, tuple[int, ...]] = field(default_factory=dict)
    scales: dict[int, tuple[int, int]] = field(default_factory=dict)
    _shardings: dict[tuple[Any, ...], TensorSharding] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        """The number of this process, counted over the whole run."""
        return self.liveness.rank

    def device(self, device: str | int | torch.device) -> str | int | torch.device:
        """Choose where this process loads to: "cuda" is the GPU that the group is bound to, not the thread's own.

        Raises:
            OptionError: Another GPU than that one was named: the group could not exchange what arrives there.
        """
        bound = self.group.bound_device_id
        if bound is None or not _is_cuda(device):
            return device
        # an index, a name and a torch.device are told apart here: each of them may name the same GPU
        if str(device) in ("auto", "cuda") or device in (bound, str(bound), bound.index):
            return bound
        raise OptionError.because(
            f"device {str(device)!r}: the group is bound to {str(bound)!r}", "pass device='cuda', or another group"
        )

    def token(self, cancel: CancelToken | None) -> CancelToken:
        """Make a token through which the failure of another process ends the load of this one; `cancel` does, too."""
        return _GroupToken(self.liveness, cancel)

    def divide(self, binding: Binding, checkpoint: Checkpoint) -> LocalShare:
        """Compare with the others, and say what this process keeps.

        Raises:
            DistributedError: They see another checkpoint, or want something else.
        """
        tensors, slots, rule = binding.request.select(checkpoint), binding.targets, binding.request.policy
        rule.check(checkpoint, tensors)
        shardings = {t.name: self._sharding(slots.get(t.name)) for t in tensors}
        self._compare(checkpoint, tensors, shardings, rule)
        self.local_share = divide(checkpoint, tensors, shardings, self.rank)
        return self.local_share

    def reads(self, request: LoadRequest) -> dict[int, tuple[int, int]]:
        """Choose the bytes that this process reads of each storage that others hold, too; others are read whole.

        Returns:
            Number of a storage -> start and end, in bytes of the file.
        """
        assert self.local_share is not None
        plans = plan_storages(request.select(self.local_share.checkpoint), request.policy)
        out: dict[int, tuple[int, int]] = {}
        self.shared_borders, self.scales = {}, {}
        for holders in dict.fromkeys(h for h in self.local_share.holders if len(h) > 1):
            shared = [p for p in plans if self.local_share.holders[p.storage] == holders]
            nbytes = [self.local_share.checkpoint.storages[p.storage].nbytes for p in shared]
            scales = [(ITEMSIZE[p.source], ITEMSIZE[p.target]) if p.source and p.target else (1, 1) for p in shared]
            me = holders.index(self.rank)
            for plan, ends, scale in zip(
                shared, borders(nbytes, [s for s, _ in scales], len(holders)), scales, strict=True
            ):
                self.shared_borders[plan.storage], self.scales[plan.storage] = ends, scale
                out[plan.storage] = (ends[me], ends[me + 1])
        return out

    def exchange(self, plan: LoadPlan, transfer: TransferResult, observer: Observer | None) -> dict[str, int]:
        """Fill in what the others have read; return facts for the report.

        Raises:
            OptionError: The group cannot exchange on the device that was loaded to.
            DistributedError: Another process failed, or two of them load to one GPU.
        """
        assert self.local_share is not None
        copied = plan.layout.copied
        flats = {storage.storage: to.flat for storage, to in zip(copied, transfer.destinations, strict=True)}
        if self.shared_borders:
            _check_backend(self.group, flats)
        for group in self.groups.values():
            check_usable(group)
        # everybody has read everything from here on: nothing that is wrong with a file can interrupt the collectives
        _check_devices(self.liveness.ranks, self.liveness.agree("read", _identity(self.group, flats)))
        received = 0
        for what in exchanges(self.local_share.holders, self.shared_borders, self.scales):
            with span(observer, "shard", nbytes := what.nbytes_received(self.rank)):
                carry_out(what, flats, self.groups[what.holders], self.liveness)
            received += nbytes
        return {
            "rank": self.rank,
            "processes": len(self.liveness.ranks),
            "processes_here": self.n_local,
            "nbytes_read": plan.layout.nbytes_read,
            "nbytes_received": received,
        }

    def arrived(self) -> None:
        """Wait until every process has everything: the end of what can fail together."""
        self.liveness.agree("arrived")
        self.liveness.close()

    def cut(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Keep only this process's rows of tensors that had to be loaded whole."""
        cuts = self.local_share.cuts if self.local_share is not None else {}
        return {n: t[slice(*cuts[n])].clone().contiguous() if n in cuts else t for n, t in tensors.items()}

    def _sharding(self, tensor: Any) -> TensorSharding:
        if not is_dtensor(tensor):
            return TensorSharding(self.liveness.ranks)
        key = (tensor.device_mesh, tensor.placements)
        if key not in self._shardings:  # a module has a thousand tensors, and one or two ways to lay them
            self._shardings[key] = _mesh_sharding(*key, self)
        return self._shardings[key]

    def _compare(
        self,
        checkpoint: Checkpoint,
        tensors: Sequence[TensorFacts],
        shardings: Mapping[str, TensorSharding],
        rule: DtypePolicy,
    ) -> None:
        wanted = [(t.name, rule.target(t.name, t.dtype), shardings[t.name].n_shards) for t in tensors]
        mine = {"host": _host(), "checkpoint": _digest(checkpoint), "request": _hash(repr(wanted).encode())}
        facts = [json.loads(text) for text in self.liveness.agree("headers", json.dumps(mine))]
        for key, what, remedy in (
            (
                "checkpoint",
                f"see another checkpoint at {checkpoint.path}",
                "put the same files on every machine, and load them in the same order everywhere",
            ),
            ("request", "ask for other tensors, dtypes or shards", "call with the same module and options everywhere"),
        ):
            if others := [r for r, f in zip(self.liveness.ranks, facts, strict=True) if f[key] != facts[0][key]]:
                raise DistributedError.because(
                    f"processes {', '.join(map(str, others))} {what} than process {self.liveness.ranks[0]}", remedy
                )
        # they share the processors and the memory of this machine
        self.n_local = sum(f["host"] == mine["host"] for f in facts)


class _GroupToken(CancelToken):
    """A token that also asks whether the other processes live, and the caller's own token."""

    def __init__(self, liveness: Liveness, own: CancelToken | None) -> None:
        super().__init__()
        self._liveness = liveness
        self._own = own

    def check(self) -> None:
        super().check()
        self._liveness.check()
        if self._own is not None:
            self._own.check()


@contextmanager
def open_shard_group(group: ProcessGroup | None, module: torch.nn.Module | None = None) -> Iterator[ShardGroup]:
    """Open the group of a load. Every process of it must come here.

    Loads of the same group in several threads take turns.

    Args:
        group: The processes; None takes the group that the module's DTensors lie on.
        module: The module that is to be filled, where there is one.

    Raises:
        OptionError: torch.distributed is not started, or this process is not in the group.
    """
    check_room_for_torch()
    with without_forks():
        import torch.distributed as dist

    if group is None:
        assert module is not None
        group = _group_of(module)
    if not dist.is_initialized():
        raise OptionError.because(
            "torch.distributed is not started", "call init_process_group before a load with a group"
        )
    ranks = tuple(dist.get_process_group_ranks(group))
    rank = dist.get_rank()
    if rank not in ranks:
        raise OptionError(f"process {rank} is not in the group that was given, which has {list(ranks)}")
    liveness = Liveness(_store(), rank, ranks, _name(ranks), patience_s=PATIENCE_S, outer=run_liveness())
    with _turns[ranks], liveness:
        yield ShardGroup(liveness, group, {ranks: group})


def _check_backend(group: ProcessGroup, flats: Mapping[int, torch.Tensor]) -> None:
    import torch.distributed as dist

    device = next(iter(flats.values())).device.type
    if f"{device}:" not in (config := dist.get_backend_config(group)):
        raise OptionError.because(
            f"the group exchanges through {config}, not on {device}", "load to that device, or pass another"
        )


def _is_cuda(device: str | int | torch.device) -> bool:
    return isinstance(device, int) or str(device).startswith("cuda") or str(device) == "auto"


def _identity(group: ProcessGroup, flats: Mapping[int, torch.Tensor]) -> str:
    """Name the GPU that NCCL will use here, as no other one of any machine is named; empty where it uses none."""
    import torch
    import torch.distributed as dist

    flat = next(iter(flats.values()), None)
    if flat is None or not flat.is_cuda or "cuda:nccl" not in dist.get_backend_config(group):
        return ""
    return f"{_host()} {torch.cuda.get_device_properties(flat.device).uuid}"


def _check_devices(ranks: Sequence[int], identities: Sequence[str]) -> None:
    """Refuse, in every process alike, that two of them hold their tensors on one GPU: no collective could run there.

    Raises:
        DistributedError: Two do.
    """
    owner: dict[str, int] = {}
    for rank, identity in zip(ranks, identities, strict=True):
        if identity and (other := owner.setdefault(identity, rank)) != rank:
            raise DistributedError.because(
                f"processes {other} and {rank} load to the same GPU",
                "pass device='cuda:N' with the GPU of each, or bind each to its own with "
                "torch.distributed.init_process_group(device_id=...)",
            )


def _group_of(module: torch.nn.Module) -> ProcessGroup:
    """Find the group of all processes that the module's DTensors lie on."""
    import torch.distributed as dist

    tensors: list[Any] = [*module.parameters(), *module.buffers()]
    meshes = {tensor.device_mesh for tensor in tensors if is_dtensor(tensor)}
    if all(mesh.size() == dist.get_world_size() for mesh in meshes):
        world: Any = dist.group.WORLD
        return cast("ProcessGroup", world)
    mesh, *others = meshes
    if others or mesh.ndim != 1:
        raise OptionError.because(
            "the module's tensors lie on parts of the run", "pass group=, with the processes of all of them"
        )
    found: ProcessGroup = mesh.get_group()
    return found


def _mesh_sharding(mesh: Any, placements: tuple[Any, ...], shard_group: ShardGroup) -> TensorSharding:
    """Read shards and holders off a DTensor's mesh and placements.

    Raises:
        OptionError: The placements are others than `Shard(0)` and `Replicate`.
    """
    import torch.distributed as dist
    from torch.distributed.tensor import Replicate, Shard

    coordinate = mesh.get_coordinate()
    cut: list[int] = []
    kept: list[int] = []
    for dim, placement in enumerate(placements):
        if type(placement) is Shard and placement.dim == 0:
            cut.append(dim)
        elif isinstance(placement, Replicate):
            kept.append(dim)
    if len(cut) + len(kept) != mesh.ndim or len(cut) > 1 or coordinate is None:
        raise OptionError(f"placements {placements} cannot be loaded: one Shard(0), and Replicate, can")
    # the row of the mesh in which this process lies, along the replicated dimensions
    ranks = mesh.mesh[tuple(slice(None) if dim in kept else coordinate[dim] for dim in range(mesh.ndim))]
    holders = tuple(int(rank) for rank in ranks.flatten())
    if len(holders) > 1 and holders not in shard_group.groups:
        if len(kept) == 1:
            group = mesh.get_group(kept[0])
            holders = tuple(dist.get_process_group_ranks(group))
            shard_group.groups[holders] = group
        elif set(holders) == set(shard_group.liveness.ranks):
            holders = shard_group.liveness.ranks
        else:
            raise OptionError(f"placements {placements} cannot be loaded: several partial replicas of one mesh")
    return TensorSharding(holders, mesh.size(cut[0]), coordinate[cut[0]]) if cut else TensorSharding(holders)


def _digest(checkpoint: Checkpoint) -> str:
    """Hash everything that the headers say, and two samples of each file: other weights of the same shapes show."""
    facts = (checkpoint.format, checkpoint.storages, checkpoint.tensors, [f.nbytes for f in checkpoint.files])
    parts = [repr(facts).encode()]
    for file in checkpoint.files:
        with open(file.path, "rb", buffering=0) as stream:
            positions = (file.nbytes // 2, max(0, file.nbytes - _SAMPLE_BYTES))
            parts += [os.pread(stream.fileno(), _SAMPLE_BYTES, position) for position in positions]
    return _hash(b"".join(parts))


def _hash(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _host() -> str:
    try:
        # containers may have one name each on one machine, or the same one on several
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        boot = ""
    return f"{platform.node()} {boot}"


def _store() -> Any:
    """Return a connection of ours to torch's store. It serves all loads: to open one may take a name server's time."""
    from torch.distributed.distributed_c10d import _get_default_store

    store: Any = _get_default_store()
    with _connecting:
        if (found := _connections.get(store)) is not None:
            with suppress(RuntimeError):  # broken: another may do
                found.check(["wan_loader"])
                return found
        _connections[store] = found = own_connection(store)
        return found


def _name(ranks: tuple[int, ...]) -> str:
    group = ",".join(map(str, ranks))
    _counts[group] = _counts.get(group, 0) + 1
    return f"wan_loader/{_hash(group.encode())}/{_counts[group]}"
