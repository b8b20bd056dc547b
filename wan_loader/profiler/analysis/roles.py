"""What a process is there for, as its command line says: launching others, helping Python, working. Pure.

A launcher starts the script that the user is asking about, and waits for it. The report is about the script.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["HELPER", "LAUNCHER", "WORKER", "name_of", "role_of", "script_words"]

LAUNCHER, HELPER, WORKER = "launcher", "helper", "worker"
_PROGRAMS = frozenset({"torchrun", "accelerate", "deepspeed", "mpirun", "mpiexec", "horovodrun", "srun"})
_MODULES = frozenset(
    {
        "torch.distributed.run",
        "torch.distributed.launch",
        "torch.distributed.elastic",
        "accelerate.commands.launch",
        "accelerate.commands.accelerate_cli",
        "accelerate",
        "deepspeed.launcher.launch",
        "deepspeed.launcher.runner",
    }
)
_SHELLS = frozenset({"sh", "bash", "dash", "zsh"})
_WRAPPERS = frozenset({"env", "time", "timeout", "nice", "uv", "poetry", "conda", "xvfb-run"})
#: What stands behind `python -c` in processes that Python's multiprocessing starts.
_HELPERS = ("from multiprocessing.resource_tracker", "from multiprocessing.forkserver")
_SPAWNED = "from multiprocessing.spawn"
#: Options of Python that take a word of their own.
_WITH_WORD = ("-X", "-W", "--check-hash-based-pycs")


def role_of(argv: Sequence[str], *, forked: bool = False) -> str:
    """Return the role of a process, "" for a program of the user's.

    Args:
        argv: Its command line.
        forked: It was forked from another Python process, whose command line it has.
    """
    kind, subject = _subject(argv)
    if kind == "-c" and subject.startswith(_HELPERS):
        # what a fork server forks are the workers
        return WORKER if forked else HELPER
    if forked or (kind == "-c" and subject.startswith(_SPAWNED)):
        return WORKER
    launches = subject in _MODULES if kind == "-m" else _base(subject) in _PROGRAMS | _SHELLS | _WRAPPERS
    return LAUNCHER if launches else ""


def name_of(argv: Sequence[str]) -> str:
    """Return a short name: the script or module, without Python and directories; "" for what multiprocessing starts."""
    kind, subject = _subject(argv)
    if kind == "-c":
        return "" if subject.startswith((*_HELPERS, _SPAWNED)) else "python -c"
    if kind == "-m":
        return f"-m {subject}"
    name = _base(subject)
    if name in _SHELLS and len(argv) > 1 and not argv[1].startswith("-"):
        return f"{name} {_base(argv[1])}"
    # programs of several commands are known by both words
    return f"{name} launch" if name in _PROGRAMS and "launch" in argv else name


def script_words(argv: Sequence[str]) -> tuple[str, ...]:
    """Return the script, or -m and the module, with its arguments; empty where Python itself has options."""
    kind, subject = _subject(argv)
    words = tuple(argv[1:])
    is_python = bool(argv) and _base(argv[0]).startswith(("python", "pypy"))
    first = words[:1] == (kind or subject,)
    return words if is_python and kind != "-c" and first and words[:1] != ("",) else ()


def _base(path: str) -> str:
    return path.rpartition("/")[2]


def _subject(argv: Sequence[str]) -> tuple[str, str]:
    """Return how a process was told what to run ("-c", "-m", "" for a file), and what."""
    if not argv:
        return "", ""
    if not _base(argv[0]).startswith(("python", "pypy")):
        return "", argv[0]
    words = iter(argv[1:])
    for word in words:
        if word in ("-c", "-m"):
            return word, next(words, "")
        if word in _WITH_WORD:
            next(words, "")
        elif not word.startswith("-"):
            return "", word
    return "", argv[0]
