"""What a process that uses no processor waits for, as the kernel tells: /proc/PID/wchan has the function that it is in.

The names of these functions differ between versions of Linux, so parts of them are looked for. Where the kernel does
not tell, a process waits for something.
"""

from __future__ import annotations

import os
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

__all__ = ["ALONE", "FOR_PROCESS", "LOCK", "NETWORK", "SLEEP", "SOMETHING", "STORAGE", "blocked_by"]

SLEEP = "sleeping"
NETWORK = "the network"
STORAGE = "storage"
LOCK = "a lock"
FOR_PROCESS = "for a process"
EVENTS = "pipes or events"
SOMETHING = "something that the kernel does not tell"
#: What no other process of the program can be asked about.
ALONE = (SLEEP, NETWORK, STORAGE)

_FUNCTIONS = (
    (SLEEP, ("nanosleep", "common_nsleep", "sigtimedwait", "pause")),
    (LOCK, ("futex", "lock_inode_wait", "flock", "posix_lock", "fcntl_setlk")),
    (FOR_PROCESS, ("do_wait", "wait4", "waitid")),
    (NETWORK, ("tcp_", "inet_", "sk_wait", "sk_stream_wait", "udp_")),
    (STORAGE, ("folio_wait", "wait_on_", "bit_wait", "filemap", "io_schedule", "rq_qos", "submit_bio", "jbd2")),
    (STORAGE, ("fuse", "request_wait_answer", "nfs", "rpc_wait", "p9_client", "balance_dirty")),
    # a socket, a pipe or a terminal: which of them it is, open sockets say
    (EVENTS, ("poll", "select", "wait_woken", "pipe", "unix_", "skb_wait", "eventfd", "tty")),
)
_MAX_THREADS = 32
_MAX_FDS = 256
#: In proc(5) net/tcp: established, being connected, closed by the other end.
_CONNECTED = ("01", "02", "08")


def blocked_by(pid: int) -> str:
    """Return what the main thread of a process waits for; "" while it runs, or is gone."""
    kind = _kind(f"/proc/{pid}")
    if kind == EVENTS and _is_connected(pid):
        return NETWORK
    if kind == LOCK and (other := _of_other_threads(pid)):
        return f"{LOCK}, while another thread waits: {other}"
    return kind


def _kind(directory: str) -> str:
    try:
        function = Path(directory, "wchan").read_text()
    except OSError:
        return ""
    if function in ("", "0"):
        return ""
    return next((kind for kind, parts in _FUNCTIONS if any(part in function for part in parts)), SOMETHING)


def _of_other_threads(pid: int) -> str:
    """Return what the other threads wait for, of which one may hold the lock; "" if that is locks, too, or work."""
    kinds = set()
    with suppress(OSError):
        for thread in os.listdir(f"/proc/{pid}/task")[:_MAX_THREADS]:
            kinds.add(_kind(f"/proc/{pid}/task/{thread}"))
    if EVENTS in kinds and _is_connected(pid):
        return NETWORK
    return next((kind for kind in (NETWORK, STORAGE, SLEEP) if kind in kinds), "")


def _is_connected(pid: int) -> bool:
    """Tell whether a process has a connection to a server."""
    sockets = set()
    with suppress(OSError):
        for name in os.listdir(f"/proc/{pid}/fd")[:_MAX_FDS]:
            with suppress(OSError):
                path = os.readlink(f"/proc/{pid}/fd/{name}")
                if path.startswith("socket:["):
                    sockets.add(path[8:-1])
    return bool(sockets) and _has_connected(pid, frozenset(sockets))


@lru_cache(maxsize=256)
def _has_connected(pid: int, sockets: frozenset[str]) -> bool:
    """Tell whether one of these sockets is connected. The kernel takes milliseconds to tell, and nothing changes."""
    with suppress(OSError):
        for name in ("tcp", "tcp6"):
            for line in Path(f"/proc/{pid}/net/{name}").read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] in _CONNECTED and fields[9] in sockets:
                    return True
    return False
