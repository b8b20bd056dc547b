"""The processes of a distributed run, as torchrun starts them: who is who, whose device is which, how they meet.

Reads the environment that torchrun sets, and says what of it is missing. Imports torch only where that is needed.
"""

from __future__ import annotations

import contextlib
import os
import sys
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from wan_loader.distributed.liveness import Liveness, own_connection
from wan_loader.errors import DistributedError, OptionError, WanLoaderError

if TYPE_CHECKING:
    import torch

__all__ = [
    "Joined",
    "end_now",
    "is_first",
    "join",
    "local_rank",
    "next_name",
    "open_store",
    "own_device",
    "process_rank",
    "run_liveness",
    "tell_others",
    "use_device",
    "warms",
    "world_size",
]

#: How long a process tries to reach the first one.
_REACH = timedelta(minutes=1)
#: How long the start waits for a process, and torch for a collective.
_WAIT_S = 600.0
COLLECTIVE_TIMEOUT = timedelta(minutes=10)
#: How long a failed process that holds the store stays for the others: those that are here, those that still start.
_LINGER_S = 3.0
_LINGER_START_S = 10.0
_TORCHRUN = "start the processes with torchrun --nproc_per_node N"
_runs = iter(range(1 << 30))
_joined: list[Liveness] = []


def _from_environment(name: str, default: int | None = None) -> int:
    text = os.environ.get(name, "" if default is None else str(default))
    if not text.isdecimal():
        why = "not set" if not text else f"{text!r}, not a number"
        raise OptionError.because(f"{name} is {why}", _TORCHRUN)
    return int(text)


def world_size() -> int:
    """Return the number of processes that a distributed run has; 1 outside of one."""
    return _from_environment("WORLD_SIZE", 1)


def is_first() -> bool:
    """Return True in the process that prints and writes."""
    return process_rank() == 0


def process_rank() -> int:
    """Return this process's number in a distributed run; 0 outside of one."""
    return 0 if world_size() == 1 else _from_environment("RANK")


def local_rank() -> int:
    """Return this process's number among those of its machine; 0 outside of a distributed run."""
    return 0 if world_size() == 1 else _from_environment("LOCAL_RANK")


def warms() -> bool:
    """Return True if this process reads files ahead: one of each machine does."""
    return local_rank() == 0


def next_name() -> str:
    """Name a run in the store: the same in each process, and new for each run of a process."""
    return f"run/{next(_runs)}"


def open_store() -> Any:
    """Connect to the run's key-value store, which torchrun or process 0 holds.

    Raises:
        OptionError: The environment of a distributed run is incomplete or makes no sense.
        DistributedError: The store cannot be reached.
    """
    import torch.distributed

    stores: Any = torch.distributed
    if missing := [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]:
        raise OptionError.because(f"{' and '.join(missing)} not set", _TORCHRUN)
    rank, world = process_rank(), world_size()
    if rank >= world:
        raise OptionError.because(f"RANK is {rank}, WORLD_SIZE {world}", _TORCHRUN)
    host, port = os.environ["MASTER_ADDR"], _from_environment("MASTER_PORT")
    if not 0 < port < 65536:
        raise OptionError.because(f"MASTER_PORT {port} is no port", _TORCHRUN)
    try:
        store = stores.TCPStore(host, port, None, _holds_store(), _REACH, wait_for_workers=False, multi_tenant=True)
    except (RuntimeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise DistributedError.because(
            f"process {rank} cannot reach the others at {host}:{port} (MASTER_ADDR, MASTER_PORT): {reason}"
        ) from error
    # torchrun starts everybody again after a failure, with the same store: old keys must not be found
    return stores.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _holds_store() -> bool:
    return process_rank() == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"


@dataclass(slots=True)
class Joined:
    """The connection of this process with the others."""

    device: torch.device
    liveness: Liveness
    started_torch: bool
    """True if torch.distributed was started here, and is ended here."""

    def leave(self, error: BaseException | None = None) -> None:
        """Leave when all do; with an error, the others are told, and nobody waits."""
        import torch.distributed as dist

        if self.liveness in _joined:
            _joined.remove(self.liveness)
        if error is not None:
            self.liveness.__exit__(type(error), error, None)
            if self.started_torch and _holds_store() and isinstance(error, Exception):
                self.liveness.linger(_LINGER_S)
            return
        self.liveness.agree("end")
        self.liveness.leave()
        if self.started_torch and dist.is_initialized():
            dist.destroy_process_group()


def join(device: str | torch.device) -> Joined:
    """Meet the other processes and start torch.distributed, unless the caller has.

    Args:
        device: The device of this process; "auto" and "cuda" mean the GPU of its local rank.

    Raises:
        OptionError: The environment of a distributed run is incomplete.
        DeviceError: There are more processes than GPUs.
        DistributedError: The others fail or do not come.
    """
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

    starts = not dist.is_initialized()
    store: Any = open_store() if starts else _get_default_store()
    rank, world = process_rank(), world_size()
    with contextlib.ExitStack() as stack:
        liveness = stack.enter_context(
            Liveness(own_connection(store), rank, range(world), next_name(), patience_s=_WAIT_S)
        )
        # within the watch: an error here is told to those that wait in `agree`
        mine = own_device(device)
        liveness.agree("start")
        if starts:
            dist.init_process_group(
                "nccl" if mine.type == "cuda" else "gloo",
                store=PrefixStore("torch", store),
                rank=rank,
                world_size=world,
                timeout=COLLECTIVE_TIMEOUT,
                device_id=mine if mine.type == "cuda" else None,
            )
        # from here on a slow process is one that works; one that is gone is noticed by its heartbeat
        liveness.patience_s = None
        # everything is well: what was entered stays open, and is closed by `Joined.leave`
        stack.pop_all()
        _joined.append(liveness)
        return Joined(mine, liveness, starts)


def run_liveness() -> Liveness | None:
    """Return the liveness of the run that this process has joined, and not left; None outside of one."""
    return _joined[-1] if _joined else None


def tell_others(error: BaseException) -> None:
    """Leave an error for processes that wait for this one to join, which it never did."""
    if world_size() == 1 or isinstance(error, DistributedError):
        return
    with contextlib.suppress(WanLoaderError, RuntimeError, ImportError):
        import torch.distributed as dist

        if not dist.is_initialized():
            liveness = Liveness(open_store(), process_rank(), range(world_size()), next_name())
            liveness.fail(error)
            if _holds_store():
                liveness.linger(_LINGER_START_S)


def own_device(device: str | torch.device) -> torch.device:
    """Resolve the device of this process and make it current: "auto" and "cuda" mean the GPU of its local rank.

    Raises:
        OptionError: A GPU was named that several processes would share.
        DeviceError: The device is not there.
    """
    import torch

    from wan_loader.devices.resolve import resolve_device

    local, local_world = local_rank(), _from_environment("LOCAL_WORLD_SIZE", 1)
    name = str(device)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda:") and local_world > 1:
        raise OptionError.because(f"--device {name}: {local_world} processes cannot share it", "use --device cuda")
    found = resolve_device(f"cuda:{local}" if name == "cuda" else name)
    use_device(found)
    return found


def use_device(device: torch.device) -> None:
    """Make a device the current one of this thread: collectives ask for it."""
    import torch

    if device.type == "cuda":
        torch.cuda.set_device(device)


def end_now(code: int) -> None:
    """End this process without waiting for what hangs in torch.distributed."""
    sys.stdout.flush()
    sys.stderr.flush()
    # no clean-up of the interpreter: it would join the threads of a collective that never ends
    os._exit(code)
