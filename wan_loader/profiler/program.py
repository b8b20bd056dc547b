"""The run of any program with the recording inside it; what its processes wrote is brought back.

The recording is started in every Python process that the program starts (see `system.programs`); what cannot be reached
this way is seen from outside (`watch`).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wan_loader.errors import OptionError
from wan_loader.events import clock_ns
from wan_loader.profiler.logs import read_logs
from wan_loader.profiler.watch import SeenProcess, Watcher
from wan_loader.system.programs import command_line, environment, forwarded_signals, furnish

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Recording", "run_program"]

_KILL_S = 10.0
_AGENT = Path(__file__).parent / "agent"
_PACKAGE = "_wan_loader_agent"
_START = f"import {_PACKAGE}.boot; {_PACKAGE}.boot.start(os.path.join(_here, 'spans'))"


@dataclass(frozen=True, slots=True, kw_only=True)
class Recording:
    """The remains of a run, not yet interpreted. Times are on the clock of the spans."""

    argv: tuple[str, ...]
    pid: int
    start_ns: int
    end_ns: int
    returncode: int
    """The exit code as subprocess has it: negative for a signal."""
    logs: tuple[tuple[dict[str, Any], ...], ...]
    """The lines of each process."""
    seen: tuple[SeenProcess, ...] = ()
    """The processes as they looked from outside."""
    inside: bool = False
    """A part of a process that goes on."""
    directory: str = ""
    """The directory in which the program was started."""
    own_python: bool = True
    """True if it was started with the Python of this environment."""
    stopped: str = ""
    """The reason why the program was stopped from outside, if it was."""


def run_program(
    words: Sequence[str],
    *,
    until: str | None = None,
    seconds: float | None = None,
    stop: bool = False,
    stdout: int | None = None,
) -> Recording:
    """Run a program to its end and return the recording.

    Args:
        words: The program and its arguments.
        until: The recording ends when the program prints this text; the program goes on.
        seconds: The recording ends after this time; the program goes on.
        stop: When the recording ends, the program gets SIGTERM, and SIGKILL ten seconds later.
        stdout: A descriptor for the program's own output.

    Raises:
        OptionError: The program cannot be started.
    """
    argv = command_line(words, "wan-loader profile")
    with tempfile.TemporaryDirectory(prefix="wan-loader-", ignore_cleanup_errors=True) as temporary:
        home = Path(temporary)
        (home / "spans").mkdir()
        furnish(home, _AGENT, _PACKAGE, _START)
        start_ns = clock_ns()
        deadline_ns = start_ns + int(seconds * 1e9) if seconds else None
        environ = _environment(home, until, deadline_ns)
        try:
            child = subprocess.Popen(argv, env=environ, stdout=stdout)
        except OSError as error:
            raise OptionError.because(f"cannot be started: {error.strerror}", path=argv[0]) from error
        stopper = _Stopper(home / "spans", child, deadline_ns if stop else None, until=stop and bool(until))
        watcher = Watcher(child.pid, stopper.stop_if_due)
        with forwarded_signals(child):
            watcher.start()
            with suppress(ChildProcessError):  # a signal that was passed on found it ended, and has waited for it
                os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
            end_ns = clock_ns()
            watcher.finish()
            child.wait()
        return Recording(
            argv=tuple(argv),
            pid=child.pid,
            start_ns=start_ns,
            end_ns=end_ns,
            returncode=child.returncode,
            logs=read_logs(home / "spans"),
            seen=tuple(watcher.seen),
            directory=os.getcwd(),
            own_python=_is_own(argv[0]),
            stopped=stopper.stopped,
        )


def _is_own(program: str) -> bool:
    """Say whether a program lies beside the Python of this one: environments link to one and the same."""
    found = shutil.which(program)
    return found is not None and os.path.dirname(os.path.abspath(found)) == os.path.dirname(sys.executable)


def _environment(home: Path, until: str | None, deadline_ns: int | None) -> dict[str, str]:
    environ = environment(home)
    environ.pop("WAN_LOADER_TRACE_UNTIL", None)
    environ.pop("WAN_LOADER_TRACE_DEADLINE", None)
    if until:
        environ["WAN_LOADER_TRACE_UNTIL"] = until
    if deadline_ns:
        environ["WAN_LOADER_TRACE_DEADLINE"] = str(deadline_ns)
    return environ


class _Stopper:
    """The end of a program that was asked for: SIGTERM, and SIGKILL ten seconds later."""

    def __init__(
        self, directory: Path, child: subprocess.Popen[bytes], deadline_ns: int | None, *, until: bool
    ) -> None:
        self.stopped = ""
        self._directory = directory
        self._child = child
        self._deadline_ns = deadline_ns
        self._until = until
        self._kill_ns: int | None = None

    def stop_if_due(self) -> None:
        """Look if it is time."""
        now = clock_ns()
        if self._kill_ns is not None:
            if now > self._kill_ns:
                self._child.kill()
        # only with --stop: otherwise the recording ends by itself, inside the program
        elif self._deadline_ns is not None and now > self._deadline_ns:
            self._stop("the time given with --for was over")
        elif self._until and any(b'"why": "until"' in p.read_bytes() for p in self._directory.glob("*")):
            self._stop("the text given with --until was printed")

    def _stop(self, why: str) -> None:
        self.stopped = why
        self._kill_ns = clock_ns() + int(_KILL_S * 1e9)
        self._child.terminate()
