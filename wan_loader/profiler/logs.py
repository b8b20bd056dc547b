"""The reading of what the agent has written inside a program's processes. It may be anything, and any amount of it.

A process has a file of its own, and its lines are JSON objects. What is no plain file, what is too long, and lines that
are none are left out.
"""

from __future__ import annotations

import json
import os
import stat
from contextlib import suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["read_logs"]

_MAX_LOGS = 1000
#: The agent itself stops at half of it.
_MAX_BYTES = 128 << 20
_MAX_BYTES_IN_ALL = 512 << 20


def read_logs(directory: Path) -> tuple[tuple[dict[str, Any], ...], ...]:
    """Return the lines of each process."""
    logs, left = [], _MAX_BYTES_IN_ALL
    for path in sorted(directory.glob("*.jsonl"))[:_MAX_LOGS]:
        text = _read(path, min(_MAX_BYTES, left))
        left -= len(text)
        logs.append(_lines(text))
    return tuple(logs)


def _read(path: Path, most: int) -> bytes:
    with suppress(OSError):
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            if stat.S_ISREG(os.fstat(fd).st_mode):
                with open(fd, "rb", closefd=False) as file:
                    return file.read(most)
        finally:
            os.close(fd)
    return b""


def _lines(text: bytes) -> tuple[dict[str, Any], ...]:
    """Return the lines; one that was being written when the process was killed is left out."""
    lines = []
    for line in text.splitlines():
        with suppress(ValueError, RecursionError):
            lines.append(json.loads(line))
    return tuple(line for line in lines if isinstance(line, dict))
