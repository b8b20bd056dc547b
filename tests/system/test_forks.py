"""Forks beside a load, and after one: the child loads, too, and never waits for what stayed in its parent."""

import os
import subprocess
import sys
import threading
import time

import pytest
import torch
from safetensors.torch import save_file

from wan_loader.engine import activity
from wan_loader.system import forks

_START = """
import os, sys, threading, time
def ended_well(pid, seconds=20.0):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return status == 0
        time.sleep(0.005)
    os.kill(pid, 9)
    return False
"""

# The first load imports in a thread; the fork comes in the middle of that.
_BESIDE_IMPORTS = (
    _START
    + """
import importlib.abc
class Slow(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name in ("wan_loader.api", "torch"):
            importing.set()
            time.sleep(0.2)
        return None
importing = threading.Event()
sys.meta_path.insert(0, Slow())
import wan_loader
thread = threading.Thread(target=lambda: wan_loader.load_file(sys.argv[1]))
thread.start()
importing.wait()
if not (pid := os.fork()):
    os._exit(wan_loader.load_file(sys.argv[1])["a"][1].item() != 1)
assert ended_well(pid), "the child hangs"
thread.join()
"""
)

# libgomp's threads of the forking thread are not in the child; whoever divides work there waits for them.
_AFTER_CASTS = (
    _START
    + """
import torch, wan_loader
torch.set_num_threads(2)
wan_loader.load_file(sys.argv[1], dtype="bf16")
if not (pid := os.fork()):
    loaded = wan_loader.load_file(sys.argv[1], dtype="bf16")["a"]
    os._exit(loaded.dtype != torch.bfloat16 or loaded[::1000].tolist() != list(map(float, sys.argv[2].split())))
assert ended_well(pid), "the child hangs, or has other numbers"
"""
)


def run(code, *words):
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, words)], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture
def values(tmp_path):
    tensor = torch.arange(200_001, dtype=torch.float32)
    save_file({"a": tensor}, tmp_path / "m.safetensors")
    return tmp_path / "m.safetensors", tensor


def test_a_fork_in_the_middle_of_the_first_load(values):
    run(_BESIDE_IMPORTS, values[0])


def test_a_fork_after_torch_used_its_threads(values):
    path, tensor = values
    run(_AFTER_CASTS, path, " ".join(map(str, tensor.to(torch.bfloat16)[::1000].tolist())))


def test_a_fork_waits_for_imports_of_other_threads():
    inside, leave, left = threading.Event(), threading.Event(), []

    def imports():
        with forks.without_forks():
            inside.set()
            leave.wait(10)
            time.sleep(0.05)
            left.append(1)

    thread = threading.Thread(target=imports)
    thread.start()
    inside.wait(10)
    threading.Timer(0.05, leave.set).start()
    if not (pid := os.fork()):
        os._exit(0 if left and forks.is_forked() else 1)
    assert os.waitpid(pid, 0)[1] == 0
    assert not forks.is_forked()
    thread.join()


def test_loads_of_the_parent_are_not_under_way_in_a_child():
    with activity.loading():
        if not (pid := os.fork()):
            os._exit(0 if activity.wait_until_idle(0.0) else 1)
        assert os.waitpid(pid, 0)[1] == 0
        assert not activity.wait_until_idle(0.0)
