"""`wan-loader run --nproc N`: a script or a module as N processes of one group, as torchrun starts them on one machine.

Each is a `wan-loader run` of its own. They are forks of the stand-by server, which is started for them if there is
none: everything is imported once.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from wan_loader.standby import control

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["run_ranks"]

_FORWARDED = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
#: How long a server that was started for them waits for others.
_IDLE_S = 60.0
#: How long the others may take to end once one has failed.
_GRACE_S = 10.0
_LOOK_S = 0.02


def run_ranks(n_processes: int, options: Sequence[str], words: Sequence[str], *, standby: bool) -> int:
    """Run a program in several processes; when one fails, the others are ended.

    Args:
        n_processes: So many.
        options: Those of `wan-loader run`, of the first process; the others are quiet.
        words: SCRIPT ARGS, or -m MODULE ARGS.
        standby: Start a stand-by server if there is none.

    Returns:
        The exit code: 0, or that of the process that has failed first.

    Raises:
        WanLoaderError: The stand-by server has not become ready.
    """
    if standby:
        control.start([], idle_s=_IDLE_S)
    processes = [
        subprocess.Popen(_command(rank, options, words), env=_environment(rank, n_processes, port))
        for port in [_free_port()]
        for rank in range(n_processes)
    ]
    with _forwarded_signals(processes):
        failed = _wait_for_all(processes)
    return 0 if failed is None else failed if failed >= 0 else 128 - failed


def _command(rank: int, options: Sequence[str], words: Sequence[str]) -> list[str]:
    interpreter = [sys.executable, *subprocess._args_from_interpreter_flags()]  # type: ignore[attr-defined]
    quiet = ["--quiet"] if rank and "--quiet" not in options else []
    return [*interpreter, "-m", "wan_loader", "run", *options, *quiet, *words]


def _environment(rank: int, n_processes: int, port: int) -> dict[str, str]:
    """Return what torch.distributed looks for; threads share the processors, as torchrun has it."""
    sizes = dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(n_processes))
    ranks = dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank))
    return {
        "OMP_NUM_THREADS": "1",
        **os.environ,
        **sizes,
        **ranks,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _wait_for_all(processes: list[subprocess.Popen[bytes]]) -> int | None:
    """Wait until all have ended; return the code of the first that has failed, after which the others have to end."""
    failed, end = None, float("inf")
    while left := [process for process in processes if process.poll() is None]:
        code = next((process.returncode for process in processes if process.returncode), None)
        if failed is None and code is not None:
            failed, end = code, time.monotonic() + _GRACE_S
            for process in left:
                process.terminate()
        if time.monotonic() > end:
            for process in left:
                process.kill()
        time.sleep(_LOOK_S)
    return failed or next((process.returncode for process in processes if process.returncode), None)


@contextmanager
def _forwarded_signals(processes: list[subprocess.Popen[bytes]]) -> Iterator[None]:
    """Pass signals on to all, who get Ctrl-C from the terminal themselves; this process outlives them."""

    def pass_on(number: int, _: object) -> None:
        for process in processes:
            process.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in _FORWARDED}
    before[signal.SIGINT] = signal.signal(signal.SIGINT, lambda *_: None)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
