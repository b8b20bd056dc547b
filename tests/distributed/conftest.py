"""Runs a worker script as several processes of a distributed run, on the CPU with gloo."""

import os
import signal
import socket
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from programs import DISTRIBUTED, Program


@dataclass(frozen=True)
class Ended:
    code: int
    output: str
    """What went to stdout, and then what went to stderr."""
    stdout: str


def _ended(running, timeout):
    """How all ended. One that does not is asked where it stands: its traceback is in its output."""
    end = time.monotonic() + timeout
    while any(program.poll() is None for program in running) and time.monotonic() < end:
        if any(program.poll() for program in running):  # the others should not take much longer
            end = min(end, time.monotonic() + 30)
        time.sleep(0.02)
    for program in running:
        program.send_signal(signal.SIGABRT)  # faulthandler
    return [Ended(program.wait(), "".join(program.output()), program.output()[0]) for program in running]


@pytest.fixture
def ranks():
    """(worker, n, *words) -> how each of n processes of `worker` ended."""
    running = []

    def run(worker, n, *words, timeout=90):
        script = Path(__file__).parent / worker
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(n), "PYTHONFAULTHANDLER": "1"}
        for rank in range(n):
            mine = os.environ | env | {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(n)}
            running.append(Program(script, *words, env=mine, modules=DISTRIBUTED))
        return _ended(running[-n:], timeout)

    yield run
    for program in running:
        program.kill()
