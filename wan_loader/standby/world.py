"""What a process gets from whoever starts it: taken from the client, and given to the process that was forked for it.

What cannot be given (parent, session, controlling terminal, cgroup) is listed in docs/design/standby.md; where it
decides what a process may do, and the two sides differ, there is no fork.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import os
import resource
import signal
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

from wan_loader._version import __version__
from wan_loader.system.peers import MAX_FDS

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["FIRST_OWN", "assume", "assume_limits", "capture", "different_identity", "identity", "inherited", "refusal"]

#: Descriptors below are the program's, as many as can come with its directory: the server keeps its own above.
FIRST_OWN = MAX_FDS - 1
_OPEN_FILES = "RLIMIT_NOFILE"
_LIMITS = [name for name in dir(resource) if name.startswith("RLIMIT_") and name != "RLIMIT_OFILE"]
_NAMESPACES = ("mnt", "pid", "net", "user", "ipc", "uts")
_PRIVILEGES = ("Uid", "Gid", "Groups", "CapEff", "CapBnd", "NoNewPrivs", "Seccomp")
_PR_SET_PDEATHSIG = 1
#: Of a library with this in its name, the function that says how many threads it may have.
_THREADS = (
    ("gomp", "omp_set_num_threads"),
    ("omp5", "omp_set_num_threads"),
    ("libomp", "omp_set_num_threads"),
    ("openblas", "openblas_set_num_threads"),
    ("openblas", "scipy_openblas_set_num_threads64_"),
)


def identity() -> dict[str, Any]:
    """Return what must be the same in a server and in a program that it forks, each under what a user calls it."""
    privileges = dict(line.split(":", 1) for line in _status().splitlines())
    return {
        "version of wan-loader": __version__,
        "Python": [os.path.realpath(sys.executable), sys.prefix, sys.version],
        "set of options of Python (-W, -X, ...)": _options(),
        "search path of modules": [path for path in sys.path[not sys.flags.safe_path :] if path],
        "container or namespace": [os.readlink(f"/proc/self/ns/{name}") for name in _NAMESPACES]
        + [os.stat("/").st_ino],
        "set of privileges": [privileges.get(name, "").split() for name in _PRIVILEGES],
    }


def _status() -> str:
    with open("/proc/self/status") as file:
        return file.read()


def _options() -> list[Any]:
    # one of the flags says whether UTF-8 mode is on; by what (an option, a variable, no locale) is no difference
    others = sorted([name, value] for name, value in sys._xoptions.items() if name != "utf8")
    return [list(sys.flags), list(sys.warnoptions), others]


def different_identity(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    """Say what differs between a server and a client; nothing if they are the same."""
    return next((f"another {name}" for name in ours if ours[name] != theirs.get(name)), "")


def inherited() -> list[int]:
    """List the descriptors that this process was given: those which a program that it starts would get as well."""
    fds = []
    for fd in sorted(int(name) for name in os.listdir("/proc/self/fd")):
        with contextlib.suppress(OSError):  # that of the directory
            if os.get_inheritable(fd):
                fds.append(fd)
    return fds


def capture() -> dict[str, Any]:
    """Describe what this process was given."""
    os.umask(umask := os.umask(0o077))
    return {
        "identity": identity(),
        "pid": os.getpid(),
        "executable": sys.executable,
        "argv": sys.argv,
        "orig_argv": sys.orig_argv,
        "path": sys.path,
        "environ": dict(os.environ),
        "unbuffered": any(getattr(stream, "write_through", False) for stream in (sys.__stdout__, sys.__stderr__)),
        "umask": umask,
        "limits": {name: resource.getrlimit(getattr(resource, name)) for name in _LIMITS},
        "processors": sorted(os.sched_getaffinity(0)),
        "nice": os.getpriority(os.PRIO_PROCESS, 0),
        "ignored": [int(n) for n in signal.valid_signals() if signal.getsignal(n) is signal.SIG_IGN],
        "blocked": [int(n) for n in signal.pthread_sigmask(signal.SIG_BLOCK, ())],
        "fds": inherited(),
    }


def assume_limits(given: dict[str, Any]) -> str:
    """Take on limits, processors and priority; say which cannot be had. That of open files `assume` sets."""
    os.umask(given["umask"])
    for name, limits in given["limits"].items():
        try:
            if name == _OPEN_FILES:  # descriptors of a program come above those that it may have
                limits = [max(limits[1], resource.getrlimit(resource.RLIMIT_NOFILE)[1])] * 2
            resource.setrlimit(getattr(resource, name), tuple(limits))
        except (OSError, ValueError):
            return f"a higher limit ({name}) than the server has"
    try:
        os.sched_setaffinity(0, given["processors"])
        os.setpriority(os.PRIO_PROCESS, 0, given["nice"])
    except OSError as error:
        return f"processors or a priority that the server may not have: {error.strerror}"
    return ""


def refusal(given: dict[str, Any]) -> str:
    """Say why a program cannot be handed over at all; nothing if it can."""
    high = [fd for fd in given["fds"] if fd >= FIRST_OWN]
    return f"descriptor {high[0]}, which is above {FIRST_OWN - 1}" if high else ""


def assume(
    given: dict[str, Any], fds: list[int], before: Mapping[str, str], set_by_imports: Mapping[str, str | None]
) -> None:
    """Become the process that the client would be, but for what it inherits in other ways.

    Args:
        given: What `capture` has described.
        fds: Its descriptors, in their order, and its working directory; they are placed, and closed here.
        before: The environment that libraries have found when they were loaded.
        set_by_imports: Variables that imports have set, or taken out, and would again.
    """
    _end_with_parent()
    os.setpgid(0, 0)
    *fds, cwd = fds
    os.fchdir(cwd)
    os.close(cwd)
    _place(given["fds"], fds)
    resource.setrlimit(resource.RLIMIT_NOFILE, tuple(given["limits"][_OPEN_FILES]))
    os.environ.clear()
    os.environ.update(given["environ"])
    for name, value in set_by_imports.items():
        os.environ.pop(name, None) if value is None else os.environ.update({name: value})
    time.tzset()
    sys.argv[:], sys.orig_argv[:], sys.path[:] = given["argv"], given["orig_argv"], given["path"]
    sys.executable = given["executable"]
    sys.path_importer_cache.clear()
    _set_signals(given)
    _renew_streams(given)
    _renew_random_state()
    _renew_facts()
    _set_threads(given, before)


def _end_with_parent() -> None:
    """End when the process ends that watches over this one."""
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def _place(numbers: list[int], fds: list[int]) -> None:
    """Give descriptors the numbers that they have in the client. None of theirs is that of one that came."""
    os.closerange(0, FIRST_OWN)
    for number, fd in zip(numbers, fds, strict=True):
        os.dup2(fd, number)
        os.close(fd)


def _set_signals(given: dict[str, Any]) -> None:
    """Set what is ignored and blocked as in the client; what imports have set otherwise stays."""
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        ignored = signal.getsignal(number) is signal.SIG_IGN
        if ignored != (number in given["ignored"]):
            default = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
            signal.signal(number, default if ignored else signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, given["blocked"])


def _renew_streams(given: dict[str, Any]) -> None:
    """Make the standard streams anew, as Python does at its start; they stay the objects that libraries have."""
    for fd, name in enumerate(("stdin", "stdout", "stderr")):
        stream: Any = getattr(sys, f"__{name}__")
        if fd not in given["fds"]:
            setattr(sys, name, None)
            setattr(sys, f"__{name}__", None)
        elif stream is not None:
            raw = io.FileIO(fd, "w" if fd else "r", closefd=False)
            raw.name = f"<{name}>"
            at_once = given["unbuffered"]
            buffer: Any = io.BufferedReader(raw) if fd == 0 else raw if at_once else io.BufferedWriter(raw)
            in_lines = not at_once and (fd == 2 or raw.isatty())
            stream.__init__(buffer, stream.encoding, stream.errors, "\n", in_lines, at_once)


def _renew_random_state() -> None:
    """Draw anew what libraries draw when they are imported."""
    if "random" in sys.modules:
        sys.modules["random"].seed()
    if "numpy.random" in sys.modules:
        sys.modules["numpy.random"].seed()
    if "torch" in sys.modules:
        sys.modules["torch"].default_generator.seed()
    if "multiprocessing.process" in sys.modules:
        sys.modules["multiprocessing.process"].current_process().authkey = os.urandom(32)


def _renew_facts() -> None:
    """Have libraries know what they have asked for when they were imported: the directory, the number of the thread."""
    threading.main_thread()._set_native_id()  # type: ignore[attr-defined]
    if "multiprocessing.process" in sys.modules:
        with contextlib.suppress(OSError):  # it has been deleted
            sys.modules["multiprocessing.process"].ORIGINAL_DIR = os.getcwd()  # type: ignore[attr-defined]


def _set_threads(given: dict[str, Any], before: Mapping[str, str]) -> None:
    """Tell libraries how many threads they may have, if that is another number than when they were loaded."""
    wanted, found = given["environ"].get("OMP_NUM_THREADS"), before.get("OMP_NUM_THREADS")
    if wanted == found:
        return
    n_threads = int(wanted) if wanted and wanted.isdigit() else len(os.sched_getaffinity(0))
    with open("/proc/self/maps") as maps:
        libraries = {line.split(None, 5)[5].strip() for line in maps if ".so" in line and "/" in line}
    for path in libraries:
        for part, function in _THREADS:
            if part in os.path.basename(path):
                with contextlib.suppress(OSError, AttributeError):
                    getattr(ctypes.CDLL(path), function)(n_threads)
