"""One process of test_failures.py. The words: a directory, and how this run ends: "survive", "kill", "ends-later"..."""

import os
import signal
import sys
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import distributed_c10d
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

import wan_loader
from wan_loader.distributed import exchange
from wan_loader.distributed import liveness as liveness
from wan_loader.distributed import shard_group as group_module

HERE, CASE, DEVICE = Path(sys.argv[1]), sys.argv[2], sys.argv[3] if sys.argv[3:] else "cpu"
WORLD = dist.group.WORLD


class OnRead:
    """Does something when the first bytes have been read; what it raises ends the load."""

    def __init__(self, action):
        self.action = action
        self.token = wan_loader.CancelToken()

    def record(self, span):
        if span.name == "read":
            try:
                self.action()
            except OSError as error:
                self.token.cancel(error)


def load(path="a.safetensors", io="buffered", **options):
    return wan_loader.load_file(HERE / path, io=io, group=dist.group.WORLD, **({"device": DEVICE} | options))


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
    disk = OnRead(full_disk)
    error = failing(lambda: load(observer=disk, cancel=disk.token) if me == 1 else load())
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
        group_module.PATIENCE_S = 0.5
        check(failing(load), wan_loader.DistributedError, "process 1 did not come", "makes the same calls")
        group_module.PATIENCE_S = 600.0
    else:
        group_module._name((0, 1, 2))
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


def broken_link(*parts):
    raise RuntimeError("the link is down")


def exchange_fails(me, victim, at):
    """The exchange of one process fails before its collective number `at`, when the others have queued theirs."""
    started, gather = [], exchange._start_gather

    def fails(*parts):
        if me == victim and len(started) == at:
            time.sleep(0.5)  # the others' collectives are on their GPUs now
            broken_link()
        started.append(1)
        return gather(*parts)

    exchange._start_gather = fails
    error = failing(lambda: load("many.safetensors", io="mapped" if DEVICE == "cuda" else "buffered"))
    check(error, RuntimeError if me == victim else wan_loader.DistributedError, "the link is down")
    exchange._start_gather = gather
    error = failing(load)
    check(error, wan_loader.DistributedError, "failed before", "init_process_group")
    everybody("has seen it")
    if DEVICE == "cuda":
        torch.cuda.synchronize()  # nothing runs there for ever
        assert torch.equal(wan_loader.load_file(HERE / "a.safetensors", device="cuda")["b"].cpu(), torch.arange(700.0))
    dist.destroy_process_group()
    print("one reason")


def everybody(what):
    """Wait for all processes: the first one holds the store, and nothing goes through the group any more."""
    store = distributed_c10d._get_default_store()
    store.set(f"{what} {dist.get_rank()}", "")
    store.wait([f"{what} {rank}" for rank in range(dist.get_world_size())])


def any_thread(me):
    """The device of the group counts, not that of the thread, which begins with the first one."""
    loaded = []
    thread = threading.Thread(target=lambda: loaded.append(load(device="cuda")))
    thread.start()
    thread.join()
    assert loaded[0]["a"].device == torch.device("cuda", me)
    assert torch.equal(loaded[0]["a"].cpu(), torch.arange(700_000.0))
    error = failing(lambda: load(device="cuda:0"))  # for process 0, that is the group's
    check(error, wan_loader.OptionError if me else wan_loader.DistributedError, "bound to 'cuda:1'")
    assert torch.equal(load()["a"].cpu(), torch.arange(700_000.0))


def one_gpu(me):
    """Two processes of an unbound group load to the same GPU: each says so, and none queues a collective."""
    torch.cuda.set_device(0)
    check(failing(lambda: load(device="cuda")), wan_loader.DistributedError, "processes 0 and 1", "the same GPU")
    assert torch.equal(load(device=f"cuda:{me}")["a"].cpu(), torch.arange(700_000.0))


def start():
    """Start torch.distributed, with a GPU of its own for each process unless the case is about that."""
    if DEVICE == "cuda" and CASE != "one-gpu" and "unbound" not in CASE:
        device = torch.device("cuda", int(os.environ["RANK"]))
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device)
    else:
        dist.init_process_group("nccl" if DEVICE == "cuda" else "gloo")
        if DEVICE == "cuda":
            torch.cuda.set_device(dist.get_rank())


def main():
    liveness.SILENCE_S = 3.0  # test_parallel.py waits for as long as users do
    start()
    me = dist.get_rank()
    if CASE == "one-gpu":
        one_gpu(me)
        return
    if CASE == "exchange-fails-unbound":  # in the first collective of the group, within which NCCL connects
        exchange_fails(me, 1, 0)
        return
    if CASE in ("ends", "crashes", "ends-first"):
        end_or_wait(me, 0 if CASE == "ends-first" else dist.get_world_size() - 1)
    load()
    dist.barrier()
    if CASE.startswith("ends-later"):
        end_or_wait(me, 0 if CASE.endswith("first") else dist.get_world_size() - 1)
    if CASE == "any-thread":
        any_thread(me)
    elif CASE.startswith("exchange-fails"):
        exchange_fails(me, *map(int, CASE.split("-")[2:]))
    elif CASE == "survive":
        survive(me)
    elif CASE == "exchange" and me == 1:
        exchange._start_gather = lambda *parts: kill_me()
        group_module.carry_out = exchange.carry_out
        load()
    else:
        last = dist.get_world_size() - 1 if CASE != "kill-first" else 0
        kills = me == last and CASE.startswith("kill")
        error = failing(lambda: load(observer=OnRead(kill_me) if kills else None))
        print(f"{type(error).__name__}: {error}")
        sys.exit(1)


if __name__ == "__main__":
    main()
