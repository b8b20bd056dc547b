"""Devices by name, exactly: "cuda:1" is device 1, "cuda" the current device, "auto" CUDA where there is one."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from wan_loader.arguments import check_device
from wan_loader.errors import DeviceError
from wan_loader.events import span

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    import torch

    from wan_loader.events import Observer

__all__ = ["current", "device_card", "device_peak_bytes", "is_busy", "reset_device_peak", "resolve_device"]


def resolve_device(device: str | int | torch.device, observer: Observer | None = None) -> torch.device:
    """The device meant, its CUDA context made. Raises `DeviceError` if there is no such device."""
    check_device(device)
    with span(observer, "import"):
        import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(device if isinstance(device, str | torch.device) else f"cuda:{device}")
    except (RuntimeError, ValueError) as error:
        raise DeviceError(f"device {device!r} is not a device: use auto, cpu, cuda or cuda:N") from error
    if found.type == "cpu":
        if found.index:
            raise DeviceError(f"device {str(found)!r} does not exist: there is one, cpu")
        return torch.device("cpu")
    if found.type != "cuda":
        raise DeviceError(f"device {str(found)!r} is not supported: use auto, cpu, cuda or cuda:N")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0:
        raise DeviceError(
            f"device {str(found)!r}: this torch ({torch.__version__}) sees no CUDA device; use device='cpu'"
        )
    with span(observer, "cuda_init"):
        index = torch.cuda.current_device() if found.index is None else found.index
        if index >= count:
            raise DeviceError(f"device {str(found)!r} does not exist: there are {count} (cuda:0 to cuda:{count - 1})")
        torch.cuda.synchronize(index)
    return torch.device("cuda", index)


def current(device: torch.device) -> AbstractContextManager[Any]:
    """Makes the device the current one of this thread, and its context too; what was current comes back."""
    import torch

    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def is_busy(device: torch.device) -> bool:
    """Whether work is queued on the caller's stream."""
    import torch

    return device.type == "cuda" and not torch.cuda.current_stream(device).query()


def reset_device_peak(device: torch.device) -> None:
    """Let `device_peak_bytes` begin anew."""
    import torch

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def device_peak_bytes(device: torch.device) -> int:
    """The most device memory held by tensors since the reset; 0 for the CPU."""
    import torch

    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def device_card(device: torch.device) -> dict[str, object]:
    """Facts for a report: torch, CUDA and the device."""
    import torch

    card: dict[str, object] = {"torch": torch.__version__}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        card |= {"cuda": torch.version.cuda, "gpu": properties.name, "gpu_memory_bytes": properties.total_memory}
    return card
