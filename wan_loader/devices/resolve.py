"""Devices by name, exactly: "cuda:1" is device 1, "cuda" the current device, "auto" CUDA where there is one."""

from __future__ import annotations

import sys
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

from wan_loader.arguments import check_device
from wan_loader.errors import DeviceError, HostMemoryError, OptionError
from wan_loader.events import Span, clock_ns, span
from wan_loader.sizes import format_bytes
from wan_loader.system.forks import without_forks
from wan_loader.system.machine import available_memory, process_headrooms

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    from wan_loader.events import Observer

__all__ = [
    "check_room_for_torch",
    "check_tensors_are_real",
    "cuda_build",
    "current",
    "device_card",
    "device_peak_bytes",
    "import_torch",
    "is_busy",
    "reset_device_peak",
    "resolve_device",
]

_DEVICES = "use auto, cpu, cuda or cuda:N"
#: What importing torch takes at the least: of memory, and of what limits of the process count.
_TORCH_NBYTES = {"the machine or its cgroup": 128 << 20, "ulimit -v": 560 << 20, "ulimit -d": 192 << 20}


def resolve_device(device: str | int | torch.device, observer: Observer | None = None) -> torch.device:
    """Return the device that is meant, its CUDA context made.

    Raises:
        DeviceError: There is no such device.
        HostMemoryError: Importing torch would be the end of the process.
    """
    check_device(device)
    with span(observer, "import"):
        import_torch()
    import torch

    if device == "auto":
        device = "cuda" if _count_devices(observer) else "cpu"
    try:
        found = torch.device(device if isinstance(device, str | torch.device) else f"cuda:{device}")
    except (RuntimeError, ValueError) as error:
        raise DeviceError.because(f"device {device!r} is not a device", _DEVICES) from error
    if found.type == "cpu":
        if found.index:
            raise DeviceError.because(f"device {str(found)!r} does not exist", "there is one, cpu")
        return torch.device("cpu")
    if found.type != "cuda":
        raise DeviceError.because(f"device {str(found)!r} is not supported", _DEVICES)
    count = _count_devices(observer)
    if count == 0:
        reason, remedy = f"this torch ({torch.__version__}) sees no CUDA device", "use device='cpu'"
        if cuda_build() is None:
            remedy += ", or a torch that is built with CUDA: this one is not"
        raise DeviceError(f"device {str(found)!r}: {reason}; {remedy}", reason=reason, remedy=remedy)
    with span(observer, "cuda_init"):
        index = torch.cuda.current_device() if found.index is None else found.index
        if index >= count:
            there = f"there are {count} (cuda:0 to cuda:{count - 1})"
            raise DeviceError.because(f"device {str(found)!r} does not exist", there)
        # the context is made by the first call that needs it: here, where its time has a name
        torch.cuda.synchronize(index)
    return torch.device("cuda", index)


def _count_devices(observer: Observer | None) -> int:
    """Return how many CUDA devices there are. The first time in a process, that starts the driver."""
    import torch

    start_ns = clock_ns()
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count and observer is not None:  # where there is no device, nothing was started
        observer.record(Span("cuda_init", start_ns, clock_ns(), 0, threading.current_thread().name))
    return count


def import_torch() -> None:
    """Import torch. Raises `HostMemoryError` if that would be the end of the process."""
    with without_forks():
        check_room_for_torch()
        import torch  # noqa: F401


def check_room_for_torch() -> None:
    """Raise `HostMemoryError` if importing torch would be the end of the process: it aborts, or the kernel kills it."""
    if "torch" in sys.modules:
        return
    rooms = process_headrooms()
    if (free := available_memory()) is not None:
        rooms["the machine or its cgroup"] = free
    for what, free in rooms.items():
        if free < (needed := _TORCH_NBYTES[what]):
            raise HostMemoryError.because(
                f"importing torch takes {format_bytes(needed)} at the least, and {what} leaves {format_bytes(free)}",
                "allow more memory",
            )


def check_tensors_are_real() -> None:
    """Raise `OptionError` in a mode of torch whose tensors have no memory: bytes cannot be read into it."""
    import torch

    if (kind := type(torch.empty(0, device="cpu"))) is not torch.Tensor:
        reason = f"a mode of torch is active that makes a {kind.__name__} of every tensor"
        raise OptionError.because(reason, "load outside of it")


@contextmanager
def current(device: str) -> Iterator[None]:
    """Make the device the current one of this thread, and its context too, for a `with` block."""
    if device == "cpu":
        yield
        return
    import torch

    with torch.cuda.device(device):
        # `device` does nothing where a new thread begins with this one, and then it has no context
        torch.cuda.set_device(device)
        yield


def is_busy(device: torch.device) -> bool:
    """Return whether work is queued on the caller's stream."""
    import torch

    return device.type == "cuda" and not torch.cuda.current_stream(device).query()


def reset_device_peak(device: str) -> None:
    """Let `device_peak_bytes` begin anew."""
    import torch

    if device != "cpu":
        torch.cuda.reset_peak_memory_stats(device)


def device_peak_bytes(device: str) -> int:
    """Return the most device memory held by tensors since the reset; 0 for the CPU."""
    import torch

    return 0 if device == "cpu" else torch.cuda.max_memory_allocated(device)


def cuda_build() -> str | None:
    """Return the version of CUDA that this torch was built with; None if it knows nothing of it."""
    import torch

    return torch.version.cuda


def device_card(device: str) -> dict[str, object]:
    """Return facts for a report: torch, CUDA and the device."""
    import torch

    card: dict[str, object] = {"torch": torch.__version__}
    if device != "cpu":
        properties = torch.cuda.get_device_properties(device)
        card |= {"cuda": torch.version.cuda, "gpu": properties.name, "gpu_memory_bytes": properties.total_memory}
    return card
