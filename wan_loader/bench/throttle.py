"""A slow disk that the machine does not have: reads of our loader are held to a rate. Simulated, and labelled so.

Only our own reader can be slowed down this way, so only our loader is measured on simulated storage. It must read
into its ring (`io="buffered"` or `"direct"`): pages that are mapped are not seen here. Latency is not simulated.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any

from wan_loader.events import clock_ns
from wan_loader.system.posix_aio import AioRequest
from wan_loader.system.read_threads import ThreadRequest

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Throttle", "throttle_reads"]


class Throttle:
    """A device that serves one request after the other at `rate` bytes per second, whoever asks."""

    def __init__(
        self, rate: float, clock: Callable[[], int] = clock_ns, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        self._rate = rate
        self._clock = clock
        self._sleep = sleep
        self._lock = threading.Lock()
        self._free_ns = 0

    def reserve(self, nbytes: int) -> int:
        """Queue a request of `nbytes`; return when the device will have delivered it, on the clock."""
        with self._lock:
            self._free_ns = max(self._clock(), self._free_ns) + int(nbytes / self._rate * 1e9)
            return self._free_ns

    def wait(self, due_ns: int) -> None:
        """Return at `due_ns`."""
        if (rest_ns := due_ns - self._clock()) > 0:
            self._sleep(rest_ns / 1e9)


def throttle_reads(rate: float) -> None:
    """Slow every read of this process's loads down, for good: for a process that takes one sample and ends."""
    # the classes are changed, not objects: readers make their requests themselves
    throttle = Throttle(rate)
    for kind in (AioRequest, ThreadRequest):
        _slow_down(kind, throttle)


def _slow_down(kind: Any, throttle: Throttle) -> None:
    """Let requests of one kind end when the device would have delivered them."""
    start, result = kind.start, kind.result
    due_ns: dict[Any, int] = {}

    def slow_start(request: Any, fd: int, address: int, nbytes: int, offset: int) -> None:
        due_ns[request] = throttle.reserve(nbytes)
        start(request, fd, address, nbytes, offset)

    def slow_result(request: Any) -> int | None:
        nbytes: int | None = result(request)
        if nbytes is not None:
            throttle.wait(due_ns.pop(request))
        return nbytes

    kind.start, kind.result = slow_start, slow_result
