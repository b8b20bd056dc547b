"""The fast path in every Python program of an environment, whose commands cannot be changed.

One file in the environment's site-packages, which Python reads at each start, holds all of `waiting`: so a start reads
nothing else, and nothing breaks when this package is removed and the file is not.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from contextlib import suppress
from pathlib import Path

from wan_loader.errors import OptionError, OutputError
from wan_loader.fastpath.launch import waiting
from wan_loader.system.files import write_text

__all__ = ["disable", "enable", "enabled_file"]

_NAME = "wan_loader_enabled.pth"
_ABOUT = "# Written by `wan-loader enable`, removed by `wan-loader disable`.\n"
#: What a Python of the environment answers in which all is in place.
_CHECK = "import sys, wan_loader; sys.exit(not any(type(f).__name__ == '_Torch' for f in sys.meta_path))"


def enabled_file() -> Path:
    """Return the file that enables this environment, whether it is there or not."""
    return Path(sysconfig.get_path("purelib"), _NAME)


def enable() -> Path:
    """Have every Python program of this environment begin with the fast path. Again does no harm.

    Returns:
        The file that was written.

    Raises:
        OutputError: It cannot be written.
        OptionError: It would do nothing, as this package is not installed in this environment. Nothing is left then.
    """
    path = enabled_file()
    if not os.access(path.parent, os.W_OK):
        raise OutputError.because(
            "is no directory that you may write to", "run this as the environment's owner", path=path.parent
        )
    write_text(path, _text())
    environ = {name: value for name, value in os.environ.items() if name != "WAN_LOADER_ACCELERATE"}
    # isolated: as programs start that have no PYTHONPATH and another working directory
    done = subprocess.run([sys.executable, "-I", "-c", _CHECK], env=environ, capture_output=True, check=False)
    if done.returncode:
        path.unlink()
        raise OptionError.because(
            "has no wan-loader of its own, or reads no .pth files", "install it there", path=sys.prefix
        )
    return path


def disable() -> Path | None:
    """Take back what `enable` has done.

    Returns:
        The file that was removed; None if there was none.

    Raises:
        OutputError: It cannot be removed, or is not what `enable` writes.
    """
    path = enabled_file()
    try:
        with suppress(UnicodeDecodeError):
            if path.read_text().startswith(_ABOUT):
                path.unlink()
                return path
    except FileNotFoundError:
        return None
    except OSError as error:
        raise OutputError.because(f"cannot be removed: {error.strerror}", path=path) from error
    raise OutputError.because("is not what `wan-loader enable` writes", "look at it, and remove it", path=path)


def _text() -> str:
    """Return the lines of the file: Python executes those that begin with an import, each by itself."""
    code = Path(waiting.__file__).read_text() + "\n\nbegin()\n"
    run = f"exec({code!a}, {{'__name__': '_wan_loader_waiting'}})"
    return f"{_ABOUT}import os; os.environ.get('WAN_LOADER_ACCELERATE') == '0' or {run}\n"
