"""Any program with the fast path in each Python process that it starts; each counts, and the counts are summed up."""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from wan_loader.errors import OptionError
from wan_loader.fastpath.launch import waiting
from wan_loader.fastpath.launch.tallies import sum_up
from wan_loader.system.programs import command_line, environment, forwarded_signals, furnish

if TYPE_CHECKING:
    from collections.abc import Sequence

    from wan_loader.fastpath.tally import Tally

__all__ = ["Ended", "run_program"]

_NAME = "_wan_loader_waiting"
_START = f"import {_NAME}; {_NAME}.begin(os.path.join(_here, 'tallies'))"


class Ended(NamedTuple):
    """A program that has ended."""

    returncode: int
    """The exit code as subprocess has it: negative for a signal."""
    tally: Tally
    """The sum of what its processes have counted."""
    n_processes: int
    """How many processes have left counts: those that have imported torch and ended by themselves."""


def run_program(words: Sequence[str]) -> Ended:
    """Run a program to its end.

    Raises:
        OptionError: It cannot be started.
    """
    argv = command_line(words, "wan-loader run")
    with tempfile.TemporaryDirectory(prefix="wan-loader-", ignore_cleanup_errors=True) as temporary:
        home = Path(temporary)
        tallies = home / "tallies"
        tallies.mkdir()
        furnish(home, Path(waiting.__file__), _NAME, _START)
        try:
            child = subprocess.Popen(argv, env=environment(home))
        except OSError as error:
            raise OptionError.because(f"cannot be started: {error.strerror}", path=argv[0]) from error
        with forwarded_signals(child):
            child.wait()
        return Ended(child.returncode, *sum_up(tallies))
