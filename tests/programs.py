"""Programs as processes of their own, without each of them importing torch.

A zygote imports it once and forks. Where the import itself, an environment that Python reads when it starts, or Ctrl-C
during the start is the point, `subprocess` is the way.
"""

import atexit
import functools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
TORCH = ("torch", "safetensors.torch", "numpy", "typer", "rich.progress", "rich.table")
PIPELINE = (*TORCH, "diffusers.pipelines.wan.pipeline_wan", "transformers.models.umt5.modeling_umt5", "imageio_ffmpeg")


@functools.cache
def _zygote(modules):
    """Start one; it ends with this process, which holds the other end of its socket."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    command = [sys.executable, ROOT / "tests" / "zygote.py", str(theirs.fileno()), *modules]
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}",
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
    }
    nothing = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=environment, **nothing)
    theirs.close()
    atexit.register(lambda: (ours.close(), process.wait()))
    return ours


class Program:
    """A process of a zygote: `words` are what would stand behind `python`. Its output goes to files."""

    def __init__(self, *words, modules=TORCH, env=None, cwd=None, stdin=None, stdout=None, stderr=None):
        self.words = [str(word) for word in words]
        self.returncode = None
        self._files = [tempfile.TemporaryFile() for _ in range(2)]  # noqa: SIM115
        out = stdout if stdout is not None else self._files[0].fileno()
        err = {None: self._files[1].fileno(), subprocess.STDOUT: out}.get(stderr, stderr)
        read, write = os.pipe()
        self._answers = open(read)  # noqa: SIM115
        request = {"words": self.words, "cwd": str(cwd or os.getcwd()), "env": {**os.environ, **(env or {})}}
        with open(os.devnull) as nothing:
            fds = [nothing if stdin is None else stdin, out, err, write]
            fds = [fd if isinstance(fd, int) else fd.fileno() for fd in fds]
            socket.send_fds(_zygote(modules), [json.dumps(request).encode()], fds)
        os.close(write)
        self.pid = int(self._answers.readline())

    def poll(self, timeout=0.0):
        """Return the exit code as `subprocess` gives it, or None if the program still runs after `timeout` seconds."""
        if self.returncode is None and select.select([self._answers], [], [], timeout)[0]:
            self.returncode = int(self._answers.readline())
        return self.returncode

    def send_signal(self, number):
        """Send a signal to a program that still runs."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        """End the program, if it has not ended, and its files."""
        self.send_signal(signal.SIGKILL)
        self.poll(None)
        for file in (self._answers, *self._files):
            file.close()

    def output(self):
        """Return what has come to stdout and stderr, with line ends as `text=True` gives them."""
        texts = [os.pread(file.fileno(), 1 << 30, 0).decode() for file in self._files]
        return [text.replace("\r\n", "\n").replace("\r", "\n") for text in texts]

    def done(self, timeout=60.0):
        """Return what `subprocess.run` would."""
        try:
            if self.poll(timeout) is None:
                raise subprocess.TimeoutExpired(self.words, timeout, *self.output())
            return subprocess.CompletedProcess(self.words, self.returncode, *self.output())
        finally:
            self.kill()


def run(*words, timeout=60.0, **options):
    """Run a program to its end: `subprocess.run` with captured text."""
    return Program(*words, **options).done(timeout)


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
