"""Programs as processes of their own, without each of them importing torch.

A zygote imports it once and forks. Where the import itself, an environment that Python reads when it starts, Ctrl-C
during the start, or how the interpreter takes modules apart at its end is the point, `subprocess` is the way.
"""

import atexit
import contextlib
import functools
import hashlib
import itertools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import types
import weakref
from pathlib import Path

ROOT = Path(__file__).parents[1]
#: What typer imports when a command is run is here as well.
COMMAND = ("typer", "pydantic.json_schema", "pydantic.type_adapter", "rich.progress", "rich.table", "platformdirs")
TORCH = ("torch", "safetensors.torch", "numpy", *COMMAND)
DISTRIBUTED = (*TORCH, "torch.distributed.fsdp", "torch._dynamo")  # which torch imports for collectives on DTensors
PIPELINE = (*TORCH, "diffusers.pipelines.wan.pipeline_wan", "transformers.models.umt5.modeling_umt5", "imageio_ffmpeg")

_STARTING = threading.Lock()


def _zygote(modules):
    with _STARTING:  # a way that another thread had opened meanwhile would be open while the end is waited for
        return _way_to_zygote(modules)


@functools.cache
def _way_to_zygote(modules):
    """Return a way to a zygote, which all workers of a run of tests share: the first that needs it starts it."""
    run = os.environ.setdefault("PYTEST_XDIST_TESTRUNUID", f"{os.getpid()}")  # processes that this one starts, too
    name = "\0wan-loader-tests-" + hashlib.sha256(f"{run} {modules}".encode()).hexdigest()[:32]
    while True:
        ours = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with contextlib.suppress(ConnectionRefusedError):  # nobody listens: not yet, or no more
            ours.connect(name)
            atexit.register(ours.close)
            return ours
        ours.close()
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            try:
                listener.bind(name)
            except OSError:  # another worker was faster
                time.sleep(0.01)
                continue
            listener.listen()
            _start_zygote(listener, modules)


def _start_zygote(listener, modules):
    """Start one; it ends with the last worker, for which the one that started it waits for a while."""
    command = [sys.executable, ROOT / "tests" / "zygote.py", str(listener.fileno()), *modules]
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}",
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
        "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # CUDA that has begun here would not work in forks
    }
    nothing = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, pass_fds=[listener.fileno()], env=environment, **nothing)

    def wait():
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)

    atexit.register(wait)


class Program:
    """A process of a zygote, as far as anybody needs it like `subprocess.Popen`: its output is kept, not piped.

    `words` are what would stand behind `python`: -m MODULE, -c CODE or SCRIPT, and arguments.
    """

    def __init__(self, *words, modules=TORCH, env=None, cwd=None, stdin=None, stdout=None, stderr=None):
        self.args = [str(word) for word in words]
        self.returncode = None
        self._output = [os.memfd_create("stdout"), os.memfd_create("stderr")]
        self._answers, write = os.pipe()
        weakref.finalize(self, _close, *self._output, self._answers)
        with open(os.devnull, "r+") as nothing:
            out, err = (
                kept if given in (None, subprocess.PIPE) else nothing if given is subprocess.DEVNULL else given
                for given, kept in zip((stdout, stderr), self._output, strict=True)
            )
            fds = [nothing if stdin is None else stdin, out, out if err is subprocess.STDOUT else err, write]
            request = {"words": self.args, "cwd": str(cwd or os.getcwd()), "env": dict(env or os.environ)}
            fds = [fd if isinstance(fd, int) else fd.fileno() for fd in fds]
            socket.send_fds(_zygote(modules), [json.dumps(request).encode()], fds)
        _close(write)
        self.pid = int(os.read(self._answers, 20))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.wait()

    def poll(self, timeout=0.0):
        """Return the exit code as `subprocess` gives it, or None if the program still runs after `timeout` seconds."""
        if self.returncode is None and select.select([self._answers], [], [], timeout)[0]:
            self.returncode = int(os.read(self._answers, 20))
        return self.returncode

    def wait(self, timeout=None):
        """Return the exit code; a program that takes longer is killed."""
        if self.poll(timeout) is None:
            self.kill()
            raise subprocess.TimeoutExpired(self.args, timeout, *self.output())
        return self.returncode

    def communicate(self, timeout=None):
        """Wait, and return the output."""
        self.wait(timeout)
        return self.output()

    def output(self):
        """Return what has come to stdout and to stderr, with line ends as `text=True` gives them."""
        texts = [os.pread(fd, 1 << 30, 0).decode() for fd in self._output]
        return tuple(text.replace("\r\n", "\n").replace("\r", "\n") for text in texts)

    def send_signal(self, number):
        """Send a signal to a program that still runs."""
        if self.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self):
        """End a program that still runs."""
        self.send_signal(signal.SIGKILL)


def _close(*fds):
    for fd in fds:
        os.close(fd)


def run(*words, timeout=60.0, env=None, **options):
    """Run a program to its end: `subprocess.run` with captured text; `env` comes on top of what there is."""
    program = Program(*words, env={**os.environ, **(env or {})}, **options)
    return subprocess.CompletedProcess(program.args, program.wait(timeout), *program.output())


def forking(modules=TORCH):
    """Return what a benchmark may use as `subprocess`: the Python processes that it starts come from a zygote."""

    def popen(command, *, text=True, **options):
        command = list(map(str, command))
        if command[0] != sys.executable:
            return subprocess.Popen(command, text=text, **options)
        return Program(*command[1:], modules=modules, **options)

    def run(command, *, text=True, capture_output=True, check=False, **options):
        program = popen(command, **({"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options))
        output = program.communicate()
        done = subprocess.CompletedProcess(command, program.returncode, *output)
        if check:
            done.check_returncode()
        return done

    return types.SimpleNamespace(**vars(subprocess) | {"Popen": popen, "run": run})


def python_that_forks(directory, modules=TORCH):
    """Write a program that is called as `python` is, but runs what it is to run in a fork of a zygote; return its path.

    It ends as that does, but who kills it does not kill that.
    """
    path = directory / "python"
    imports = f"import sys; sys.path[0] = {str(ROOT / 'tests')!r}; from programs import stand_in_for_python"
    path.write_text(f"#!{sys.executable}\n{imports}\nstand_in_for_python({modules!r})\n")
    path.chmod(0o755)
    return path


def stand_in_for_python(modules):
    """Be what `python_that_forks` writes."""
    words = itertools.dropwhile(lambda word: word.startswith("-") and word not in ("-m", "-c"), sys.argv[1:])
    program = Program(*words, modules=modules, stdin=0, stdout=1, stderr=2)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: program.send_signal(number))
    code = program.wait()
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    sys.exit(code)


def wan_loader(*words, timeout=60.0, stdin=None, stdout=None, cwd=None, **environment):
    """Run the command where there is no GPU, in a wide terminal; `environment` may say otherwise."""
    env = {"CUDA_VISIBLE_DEVICES": "", "COLUMNS": "200", **environment}
    return run("-m", "wan_loader", *words, env=env, timeout=timeout, stdin=stdin, stdout=stdout, cwd=cwd)


def wan_loader_itself(*words, prefix=(), stdout=subprocess.PIPE, **environment):
    """Run the command as a user does, from the start of Python on."""
    return subprocess.run(
        [*prefix, sys.executable, "-m", "wan_loader", *map(str, words)],
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "200", **environment},
    )


def check_error(done, *words, code=1):
    """Nothing on stdout, one line "error: ..." on stderr that has all the words, no traceback."""
    assert done.returncode == code, done.stderr
    assert not done.stdout
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1, done.stderr
    for word in words:
        assert str(word) in done.stderr


def check_usage(done, *words):
    """Nothing on stdout, the mistake on stderr with all the words, no traceback."""
    assert done.returncode == 2, done.stderr
    assert not done.stdout
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr
