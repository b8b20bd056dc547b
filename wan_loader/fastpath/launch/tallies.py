"""The counts of several processes: each leaves its own in a directory, and they are summed up."""

from __future__ import annotations

import atexit
import json
import os
from contextlib import suppress
from pathlib import Path

from wan_loader.events import clock_ns
from wan_loader.fastpath.tally import Tally

__all__ = ["leave_tally_at_exit", "sum_up"]


def leave_tally_at_exit(tallies: str) -> None:
    """Have this process leave its counts when it ends; not the processes that are forked from it, which share them."""
    atexit.register(_leave_tally, tallies, os.getpid())


def _leave_tally(tallies: str, pid: int) -> None:
    if os.getpid() == pid:
        from wan_loader.fastpath.process import accelerate  # more than who only sums up needs

        # a process may outlive the program that has started it, and the directory with it
        with suppress(OSError):
            text = json.dumps(accelerate().tally.as_dict())
            Path(tallies, f"{pid}-{clock_ns()}.json").write_text(text)


def sum_up(tallies: Path) -> tuple[Tally, int]:
    """Add up what processes have left; what one was writing when it was killed does not count."""
    total, n_processes = Tally(), 0
    for path in sorted(tallies.glob("*.json")):
        with suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
            total.add(json.loads(path.read_text()))
            n_processes += 1
    return total, n_processes
