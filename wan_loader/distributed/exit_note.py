"""Notes of processes that have ended: left in the store of torch.distributed when their interpreters exit.

A process that ends before it ever came to a load has no heartbeat that could stop; whoever waits for it finds the note.
There is none of a process that was killed, or that left torch.distributed (`destroy_process_group`) before it ended.
"""

from __future__ import annotations

import sys
import threading
from contextlib import suppress
from typing import Any

__all__ = ["leave_exit_note", "read_exit_note"]

#: How long an exit waits for the store, which another thread may hold.
_PATIENCE_S = 1.0
_MAX_TEXT = 1000


def leave_exit_note() -> None:
    """Say that this process ends, and with which uncaught error; do nothing outside of a distributed run."""
    distributed: Any = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return
    if distributed.get_world_size() > 1:
        writing = threading.Thread(target=_write, args=(distributed.get_rank(),), name="exit note", daemon=True)
        writing.start()
        # a daemon, waited for so long: an exit must not hang with the store
        writing.join(_PATIENCE_S)


def read_exit_note(store: Any, rank: int) -> str | None:
    """Read what process `rank` left: its uncaught error or nothing; None if it has not ended, or left no note."""
    key = _key(rank)
    return store.get(key).decode(errors="replace") if store.check([key]) else None


def _write(rank: int) -> None:
    from torch.distributed.distributed_c10d import _get_default_store

    store: Any = _get_default_store()
    error = getattr(sys, "last_value", None)  # set for an error that ended the program
    text = "" if error is None else f"{type(error).__name__}: {error}"
    with suppress(Exception):  # the store may be gone with its process
        store.set(_key(rank), text[:_MAX_TEXT])


def _key(rank: int) -> str:
    return f"wan_loader/ended/{rank}"
