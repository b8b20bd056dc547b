"""Programs that are started with something of ours in each Python process of theirs.

A sitecustomize in a directory at the head of PYTHONPATH begins it in every Python process that a program starts, and
then runs the sitecustomize that would have run without it. What cannot be reached this way (other languages,
`python -I`, `python -S`) stays as it is. A program keeps its standard streams, its signals and its exit code.
"""

from __future__ import annotations

import os
import py_compile
import shutil
import signal
import sys
import threading
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from wan_loader.errors import OptionError

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Iterator, Sequence
    from pathlib import Path

__all__ = ["command_line", "environment", "forwarded_signals", "furnish"]

_FORWARDED: tuple[int, ...] = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)

_SITECUSTOMIZE = """\
import os, sys
_here = os.path.dirname(os.path.abspath(__file__))
try:
    {start}
except Exception:
    pass
sys.path[:] = [p for p in sys.path if p != _here]
_self = sys.modules.pop("sitecustomize")
try:
    import sitecustomize
except ImportError as _error:
    if _error.name != "sitecustomize":
        raise
finally:
    sys.modules.setdefault("sitecustomize", _self)
"""


def command_line(words: Sequence[str], command: str) -> list[str]:
    """Complete the program to start: a script or `-m module` gets this Python in front.

    Args:
        words: The program and its arguments, as the user wrote them.
        command: The command of ours that starts it, for the message.

    Raises:
        OptionError: There is no program, or it cannot be executed.
    """
    if not words:
        raise OptionError.because("no program", f"write it after --, as in `{command} -- python generate.py`")
    if words[0] == "-m" or (words[0].endswith(".py") and not os.access(words[0], os.X_OK)):
        return [sys.executable, *words]
    if shutil.which(words[0]) is None:
        raise OptionError(f"program {words[0]!r} is not there, or is not executable")
    return list(words)


def furnish(home: Path, source: Path, name: str, start: str) -> None:
    """Fill a directory that is to stand at the head of PYTHONPATH.

    Args:
        home: The directory.
        source: A module or a package that needs nothing beside itself; it is copied, so that other Pythons find it.
        name: Its name there.
        start: A statement that imports it and begins; `_here` is the directory. If it fails, the program goes on.
    """
    if source.is_dir():
        shutil.copytree(source, home / name, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        shutil.copyfile(source, home / f"{name}.py")
    (home / "sitecustomize.py").write_text(_SITECUSTOMIZE.format(start=start))
    for path in (*home.glob("*.py"), *home.glob("*/*.py")):
        with suppress(py_compile.PyCompileError, OSError):
            # for the Python that runs here; another one compiles for itself
            py_compile.compile(str(path))


def environment(home: str | Path) -> dict[str, str]:
    """Return this process's environment with a directory at the head of PYTHONPATH."""
    before = os.environ.get("PYTHONPATH")
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(home), *filter(None, [before])])}


@contextmanager
def forwarded_signals(child: subprocess.Popen[bytes]) -> Iterator[None]:
    """Pass signals on to a program, which gets Ctrl-C from the terminal itself. This process outlives them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before: dict[int, Any] = {signal.SIGINT: signal.signal(signal.SIGINT, lambda *_: None)}
    for number in _FORWARDED:
        before[number] = signal.signal(number, lambda n, _: child.send_signal(n))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
