"""Questions about the machine's devices, asked in a process that ends with the answer.

Libraries ask while they are imported whether there is a GPU. Who asks the driver, or its management library, has a
thread of theirs from then on, and forks of such a process can use no CUDA.
"""

from __future__ import annotations

import os
import pickle
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Elsewhere"]

#: Where torch asks, by module and name; what one version lacks is left alone.
_QUESTIONS = (
    ("torch._C", "_cuda_getDeviceCount"),
    ("torch._C", "_accelerator_getAccelerator"),
    ("torch.cuda", "_device_count_nvml"),
)
#: What the answer depends on.
_VARIABLE = "CUDA_VISIBLE_DEVICES"


class Elsewhere:
    """From `begin` to `close`, torch of this process asks for devices in forks; each question once."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, str], Any] = {}

    def begin(self) -> None:
        """Have torch ask elsewhere, if it has been imported; again does nothing."""
        if "torch.cuda" not in sys.modules or self._found:
            return
        for place in _QUESTIONS:
            function = getattr(sys.modules.get(place[0]), place[1], None)
            if function is not None:
                self._found[place] = function
                setattr(sys.modules[place[0]], place[1], _asked_once(function))

    def close(self) -> None:
        """Have torch ask for itself again."""
        for (module, name), function in self._found.items():
            setattr(sys.modules[module], name, function)
        self._found.clear()


def _asked_once(function: Callable[[], Any]) -> Callable[..., Any]:
    """Return what answers as a function does, but in a fork, which begins what it will."""
    answers: list[Any] = []

    def ask(*args: Any, **options: Any) -> Any:
        os.environ.get(_VARIABLE)  # seen, as if it had been read here
        if not answers:
            answers.append(_in_a_fork(lambda: function(*args, **options)))
        return answers[0]

    return ask


def _in_a_fork(question: Callable[[], Any]) -> Any:
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        code = 1
        try:
            os.write(writer, pickle.dumps(question()))
            code = 0
        finally:
            os._exit(code)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        answer = pipe.read()
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
        raise RuntimeError("the process that asked for devices has ended without an answer")
    return pickle.loads(answer)
