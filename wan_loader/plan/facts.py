"""The facts that a plan depends on beside the checkpoint: the system's answers, as a frozen value."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from wan_loader.system.page_cache import Residency

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["Facts"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """The machine as a load finds it. Amounts of memory are bytes; None means that they are unknown.

    `loading.probe` asks for them, once a load. Made by hand, they describe a machine that is not there: so `estimate`
    plays a plan for other hardware, and so plans are tested.
    """

    device: str = "cpu"
    """Either "cpu" or "cuda:N"."""
    processors: int = 1
    residency: Residency = field(default_factory=Residency)
    """The page cache's share in the wanted bytes of the files."""
    direct_refused: Mapping[int, str] = field(default_factory=dict)
    """The numbers of files that cannot be opened with O_DIRECT, and why. Only where some bytes are cold."""
    memory_limit: int
    """The most that this process may ever have."""
    host_free: int | None = None
    device_free: int | None = None
    device_total: int | None = None
    n_sharers: int = 1
    """Processes of this machine that load at the same time, and take as much of it as this one."""

    @property
    def cuda(self) -> bool:
        """True if the weights go to a CUDA device."""
        return self.device != "cpu"
