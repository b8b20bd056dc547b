"""One process of test_together.py: loads in every way that processes can share, and compares bit for bit."""

import os
import sys
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.utils._python_dispatch import TorchDispatchMode

import wan_loader
from wan_loader.distributed import shard_group as group_module
from wan_loader.formats.checkpoint_facts import Checkpoint
from wan_loader.loading import run as load_module
from wan_loader.plan.engine_settings import MAX_READS
from wan_loader.system.machine import processors

HERE, DEVICE = Path(sys.argv[1]), sys.argv[2]
REFERENCE = torch.load(HERE / "net.pth")


class Net(nn.Module):
    """As in test_together.py: rows fewer than processes or not divisible, tied, frozen, buffers of all kinds."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(1031, 96)
        self.body = nn.Sequential(nn.Linear(96, 1500), nn.LayerNorm(1500), nn.Linear(1500, 3), nn.Linear(3, 1))
        self.tail = nn.Linear(1, 96)
        self.head = nn.Linear(96, 1031, bias=False)
        self.head.weight = self.embed.weight
        self.tail.requires_grad_(False)
        self.register_buffer("scalar", torch.tensor(0.5))
        self.register_buffer("empty", torch.empty(0, 5))
        self.register_buffer("steps", torch.arange(700_001))

    def forward(self, x):
        return self.head(self.embed(x) + self.tail(self.body(self.embed(x)))) * self.scalar


def on_meta():
    with wan_loader.empty_weights():
        return Net()


def sharded(mesh=None):
    module, mesh = on_meta(), mesh or init_device_mesh(DEVICE, (dist.get_world_size(),))  # by default, on any GPU
    for part in module.body:
        fully_shard(part, mesh=mesh)
    return fully_shard(module, mesh=mesh)


def total(number):
    out = torch.tensor(number, device=DEVICE)
    dist.all_reduce(out)
    return int(out)


def read_chars():
    return int(Path("/proc/self/io").read_text().split("rchar:")[1].split()[0])


def full(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().cpu()


def compare(state, expected=REFERENCE):
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        got = full(state[name])
        assert got.dtype == tensor.dtype, name
        assert got.shape == tensor.shape, name
        assert (
            got.numpy(force=True).tobytes() == tensor.numpy().tobytes()
            if tensor.dtype != torch.bfloat16
            else (torch.equal(got, tensor))
        ), name


def counted(load, nbytes):
    """Runs a load; the bytes that all processes read come to those of the checkpoint, within two per cent.

    The kernel also counts what the store's sockets bring, which is more on a busy machine: then once more. Threads that
    get ready for a load to a GPU read something else; they are left out.
    """
    load_module.get_ready = lambda n_reads: None
    for _ in range(3):
        before = read_chars()
        out = load()
        read = total(read_chars() - before)
        if read < 1.02 * nbytes:
            break
    report = getattr(out, "report", out)
    assert total(report.settings["nbytes_read"]) == nbytes
    assert abs(read - nbytes) < 0.02 * nbytes, (read, nbytes)
    return report, out


def fsdp(n):
    plain = Net().to(DEVICE)
    plain.load_state_dict(REFERENCE)
    x = torch.arange(12, device=DEVICE)
    module = sharded()
    with Allocations() as allocated:
        report, _ = counted(
            lambda: wan_loader.load_into(module, HERE / "net.safetensors", device=DEVICE, io="buffered"),
            nbytes_of("net"),
        )
    shapes = allocated.shapes
    assert not shapes & {(1031, 96), (1031 * 96,), (1500, 96), (1500 * 96,)}  # nobody ever held a whole one
    assert module.embed.weight.to_local().shape in shapes
    local = sum(p.to_local().nbytes for p in module.parameters()) + sum(b.nbytes for b in module.buffers())
    assert report.nbytes_device == local  # no process holds more than it keeps
    assert report.settings["processes"] == report.settings["processes_here"] == n
    assert report.settings["threads"] * n <= max(MAX_READS, processors() // 2)  # together, no more than one may
    compare(module.state_dict())
    assert module.head.weight is module.embed.weight
    assert not module.tail.weight.requires_grad
    assert torch.equal(module(x), plain(x))
    wan_loader.load_into(module, HERE / "net.safetensors", device=DEVICE)  # again, while the root is gathered
    assert torch.equal(module(x), plain(x))
    cast = sharded()
    wan_loader.load_into(cast, HERE / "net.pth", device=DEVICE, dtype="bf16", keep_fp32=["tail"])
    compare(cast.state_dict(), in_bf16(REFERENCE))


def in_bf16(state):
    return {
        name: t.bfloat16() if t.is_floating_point() and not name.startswith("tail") else t for name, t in state.items()
    }


def nbytes_of(name):
    checkpoint: Checkpoint = wan_loader.open_checkpoint(HERE / f"{name}.safetensors")
    return sum(t.nbytes for t in checkpoint.tensors if t.name != "head.weight")


def hsdp():
    mesh = init_device_mesh(DEVICE, (2, 2), mesh_dim_names=("replicate", "shard"))
    module = sharded(mesh)
    report, _ = counted(
        lambda: wan_loader.load_into(module, HERE / "net.safetensors", device=DEVICE, io="buffered"), nbytes_of("net")
    )
    assert report.settings["nbytes_received"] > 0
    compare(module.state_dict())


def replicated():
    for path in ("net.safetensors", "net.pth"):
        for io in ("auto", "direct", "mapped", "buffered"):
            loaded = wan_loader.load(HERE / path, device=DEVICE, group=dist.group.WORLD, io=io)
            compare(loaded.tensors)
    counted(
        lambda: wan_loader.load(HERE / "net.safetensors", io="buffered", device=DEVICE, group=dist.group.WORLD),
        wan_loader.open_checkpoint(HERE / "net.safetensors").nbytes,
    )
    tensors = wan_loader.load_file(
        HERE / "net.safetensors", dtype="bf16", keep_fp32=["tail"], device=DEVICE, group=dist.group.WORLD
    )
    compare(tensors, in_bf16(REFERENCE))
    some = wan_loader.load_file(
        HERE / "net.safetensors", names=["steps", "scalar"], device=DEVICE, group=dist.group.WORLD
    )
    compare(some, {name: REFERENCE[name] for name in ("steps", "scalar")})
    module = on_meta()
    wan_loader.load_into(module, HERE / "net.safetensors", device=DEVICE, group=dist.group.WORLD)
    compare(module.state_dict())
    legacy = wan_loader.load_file(HERE / "legacy.pth", device=DEVICE, group=dist.group.WORLD)
    compare(legacy)


def dtensors(n):
    """DTensors without FSDP: any shape, tensors of a .pth that share a storage or are stored column by column."""
    mesh = init_device_mesh(DEVICE, (n,))
    expected = torch.load(HERE / "odd.pth")
    module = nn.Module()
    for name, tensor in expected.items():
        placement = Shard(0) if tensor.ndim and name != "kept" else Replicate()
        first, last = rows(tensor.shape[0], n) if isinstance(placement, Shard) else (0, None)
        local = torch.empty((last - first, *tensor.shape[1:]) if last is not None else tensor.shape, device="meta")
        whole = DTensor.from_local(local, mesh, [placement], shape=tensor.shape, stride=tensor.contiguous().stride())
        if name == "kept" or name.startswith("shared"):
            module.register_buffer(name, whole)
        else:
            module.register_parameter(name, nn.Parameter(whole, requires_grad=False))
    for path in ("odd.pth", "odd-legacy.pth"):
        report = wan_loader.load_into(module, HERE / path, device=DEVICE)
        compare(module.state_dict(), expected)
        assert all(isinstance(tensor, DTensor) for tensor in module.state_dict().values())
        assert "not stored row by row" in "".join(report.warnings)
    halves = wan_loader.load_file(HERE / "odd.pth", dtype="fp16", device=DEVICE, group=dist.group.WORLD)
    compare(halves, {n: t.half() if t.is_floating_point() else t for n, t in expected.items()})
    assert halves["shared_a"].untyped_storage().data_ptr() == halves["shared_b"].untyped_storage().data_ptr()


class OnHeader:
    """Sets an event when a load has compared the headers."""

    def __init__(self):
        self.seen = threading.Event()

    def record(self, span):
        if span.name == "header":
            self.seen.set()


def threads():
    """Loads in several threads take turns: collectives of one must not meet those of another."""
    carry_out, together, most = group_module.carry_out, [], []

    def slow(*parts):
        together.append(1)
        most.append(len(together))
        time.sleep(0.2)
        carry_out(*parts)
        together.pop()

    loaded = {}

    def load(name, observer):
        loaded[name] = wan_loader.load_file(HERE / name, device=DEVICE, group=dist.group.WORLD, observer=observer)

    group_module.carry_out, running = slow, []
    for name in ("net.safetensors", "odd.pth"):
        observer = OnHeader()
        running.append(threading.Thread(target=load, args=(name, observer)))
        running[-1].start()
        observer.seen.wait(0.1 if running[1:] else 60)  # all processes begin in the same order
    for thread in running:
        thread.join()
    group_module.carry_out = carry_out
    assert set(most) == {1}, most
    compare(loaded["net.safetensors"])
    compare(loaded["odd.pth"], torch.load(HERE / "odd.pth"))


def dist_rank():
    return int(os.environ["RANK"])


class Allocations(TorchDispatchMode):
    """Keeps the shapes of what is allocated meanwhile in this thread, on any device but meta."""

    def __init__(self):
        super().__init__()
        self.shapes = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if "empty" in function.name() and not out.is_meta:
            self.shapes.add(tuple(out.shape))
        return out


def rows(count, n):
    size = -(-count // n)
    return min(dist.get_rank() * size, count), min((dist.get_rank() + 1) * size, count)


def main():
    device = torch.device(DEVICE, dist_rank()) if DEVICE == "cuda" else None
    if device is not None:
        torch.cuda.set_device(device)
    dist.init_process_group("gloo" if device is None else "nccl", device_id=device)
    n = dist.get_world_size()
    opened, connect = [], group_module.own_connection
    group_module.own_connection = lambda store: (opened.append(store), connect(store))[1]
    wan_loader.load_file(
        HERE / "net.safetensors", io="buffered", device=DEVICE, group=dist.group.WORLD
    )  # reads modules, too
    fsdp(n)
    replicated()
    dtensors(n)
    threads()
    if n == 4:
        hsdp()
    assert len(opened) == 1  # by all loads
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
