"""A profile of a part of this process: a notebook's cell, a service's start.

The hooks are those of `wan-loader profile -- PROGRAM`. They are put in place when the block begins and taken back when
it ends. What else this process starts meanwhile is seen from outside, and forked workers from inside.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from wan_loader.errors import OptionError
from wan_loader.events import clock_ns
from wan_loader.profiler.logs import read_logs
from wan_loader.profiler.watch import Watcher

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Any

    from wan_loader.profiler.analysis.session import Session

__all__ = ["Profile", "profile"]

_running: list[Profile] = []


class Profile:
    """The profile of a block; made by `profile`."""

    def __init__(self, *, ceilings: bool = False) -> None:
        self._measures = ceilings
        self._session: Session | None = None
        self._recorder: Any = None

    def __repr__(self) -> str:
        state = "running" if self._recorder is not None else "done" if self._session is not None else "not started"
        return f"Profile({state})"

    @property
    def session(self) -> Session:
        """What was recorded, with its verdict and advice; `session.to_json()` is the document of `-o`.

        Raises:
            OptionError: The block has not ended yet.
        """
        if self._session is None:
            raise OptionError.because("there is nothing to report yet", "ask after the `with` block")
        return self._session

    def report(self) -> None:
        """Print the report: a table in a terminal, and in a notebook."""
        from wan_loader.console import PlainConsole
        from wan_loader.profiler.render.terminal import print_session

        print_session(PlainConsole(), self.session)

    def __enter__(self) -> Profile:
        from wan_loader.profiler.agent import boot
        from wan_loader.profiler.probe.surroundings import before_recording

        if _running:
            raise OptionError.because("a profile is running in this process", "end it first: they do not nest")
        _running.append(self)
        self._session = None
        self._before = before_recording()
        self._directory = tempfile.TemporaryDirectory(prefix="wan-loader-", ignore_cleanup_errors=True)
        self._start_ns = clock_ns()
        self._recorder = boot.start_inside(self._directory.name)
        self._watcher = Watcher(os.getpid())
        self._watcher.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        from wan_loader.profiler.agent import boot

        recorder, self._recorder = self._recorder, None
        try:
            with self._directory:
                boot.finish_inside(recorder)
                end_ns = clock_ns()
                self._watcher.finish()
                logs = read_logs(Path(self._directory.name))
        finally:
            _running.remove(self)
        self._session = self._judge(logs, end_ns)

    def _judge(self, logs: Any, end_ns: int) -> Session:
        from wan_loader.profiler.analysis.assemble import program_session
        from wan_loader.profiler.analysis.merge import merge
        from wan_loader.profiler.analysis.weight_files import device_of, files_of, programs_of
        from wan_loader.profiler.probe.surroundings import surroundings
        from wan_loader.profiler.program import Recording

        recording = Recording(
            argv=tuple(sys.orig_argv),
            pid=os.getpid(),
            start_ns=self._start_ns,
            end_ns=end_ns,
            returncode=0,
            logs=logs,
            seen=tuple(self._watcher.seen),
            inside=True,
            directory=os.getcwd(),
        )
        processes = merge(recording)
        device = "cuda:0" if device_of(processes) == "cuda" else "cpu"
        files = files_of(processes)
        around = surroundings(
            list(files), device, self._before, measure=self._measures, known=True, programs=programs_of(files)
        )
        return program_session(recording, processes, around)


def profile(*, ceilings: bool = False) -> Profile:
    """Profile a block of this process.

    ```python
    with wan_loader.profile() as p:
        pipe = WanPipeline.from_pretrained(...)
    p.report()
    ```

    Args:
        ceilings: Measure after the block what this machine can do, where that is not known yet. It takes seconds, and
            imports torch.

    Returns:
        A context manager: one block at a time in a process. Only what happens in the block is recorded, in all threads.
    """
    return Profile(ceilings=ceilings)
