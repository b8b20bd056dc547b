"""Runs a worker script as several processes of a distributed run, on the CPU with gloo."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Ended:
    code: int
    output: str


def _ended(running, timeout):
    """How all ended. One that does not is asked where it stands: its traceback is in its output."""
    outputs = {}

    def collect(process):
        outputs[process] = process.communicate()[0]

    readers = [threading.Thread(target=collect, args=(process,)) for process in running]
    for reader in readers:
        reader.start()
    end = time.monotonic() + timeout
    while any(reader.is_alive() for reader in readers) and time.monotonic() < end:
        if any(process.poll() for process in running):  # the others should not take much longer
            end = min(end, time.monotonic() + 30)
        time.sleep(0.05)
    for process in running:
        if process.poll() is None:
            process.send_signal(signal.SIGABRT)  # faulthandler
    for reader in readers:
        reader.join()
    return [Ended(process.returncode, outputs[process]) for process in running]


@pytest.fixture
def ranks():
    """(worker, n, *words) -> how each of n processes of `worker` ended."""
    running = []

    def run(worker, n, *words, timeout=90):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        env = os.environ | {
            "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        env |= {"WORLD_SIZE": str(n), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "PYTHONFAULTHANDLER": "1"}
        command = [sys.executable, str(Path(__file__).parent / worker), *map(str, words)]
        for rank in range(n):
            mine = env | {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(n)}
            running.append(
                subprocess.Popen(command, env=mine, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            )
        return _ended(running[-n:], timeout)

    yield run
    for process in running:
        process.kill()
        process.wait()
