"""One process of test_failures.py. The words: a directory, and how this run ends: "survive", "kill", "ends-later"..."""

import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

import wan_loader
from wan_loader.loader import exchange, peers
from wan_loader.loader import team as team_module

HERE, CASE = Path(sys.argv[1]), sys.argv[2]
WORLD = dist.group.WORLD


class OnRead:
    """Does something when the first bytes have been read."""

    def __init__(self, action):
        self.action = action

    def record(self, span):
        if span.name == "read":
            self.action()


def load(path="a.safetensors", **options):
    return wan_loader.load_file(HERE / path, io="buffered", group=dist.group.WORLD, **options)


def failing(action):
    """The error of a load, and that it came soon."""
    start = time.monotonic()
    try:
        action()
    except Exception as error:
        assert time.monotonic() - start < 10, time.monotonic() - start
        return error
    raise AssertionError("nothing was raised")


def check(error, kind, *texts):
    assert type(error) is kind, repr(error)
    for text in texts:
        assert text in str(error), str(error)


def kill_me():
    os.kill(os.getpid(), signal.SIGKILL)


def full_disk():
    raise OSError(28, "No space left on device")


def survive(me):
    """Each failure reaches everybody, and the next load is none the worse for it."""
    gone, other = wan_loader.DistributedError, "see another checkpoint"
    error = failing(lambda: load("a.safetensors" if me != 1 else "missing.safetensors"))
    if me == 1:
        check(error, wan_loader.MissingFileError, "missing.safetensors does not exist")
    else:
        check(error, gone, "process 1 failed", "MissingFileError", "missing.safetensors")
    check(failing(lambda: load("b.safetensors" if me == 2 else "a.safetensors")), gone, "processes 2", other)
    check(failing(lambda: load("c.safetensors" if me == 2 else "a.safetensors")), gone, "processes 2", other)
    check(failing(lambda: load(dtype="bf16" if me == 1 else None)), gone, "processes 1", "other tensors, dtypes")
    error = failing(lambda: load(threads=0 if me == 2 else None))
    check(error, wan_loader.OptionError if me == 2 else gone, "threads=0")
    error = failing(lambda: load(observer=OnRead(full_disk) if me == 1 else None))
    check(error, OSError if me == 1 else gone, "No space left")
    module = nn.Module()
    module.register_parameter("a", nn.Parameter(torch.empty(700_000, device="meta")))
    before = module.a
    into = lambda: wan_loader.load_into(  # noqa: E731
        module, HERE / "a.safetensors", device="cpu", group=dist.group.WORLD, strict=me != 2
    )
    check(failing(into), wan_loader.KeyMismatchError if me != 2 else gone, "unexpected")
    assert module.a is before
    options(me)
    assert torch.equal(load()["a"], torch.arange(700_000.0))


def options(me):
    """What cannot be divided is refused by everybody."""
    mesh = init_device_mesh("cpu", (3,))
    module = nn.Module()
    columns = DTensor.from_local(torch.empty(3, 2, device="meta"), mesh, [Shard(1)])
    module.register_parameter("a", nn.Parameter(columns))
    into = lambda: wan_loader.load_into(module, HERE / "columns.safetensors", device="cpu")  # noqa: E731
    check(failing(into), wan_loader.OptionError, "Shard(0)")
    cached = lambda: wan_loader.load_into(  # noqa: E731
        module, HERE / "columns.safetensors", device="cpu", dtype="bf16", cache=True, cache_dir=HERE / "cache"
    )
    check(failing(cached), wan_loader.OptionError, "cache is for one process")
    check(failing(lambda: load(dtype="bf16", cache=True, cache_dir=HERE / "cache")), wan_loader.OptionError, "cache")
    assert not (HERE / "cache").exists()
    pair = dist.new_group([0, 1])
    load_pair = lambda: wan_loader.load_file(HERE / "a.safetensors", group=pair)  # noqa: E731
    if me == 2:
        check(failing(load_pair), wan_loader.OptionError, "not in the group")
    else:
        assert torch.equal(load_pair()["a"], torch.arange(700_000.0))
    if me == 0:  # the others make no such call
        team_module.PATIENCE_S = 0.5
        check(failing(load), wan_loader.DistributedError, "process 1 did not come", "makes the same calls")
        team_module.PATIENCE_S = 600.0
    else:
        team_module._name((0, 1, 2))
    dist.barrier()


def end_or_wait(me, victim):
    """One process ends without a word; the others wait for it."""
    if me == victim:
        if CASE == "crashes":
            raise ValueError("boom")
        sys.exit(0)
    if "first" in CASE:  # and its store with it
        time.sleep(2)
    error = failing(load)
    print(f"{type(error).__name__}: {error}")
    sys.exit(1)


def main():
    peers.SILENCE_S = 3.0  # test_parallel.py waits for as long as users do
    dist.init_process_group("gloo")
    me = dist.get_rank()
    if CASE in ("ends", "crashes", "ends-first"):
        end_or_wait(me, 0 if CASE == "ends-first" else dist.get_world_size() - 1)
    load()
    dist.barrier()
    if CASE.startswith("ends-later"):
        end_or_wait(me, 0 if CASE.endswith("first") else dist.get_world_size() - 1)
    if CASE == "survive":
        survive(me)
    elif CASE == "exchange" and me == 1:
        exchange._gather = lambda *parts: kill_me()
        team_module.carry = exchange.carry
        load()
    else:
        last = dist.get_world_size() - 1 if CASE != "kill-first" else 0
        kills = me == last and CASE.startswith("kill")
        error = failing(lambda: load(observer=OnRead(kill_me) if kills else None))
        print(f"{type(error).__name__}: {error}")
        sys.exit(1)


if __name__ == "__main__":
    main()
