"""Runs a worker script as several processes of a distributed run, on the CPU with gloo."""

import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Ended:
    code: int
    output: str


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
        env |= {"WORLD_SIZE": str(n), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        command = [sys.executable, str(Path(__file__).parent / worker), *map(str, words)]
        for rank in range(n):
            mine = env | {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(n)}
            running.append(
                subprocess.Popen(command, env=mine, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            )
        outputs = [process.communicate(timeout=timeout)[0] for process in running[-n:]]
        return [Ended(process.returncode, out) for process, out in zip(running[-n:], outputs, strict=True)]

    yield run
    for process in running:
        process.kill()
        process.wait()
