"""The end of a program that was forked: as Python's own, but that what the server has imported is not taken apart.

That would copy all of it first, for seconds. What the program has made is finalised: files are written out.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import os
import signal
import sys
import threading
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from collections.abc import Callable, Container

__all__ = ["run_to_end"]

#: Python's exit code where what was printed cannot be written.
_UNWRITTEN = 120
_FOR_GOOD_S = 3600.0


def run_to_end(function: Callable[[], object], known: Container[str]) -> NoReturn:
    """Call a function, and end the process as Python does after the last line of a program.

    Args:
        function: It may raise whatever a program may.
        known: The modules that are not the program's own.
    """
    code = _code_of(function)
    with contextlib.suppress(BaseException):  # as Python does, which tells of them
        threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    _finalise(known)
    if not _flushed():
        code = code or _UNWRITTEN
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code & 0xFF)


def _code_of(function: Callable[[], object]) -> int:
    """Call it; return the exit code, or the negative number of the signal to end by."""
    try:
        function()
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return (end.code or 0) & 0xFF
        with contextlib.suppress(OSError, ValueError, AttributeError):
            sys.stderr.write(f"{end.code}\n")
        return 1
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        return -signal.SIGINT if type(error) is KeyboardInterrupt else 1  # as Python, which knows no other
    return 0


def _finalise(known: Container[str]) -> None:
    """Let go of what the program's own modules hold, and of what holds itself."""
    sys.setswitchinterval(_FOR_GOOD_S)  # threads that are left get no turn, as at Python's own end
    sys.last_value = sys.last_traceback = None
    for name in [name for name in sys.modules if name == "__main__" or name not in known]:
        with contextlib.suppress(Exception):
            values: dict[str, Any] = vars(sys.modules[name])
            for key in [key for key in values if key[:2] != "__"]:
                values[key] = None
    gc.collect()


def _flushed() -> bool:
    """Write out what was printed; say whether that could be done."""
    done = True
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None and not stream.closed:
                stream.flush()
        except (OSError, ValueError) as error:
            done = stream is sys.stderr and done
            with contextlib.suppress(OSError, ValueError, AttributeError):
                sys.stderr.write(f"Exception ignored in: {stream!r}\n{type(error).__name__}: {error}\n")
        except AttributeError:  # what the program has put in its place
            continue
    return done
