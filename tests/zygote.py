"""A process that has imported what programs need, and forks one for each that is asked for: see programs.py.

    python zygote.py SOCKET MODULE...

It listens at the socket, and ends when all who had connected have gone. A request is a JSON document with three streams
and a pipe, on which the pid and the status of the program come back. A program sees what it would see in a process of
its own, but that the modules are there.
"""

import atexit
import contextlib
import faulthandler
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import stat
import sys
import threading
import types


def serve(listener):
    """Return the request of a program, in its process; end when nobody can ask any more."""
    callers = []
    while True:
        for ready in select.select([listener, *callers], [], [])[0]:
            if ready is listener:
                callers.append(listener.accept()[0])
                continue
            message, fds, _, _ = socket.recv_fds(ready, 1 << 20, 4)
            if not message:
                callers.remove(ready)
                ready.close()
            elif not os.fork():
                for each in (listener, *callers):
                    each.close()
                keep(fds)
                return json.loads(message)
            for fd in fds:
                os.close(fd)
        if not callers and not select.select([listener], [], [], 0)[0]:
            sys.exit()
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def keep(fds):
    """Fork the program, which returns, and stay to say what becomes of it."""
    *streams, answers = fds
    if pid := os.fork():
        for fd in streams:
            os.close(fd)
        os.write(answers, b"%20d" % pid)
        os.write(answers, b"%20d" % os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        os._exit(0)
    os.close(answers)
    for place, fd in enumerate(streams):
        os.dup2(fd, place)
        os.close(fd)


def run(request):
    """Do what `python` does with words."""
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    signal.signal(signal.SIGINT, signal.default_int_handler)  # though this may have begun in the background
    for name, fd in (("stdout", 1), ("stderr", 2)):
        if stat.S_ISFIFO(os.fstat(fd).st_mode):  # what this process began with can be sought in
            stream = getattr(sys, name)
            new = open(fd, "w", encoding=stream.encoding, errors=stream.errors, buffering=1, closefd=False)  # noqa: SIM115
            setattr(sys, name, new)
            setattr(sys, f"__{name}__", new)
    sys.executable = os.environ.get("PYTHON_EXEC", sys.executable)  # which torchrun looks at, too
    if os.environ.get("PYTHONFAULTHANDLER"):
        faulthandler.enable()
    first, *words = request["words"]
    if first == "-m":
        name, *words = words
        sys.argv = [name, *words]
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    elif first == "-c":
        code, *words = words
        sys.argv = [first, *words]
        sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(code, "<string>", "exec"), vars(sys.modules["__main__"]))
    else:
        sys.argv = [first, *words]
        runpy.run_path(first, run_name="__main__")


def end(code):
    """End as Python does, but for taking all modules apart, which costs more than most programs."""
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError):
            stream.flush()
    os._exit(code)


def main(handle, *modules):
    """Import, serve, and be the program that is asked for."""
    path = sys.path[1:]
    for name in modules:
        with contextlib.suppress(ModuleNotFoundError):  # a program that needs it says so itself
            importlib.import_module(name)
    gc.freeze()  # of no concern to the collections of programs, and so it stays shared
    request = serve(socket.socket(fileno=int(handle)))
    first = request["words"][0]
    others = filter(None, request["env"].get("PYTHONPATH", "").split(os.pathsep))
    sys.path[:] = ["" if first in ("-m", "-c") else os.path.dirname(first), *others, *path]
    try:
        run(request)
    except SystemExit as error:
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
        end(1 if isinstance(error.code, str) else int(error.code or 0))
    except BaseException:
        sys.last_type, sys.last_value, sys.last_traceback = sys.exc_info()
        sys.excepthook(*sys.exc_info())
        end(1)
    end(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
