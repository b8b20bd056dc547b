"""A load of weights that are kept: nothing is read, the tensors are those that the keeper holds, or copies of them.

A wrapper around a load. Whatever is wrong with the keeper, the load goes on from the files, and the report says why.
"""

from __future__ import annotations

import ctypes
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from wan_loader.arguments import checked_strings
from wan_loader.devices.resolve import current, import_torch, resolve_device
from wan_loader.dtypes import dtype_name
from wan_loader.engine import TransferState
from wan_loader.errors import DeviceError, DeviceMemoryError, KeepError
from wan_loader.keeper import client
from wan_loader.keeper.attached import ATTACH_ERRORS, Attached, attach
from wan_loader.keeper.identity import identify, shared_memory_of
from wan_loader.keeper.table import padded
from wan_loader.loading.bind import make_binding
from wan_loader.loading.load_session import LoadSession
from wan_loader.loading.report import KeptReport
from wan_loader.loading.run import TransferResult
from wan_loader.plan.dtype_policy import DtypePolicy
from wan_loader.plan.request import LoadRequest

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    from wan_loader.cancel import CancelToken
    from wan_loader.events import Observer
    from wan_loader.formats import Checkpoint
    from wan_loader.loading.bind import Into
    from wan_loader.loading.result import LoadResult
    from wan_loader.types import StrPath

__all__ = ["NotKept", "kept_nbytes", "load_kept", "verify_kept"]


class NotKept(NamedTuple):
    """The checkpoint of a load that the keeper cannot serve, and why."""

    checkpoint: Checkpoint
    reason: str


def load_kept(
    request: LoadRequest,
    into: Into | None,
    *,
    copy: bool,
    cancel: CancelToken | None = None,
    observer: Observer | None = None,
) -> LoadResult | NotKept:
    """Load what is asked for from what is kept.

    Args:
        request: The load.
        into: The module that is to be filled; None returns the tensors alone.
        copy: Give out copies, made on the device, rather than what all share.
        cancel: Stops the load.
        observer: Is told of spans.

    Returns:
        The result; or the reason why the files must be read.
    """
    with LoadSession(cancel=cancel, observer=observer) as session:
        checkpoint = session.open(request)
        with session.span("header"):
            binding = make_binding(request, checkpoint, into)
            request = binding.request
            names = [facts.name for facts in request.select(checkpoint)]
            request.policy.check(checkpoint, request.select(checkpoint))
        device = resolve_device(request.device, session.observer)
        with session.span("init"):
            attached = _attach(checkpoint, request.policy, device)
            if isinstance(attached, str):
                return NotKept(checkpoint, attached)
            tensors = attached.table.tensors_on(attached.memory, dict.fromkeys(names))
            if copy:
                tensors = _copied(tensors, device)
        session.cancel.check()
        # a plan that moves nothing: only for the facts that a report is made of
        plan = session.plan(replace(request, source=checkpoint, names=()), checkpoint)
        with session.span("assign"):
            notes = binding.bind(tensors, device)
        result = session.result(plan, TransferResult(tensors, TransferState()), warnings=notes)
    kept = KeptReport("copied", "copied from what is kept") if copy else KeptReport("attached", "it is kept")
    return replace(result, kept=kept)


def _attach(checkpoint: Checkpoint, policy: DtypePolicy, device: torch.device) -> Attached | str:
    """Map kept weights; or say why that is not possible."""
    try:
        memory = shared_memory_of(device)
        return attach(identify(checkpoint, policy, memory.name), memory)
    except ATTACH_ERRORS as error:
        return str(error)


def _copied(tensors: Mapping[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    """Return copies on the same device, in torch's own memory, which share what these share."""
    import torch

    memory = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors.values()}
    made = dict[int, torch.UntypedStorage]()
    try:
        with current(str(device)):
            if device.type == "cuda":  # at once, and split then
                torch.empty(sum(padded(one.nbytes()) for one in memory.values()), dtype=torch.uint8, device=device)
            for address, old in memory.items():
                new = torch.empty(old.nbytes(), dtype=torch.uint8, device=device)
                if device.type == "cpu":  # no thread of torch's, which a forked process would wait for
                    ctypes.memmove(new.data_ptr(), address, old.nbytes())
                else:
                    new.copy_(torch.empty(0, dtype=torch.uint8, device=device).set_(old))
                made[address] = new.untyped_storage()
            if device.type == "cuda":
                torch.cuda.current_stream().synchronize()
    except torch.OutOfMemoryError as error:
        raise DeviceMemoryError(f"{device} has no room for a copy of what is kept: {error}") from error
    out = {}
    for name, tensor in tensors.items():
        copy = torch.empty(0, dtype=tensor.dtype, device=device)
        place = made[tensor.untyped_storage().data_ptr()]
        out[name] = copy.set_(place, tensor.storage_offset(), tensor.shape, tensor.stride())
    return out


def kept_nbytes(
    path: StrPath | Sequence[StrPath] | Checkpoint,
    device: str | int | torch.device = "cuda",
    *,
    dtype: torch.dtype | str | None = None,
    part: str | None = None,
    keep_fp32: Sequence[str] = (),
) -> int:
    """Return the memory of the device that a load with `keep=True` would find taken already, and not take.

    For whoever reckons with free memory before loading. Arguments are those of `keep`; 0 if nothing is kept of it, or
    the keeper cannot be asked.
    """
    policy = DtypePolicy(dtype_name(dtype), checked_strings(keep_fp32, "keep_fp32"))
    request = LoadRequest(source=path, device=device, policy=policy, part=part, makes_values=True)
    import_torch()
    try:
        identity = identify(request.open(), policy, shared_memory_of(resolve_device(device)).name)
        items = (client.status() or {}).get("items", ())
    except (KeepError, DeviceError):
        return 0
    same = (item for item in items if (item["key"], item["device"], item["state"]) == (*identity[:2], "kept"))
    return sum(int(item["nbytes"]) for item in same)


def verify_kept(
    path: StrPath | Sequence[StrPath] | Checkpoint,
    device: str | int | torch.device = "cuda",
    *,
    dtype: torch.dtype | str | None = None,
    part: str | None = None,
    keep_fp32: Sequence[str] = (),
) -> list[str]:
    """Compare kept weights with the checksums that they had when they were loaded. Nothing is read from files.

    Args:
        path: As for `keep`.
        device: As for `keep`.
        dtype: As for `keep`.
        part: As for `keep`.
        keep_fp32: As for `keep`.

    Returns:
        The names of tensors that somebody has written to; none, if all are as they were.

    Raises:
        KeepError: They are not kept.
    """
    policy = DtypePolicy(dtype_name(dtype), checked_strings(keep_fp32, "keep_fp32"))
    from wan_loader.keeper.checksum import checksum

    request = LoadRequest(source=path, device=device, policy=policy, part=part, makes_values=True)
    import_torch()
    attached = _attach(checkpoint := request.open(), policy, resolve_device(device))
    if isinstance(attached, str):
        raise KeepError.because(f"{checkpoint.path} cannot be compared: {attached}", path=checkpoint.path)
    table, memory = attached
    wrong = {n for n, one in enumerate(table.storages) if checksum(memory, one.start, one.nbytes) != one.checksum}
    return [tensor.name for tensor in table.tensors if tensor.storage in wrong]
