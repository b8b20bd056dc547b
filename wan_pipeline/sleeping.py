"""What `WanT2V.sleep` gave back and what `WanT2V.wake` took again."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Slept", "Woken"]


@dataclass(frozen=True, slots=True)
class Slept:
    """What going to sleep gave back."""

    networks: tuple[str, ...]
    """The networks that were there, or on their way."""
    nbytes: int
    """Bytes of their weights, wherever they were."""
    device_nbytes_before: int
    """Bytes of the device that this process had taken for tensors, and for more of them; 0 on a CPU."""
    device_nbytes_after: int
    """What of it is left: work space of libraries. The device's context, some hundred MB, is not counted."""
    seconds: float

    @property
    def device_nbytes(self) -> int:
        """The bytes of the device that others may use now."""
        return self.device_nbytes_before - self.device_nbytes_after


@dataclass(frozen=True, slots=True)
class Woken:
    """What waking up took again."""

    networks: tuple[str, ...]
    """The networks that are there now; none if it was awake."""
    nbytes: int
    """Bytes of files that were read for them."""
    seconds: float

    @property
    def gbps(self) -> float:
        """The rate in 10**9 bytes per second."""
        return self.nbytes / self.seconds / 1e9 if self.seconds else 0.0
