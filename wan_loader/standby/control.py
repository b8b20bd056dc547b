"""Starting, describing and ending the stand-by server of this user and this environment."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import struct
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

from wan_loader.errors import OutputError, WanLoaderError
from wan_loader.standby import client, place
from wan_loader.system.peers import not_private, own_directory

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["IDLE_S", "running", "start", "status", "stop"]

#: How long a server waits for the next request before it ends.
IDLE_S = 3600.0
#: How long one may take to end by itself.
_GRACE_S = 5.0
_LOOK_S = 0.02
#: The kernel's struct flock.
_LOCK = struct.Struct("hhqqixxxx")


def running() -> int | None:
    """Return the process id of the server, also of one that still imports; None if there is none."""
    if not_private(own_directory()):  # somebody else's file could name any process
        return None
    try:
        with open(place.lock_path(), "rb") as file:
            found = fcntl.fcntl(file, fcntl.F_GETLK, _LOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
    except OSError:
        return None
    kind, *_, pid = _LOCK.unpack(found)
    return None if kind == fcntl.F_UNLCK else int(pid)


def start(modules: Sequence[str], *, idle_s: float = IDLE_S, only: bool = False) -> dict[str, Any]:
    """Start a server, unless there is one, and wait until it is ready.

    Args:
        modules: What it imports beside what it knows that programs need.
        idle_s: It ends after so many seconds without a request.
        only: Import nothing but `modules`.

    Returns:
        What `status` returns.

    Raises:
        OutputError: Its directory cannot be had for this user alone.
        WanLoaderError: It has not become ready.
    """
    directory = own_directory()
    with contextlib.suppress(FileExistsError):
        os.mkdir(directory, 0o700)
    if why := not_private(directory):
        raise OutputError.because(why, "remove it, or set XDG_RUNTIME_DIR to a directory of yours", path=directory)
    if running() is None:
        _launch({"modules": list(modules), "idle_s": idle_s, "only": only})
    while (pid := running()) is not None:
        asked = time.monotonic()
        if (found := status()) is not None and "n_modules" in found:
            return found
        if time.monotonic() - asked >= client.PATIENCE_S:  # one that still imports is not listening
            raise WanLoaderError.because(f"the stand-by server hangs: process {pid}", "end it: wan-loader standby stop")
        time.sleep(_LOOK_S)
    with open(place.log_path(), encoding="utf-8", errors="replace") as log:
        said = log.read().strip().splitlines()[-1:] or ["it has said nothing"]
    raise WanLoaderError.because(f"the stand-by server has ended: {said[0]}", f"{place.log_path()} has all it said")


def _launch(settings: dict[str, Any]) -> None:
    """Begin a server in a session of its own, and wait until it holds the lock, or has ended."""
    path = sys.path if sys.flags.safe_path else [place.package_root(), *sys.path[1:]]
    code = f"import sys; sys.path[:] = {path!r}; from wan_loader.standby.server import main; main(sys.argv[1])"
    environ = {**os.environ, "PYTORCH_NVML_BASED_CUDA_CHECK": "1", "WAN_LOADER_ACCELERATE": "0"}
    with open(place.log_path(), "wb") as log:
        os.fchmod(log.fileno(), 0o600)
        process = subprocess.Popen(
            [sys.executable, *_options(), "-c", code, json.dumps(settings)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environ,
            cwd="/",
            start_new_session=True,
        )
    while running() is None and process.poll() is None:
        time.sleep(_LOOK_S)
    process.returncode = process.returncode or 0  # nobody waits for it: it outlives this process


def _options() -> list[str]:
    """Return the options that this interpreter was started with, and the mode that it has found without a locale.

    Where none is set, Python turns UTF-8 mode on and sets one in the environment, so that a child would turn it off.
    """
    options = [word for word in subprocess._args_from_interpreter_flags() if word != "-u"]  # type: ignore[attr-defined]
    return [*options, "-X", f"utf8={sys.flags.utf8_mode}"]


def status() -> dict[str, Any] | None:
    """Describe the server; None if there is none. One that still imports has no more than its process id."""
    if (pid := running()) is None:
        return None
    return client.ask({"status": True}) or {"pid": pid}


def stop() -> int | None:
    """End the server; programs that it has forked go on. Returns its process id; None if there was none."""
    pid = running()
    if pid is None:
        return None
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
        end = time.monotonic() + _GRACE_S
        while running() == pid and time.monotonic() < end:
            time.sleep(_LOOK_S)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(place.socket_path())
    return pid
