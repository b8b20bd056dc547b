"""Whether other processes want this machine's processors, for what is measured then comes out too low."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

from wan_loader.system.machine import processors

__all__ = ["busy_note"]

_PRESSURE = Path("/proc/pressure/cpu")
_LOAD = Path("/proc/loadavg")
#: Per cent of the last ten seconds in which somebody waited for a processor.
_WAITED = 25.0


def busy_note(pressure: Path = _PRESSURE, load: Path = _LOAD) -> str:
    """Return a sentence if the machine is busy, else nothing.

    Args:
        pressure: The kernel's account of waiting for processors.
        load: Its account of running processes, for kernels without the other.
    """
    with suppress(OSError):
        if found := re.search(r"^some avg10=([\d.]+)", pressure.read_text(), re.MULTILINE):
            waited = float(found[1])
            return _note(f"processes waited for a processor in {waited:.0f} % of the time") if waited > _WAITED else ""
    with suppress(OSError, ValueError, IndexError):
        running = float(load.read_text().split()[0])
        if running > 1.5 * processors():
            return _note(f"{running:.1f} processes wanted {processors()} processors")
    return ""


def _note(why: str) -> str:
    return f"the machine was busy when it was measured ({why}): ceilings may be too low; `wan-loader doctor --refresh`"
