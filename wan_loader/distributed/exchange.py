"""The collectives of a load: storages of which each holder has read a byte range become whole on all of them.

Large storages are gathered in place: each holder's byte range already lies where it belongs. Small ones travel together
in messages, through a buffer. Bytes are moved, not numbers, so every dtype that torch has can be exchanged.
"""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from wan_loader.errors import DistributedError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from types import TracebackType

    import torch
    from torch.distributed import ProcessGroup

    from wan_loader.distributed.liveness import Liveness
    from wan_loader.distributed.sharding import Chunk, Exchange

__all__ = ["carry_out", "check_usable"]

#: How long collectives have to end by themselves after something failed, and to end once they were aborted.
_GRACE_S = 1.0
_POLL_S = 0.005
#: Groups with a collective that never ended: what is sent through them next may end up in that one.
_broken: WeakSet[ProcessGroup] = WeakSet()
_connected: WeakSet[ProcessGroup] = WeakSet()


def check_usable(group: ProcessGroup) -> None:
    """Refuse a group in which an exchange has failed before.

    Raises:
        DistributedError: What is sent through it next could end up in a collective that never ended.
    """
    if group in _broken:
        raise DistributedError.because(
            "an exchange in this process group failed before",
            "call torch.distributed.destroy_process_group() and init_process_group() again in every process",
        )


def carry_out(what: Exchange, flats: Mapping[int, torch.Tensor], group: ProcessGroup, liveness: Liveness) -> None:
    """Carry out an exchange. Return when everything has arrived.

    Whatever is raised, no collective is left behind.

    Args:
        what: The exchange, the same for each of its holders.
        flats: The loaded storages by number, 1-D; they are filled in.
        group: The holders.
        liveness: Ends the waiting for a process that failed.

    Raises:
        DistributedError: Another process failed or is gone.
    """
    import torch

    me = what.holders.index(liveness.rank)
    raw = {storage: flat.view(torch.uint8) for storage, flat in flats.items()}
    device = next(iter(raw.values())).device
    _connect(group, device, liveness)
    with _Collectives(group, device, liveness) as collectives:
        for gather in what.gathers:
            whole = raw[gather.storage][: gather.nbytes * len(what.holders)]
            collectives.gather(whole, whole[gather.nbytes * me : gather.nbytes * (me + 1)])
        collectives.wait()
        for message in what.messages:
            _send(message, raw, me, len(what.holders), collectives)
        _finish(collectives.device)


def _connect(group: ProcessGroup, device: torch.device, liveness: Liveness) -> None:
    """Have NCCL connect the processes of a group, which it else does within the first collective of the group.

    That call returns when all have come, and nothing ends it: so it is made in a thread, which is left behind where
    another process fails. Groups that are bound to a device were connected when they were made.
    """
    import torch

    # gloo connects when a group is made
    if device.type != "cuda" or group.bound_device_id is not None or group in _connected:
        return
    errors: list[BaseException] = []

    def connect() -> None:
        try:
            with torch.cuda.device(device):
                places = torch.zeros(group.size(), dtype=torch.uint8, device=device)
                _start_gather(places, places[group.rank() : group.rank() + 1], group).wait()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=connect, name="connect", daemon=True)
    _broken.add(group)
    # until it has returned, the group counts as broken: nothing may be sent behind a call that hangs
    thread.start()
    while thread.is_alive():
        liveness.check()
        thread.join(_POLL_S)
    if errors:
        raise errors[0]
    _broken.discard(group)
    _connected.add(group)


class _Collectives:
    """The collectives of one exchange that were started. Leaving it with an error ends those that still run.

    A collective that another process never enters keeps a GPU busy for ever, and with it every call of the driver that
    waits for that GPU, such as giving registered memory back.
    """

    def __init__(self, group: ProcessGroup, device: torch.device, liveness: Liveness) -> None:
        self._group = group
        self.device = device
        self._liveness = liveness
        self._works: list[Any] = []

    def __enter__(self) -> _Collectives:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if error is not None and not self._completed_within(_GRACE_S):
            self._abort()

    def gather(self, whole: torch.Tensor, mine: torch.Tensor) -> None:
        """Start to fill `whole` with everybody's `mine`, which is a part of it already."""
        self._works.append(_start_gather(whole, mine, self._group))

    def wait(self) -> None:
        """Wait for all that was started."""
        for work in self._works:
            self._liveness.wait(work)

    def _completed_within(self, seconds: float) -> bool:
        """Return True if all end by themselves, as they do where the others go on."""
        end = time.monotonic() + seconds
        while not all(work.is_completed() for work in self._works):
            if time.monotonic() > end:
                return False
            time.sleep(_POLL_S)
        return True

    def _abort(self) -> None:
        _broken.add(self._group)
        with suppress(RuntimeError):  # of a backend that cannot: gloo's collectives are threads that wait for a socket
            self._group._get_backend(self.device).abort()
        self._completed_within(_GRACE_S)


def _send(
    message: Sequence[Chunk], raw: Mapping[int, torch.Tensor], me: int, n: int, collectives: _Collectives
) -> None:
    import torch

    # a gather wants as much from everybody: the one with most to send sets the size
    size = max(sum(c.end - c.start for c in message if c.owner == owner) for owner in range(n))
    buffer = torch.empty(n * size, dtype=torch.uint8, device=raw[message[0].storage].device)
    position = [owner * size for owner in range(n)]
    places: list[tuple[Any, Any, int]] = []
    for chunk in message:
        start = position[chunk.owner]
        position[chunk.owner] = end = start + chunk.end - chunk.start
        places.append((raw[chunk.storage][chunk.start : chunk.end], buffer[start:end], chunk.owner))
    for inside, outside, owner in places:
        if owner == me:
            outside.copy_(inside)
    collectives.gather(buffer, buffer[me * size : (me + 1) * size])
    collectives.wait()
    for inside, outside, owner in places:
        if owner != me:
            inside.copy_(outside)


def _start_gather(whole: torch.Tensor, mine: torch.Tensor, group: ProcessGroup) -> Any:
    import torch.distributed as dist

    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # renamed in torch 2.13
    return gather(whole, mine, group=group, async_op=True)


def _finish(device: torch.device) -> None:
    """Wait for the device: tensors that are handed out are complete."""
    import torch

    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
