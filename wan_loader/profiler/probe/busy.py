"""Whether other processes want this machine's processors, for what is measured then comes out too low.

Before a measurement the kernel's account of waiting is asked; over a time, what of the processors' time was others'.
"""

from __future__ import annotations

import os
import re
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from wan_loader.system.machine import processors

__all__ = ["ProcessorTimes", "busy_note", "busy_reason", "crowding", "others_note", "processor_times"]

_PRESSURE = Path("/proc/pressure/cpu")
_LOAD = Path("/proc/loadavg")
#: Per cent of the last ten seconds in which somebody waited for a processor.
_WAITED = 25.0
_STAT = Path("/proc/stat")
#: Others are noticed from this share of the processors on.
_OTHERS = 0.25
#: Over a shorter time the kernel's ticks say nothing.
_LEAST_S = 0.2


@dataclass(frozen=True, slots=True)
class ProcessorTimes:
    """Processor seconds until some moment."""

    at_s: float
    all_s: float
    """Of all processes of the machine, and what a hypervisor has taken away."""
    own_s: float
    """Of this process, and of the children that it has waited for."""


def processor_times(stat: Path = _STAT) -> ProcessorTimes | None:
    """Return the processor times until now; None where the kernel does not tell."""
    with suppress(OSError, ValueError, IndexError):
        ticks = [int(word) for word in stat.read_text().split("\n", 1)[0].split()[1:9]]
        user, nice, system, _, _, irq, softirq, stolen = ticks
        own = os.times()
        all_s = (user + nice + system + irq + softirq + stolen) / os.sysconf("SC_CLK_TCK")
        return ProcessorTimes(time.monotonic(), all_s, sum(own[:4]))
    return None


def crowding(load: Path = _LOAD) -> float:
    """Return how many processes want each processor, by the last minute; 1 where all find one, or nobody knows."""
    with suppress(OSError, ValueError, IndexError):
        return max(1.0, float(load.read_text().split()[0]) / processors())
    return 1.0


def others_note(before: ProcessorTimes | None, after: ProcessorTimes | None, while_what: str, n: int) -> str:
    """Return a sentence if others used much of the processors between two moments, else nothing. Pure.

    Args:
        before: The times at the first moment.
        after: The times at the second one.
        while_what: What went on meanwhile.
        n: The processors of the machine.
    """
    if before is None or after is None or after.at_s - before.at_s < _LEAST_S:
        return ""
    others_s = (after.all_s - before.all_s) - (after.own_s - before.own_s)
    used = others_s / (after.at_s - before.at_s)
    if used < _OTHERS * n:
        return ""
    return f"other processes used {min(used, n):.1f} of {n} processors {while_what}: alone it is faster"


def busy_note(pressure: Path = _PRESSURE, load: Path = _LOAD) -> str:
    """Return a sentence for what is measured now if the machine is busy, else nothing."""
    why = busy_reason(pressure, load)
    redo = "ceilings may be too low; `wan-loader doctor --refresh`"
    return f"the machine was busy when it was measured ({why}): {redo}" if why else ""


def busy_reason(pressure: Path = _PRESSURE, load: Path = _LOAD) -> str:
    """Say why the machine is called busy; "" if it is not.

    Args:
        pressure: The kernel's account of waiting for processors.
        load: Its account of running processes, for kernels without the other.
    """
    with suppress(OSError):
        if found := re.search(r"^some avg10=([\d.]+)", pressure.read_text(), re.MULTILINE):
            waited = float(found[1])
            return f"processes waited for a processor in {waited:.0f} % of the time" if waited > _WAITED else ""
    with suppress(OSError, ValueError, IndexError):
        running = float(load.read_text().split()[0])
        if running > 1.5 * processors():
            return f"{running:.1f} processes wanted {processors()} processors"
    return ""
