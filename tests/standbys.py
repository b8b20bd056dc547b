"""Stand-by servers of tests, and programs that are run from them."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

from wan_loader.standby import control


class Standby:
    """A server, and programs that are run from it, all as processes."""

    def __init__(self, *paths):
        self.directory = Path(tempfile.mkdtemp(prefix="sb-"))  # short: it is part of a socket's name
        self.directory.chmod(0o700)
        place = {"XDG_RUNTIME_DIR": str(self.directory), "XDG_CACHE_HOME": str(self.directory / "cache")}
        path = os.pathsep.join([*map(str, paths), *filter(None, sys.path)])
        self.env = {**os.environ, **place, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "200"}
        for name in ("WAN_LOADER_STANDBY", "PYTHONDONTWRITEBYTECODE"):
            self.env.pop(name, None)

    def words(self, *words):
        return [sys.executable, "-m", "wan_loader", *map(str, words)]

    def command(self, *words, check=True, **env):
        done = subprocess.run(
            self.words(*words), env=self.env | env, capture_output=True, text=True, timeout=60, check=False
        )
        assert not check or done.returncode == 0, done.stderr
        return done

    def start(self, *modules, idle_s=60, **env):
        """Start one, without the command line, which takes longer to import than all else."""
        code = f"from wan_loader.standby import control; control.start({modules!r}, idle_s={idle_s}, only=True)"
        subprocess.run([sys.executable, "-c", code], env=self.env | env, timeout=60, check=True)

    def status(self):
        with mock.patch.dict(os.environ, XDG_RUNTIME_DIR=str(self.directory)):
            return control.status()

    def pid(self):
        """Who holds the lock, without asking it anything."""
        with mock.patch.dict(os.environ, XDG_RUNTIME_DIR=str(self.directory)):
            return control.running()

    def popen(self, *words, env=None, **options):
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
        return subprocess.Popen(self.words("run", "--quiet", *words), env=self.env | (env or {}), text=True, **pipes)

    def run(self, *words, **options):
        words = ("--standby", *words) if options.pop("said", False) else ("--quiet", *words)
        options = {"env": self.env | options.pop("env", {}), "capture_output": True, "check": False} | options
        return subprocess.run(self.words("run", *words), text=True, timeout=60, **options)

    def both(self, *words, **options):
        """What a program does in a fork, and what it does started directly."""
        return self.run(*words, **options), self.run("--no-standby", *words, **options)

    def log(self):
        return next((self.directory / "wan-loader").glob("*.log")).read_text()

    def socket(self):
        return next((self.directory / "wan-loader").glob("*.socket"))

    def wait_until_ready(self):
        wait_for(lambda: "n_modules" in (self.status() or {}))

    def close(self):
        with mock.patch.dict(os.environ, XDG_RUNTIME_DIR=str(self.directory)):
            control.stop()
        shutil.rmtree(self.directory, ignore_errors=True)


def wait_for(condition, seconds=20.0):
    """Wait until something holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "in vain"
        time.sleep(0.01)


_WAITING = (
    "import os, sys, time; print(os.getpid(), os.getppid(), flush=True); time.sleep(float(sys.argv[1])); sys.exit(5)"
)


def waiting(standby, script, seconds):
    """A program that waits; itself, its own process and that of who watches over it."""
    process = standby.popen(script(_WAITING), seconds)
    program, watcher = map(int, process.stdout.readline().split())
    return process, program, watcher


def is_there(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def wait_until_gone(pid):
    end = time.monotonic() + 10
    while is_there(pid):
        assert time.monotonic() < end
        time.sleep(0.01)
