"""Fresh processes: one answers one request, and an answer comes back whatever becomes of the process.

A process that crashes, hangs or is killed is an answer too. It gets a session of its own: when it is over, or out of
time, or the bench is interrupted, everything that it started is killed with it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import wan_loader
from wan_loader.sizes import format_seconds

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["ask"]

_LAST_WORDS = 400


def ask(request: Mapping[str, Any], *, time_limit_s: float) -> dict[str, Any]:
    """Run a request in a fresh process, and wait for it.

    Args:
        request: What `sample.answer` is to do, as JSON holds it.
        time_limit_s: A process that takes longer is ended.

    Returns:
        The answer: {"status": "ok" | "not applicable" | "failed" | "wrong" | "crashed" | "hung", ...}.
    """
    with tempfile.TemporaryDirectory(prefix="wan-loader-") as temporary:
        result, log = Path(temporary) / "result.json", Path(temporary) / "log"
        with log.open("wb") as output:
            child = subprocess.Popen(
                # -P: no file of the current directory is taken for a module
                [sys.executable, "-P", "-m", "wan_loader.bench.sample"],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=_environment(),
                start_new_session=True,
            )
        try:
            # the answer comes in a file: what a loader prints goes to the log
            child.communicate(json.dumps({**request, "result": str(result)}).encode(), timeout=time_limit_s)
        except subprocess.TimeoutExpired:
            reason = f"no end after {format_seconds(time_limit_s)}: ended; if it is only slow, raise --time-limit"
            return {"status": "hung", "reason": reason}
        finally:
            _end(child)
        try:
            answer = json.loads(result.read_bytes())
        except (OSError, ValueError):
            return {"status": "crashed", "reason": _why(child.returncode, log)}
        return answer if isinstance(answer, dict) else {"status": "crashed", "reason": "answered nonsense"}


def _environment() -> dict[str, str]:
    """Let the child find this package wherever it was found here; nobody asks the network for anything."""
    home = str(Path(wan_loader.__file__).parent.parent)
    paths = [home, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    return {**os.environ, **offline, "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths))}


def _end(child: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError, PermissionError):
        # the child leads a session, hence a group, of that number; helpers that it left behind are in it
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _why(returncode: int, log: Path) -> str:
    if returncode < 0:
        name = signal.Signals(-returncode).name
        text = f"killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
    else:
        text = f"ended with exit code {returncode} and no result"
    words = " ".join(log.read_bytes()[-_LAST_WORDS:].decode(errors="replace").split())
    return f"{text}; its last words: {words}" if words else text
