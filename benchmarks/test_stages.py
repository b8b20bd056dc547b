"""The stages of a load, one by one, on the CPU.

    pytest benchmarks                                             # times
    pytest benchmarks --benchmark-disable                         # only that they run
    WAN_LOADER_BENCH_MB=1000 pytest benchmarks --benchmark-json stages.json

What needs a GPU is measured by `wan-loader bench` and the scripts beside this file.
"""

import ctypes
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from wan_loader.devices.cpu import CpuWriter
from wan_loader.devices.writer import Destination, HostBlock
from wan_loader.engine.pinned_ring import PinnedRing
from wan_loader.formats import open_checkpoint
from wan_loader.loading.bind import Into, make_binding
from wan_loader.loading.probe import probe
from wan_loader.plan.blocks import Block, Segment, Transport
from wan_loader.plan.dtype_policy import DtypePolicy
from wan_loader.plan.engine_settings import MIN_BLOCK_BYTES
from wan_loader.plan.plan import make_plan
from wan_loader.plan.request import LoadRequest
from wan_loader.provenance.prove import prove
from wan_loader.system import own_pages
from wan_loader.system.own_pages import read_entries, scan_pages
from wan_loader.system.posix import cached_bytes

#: For the full native checkpoint: headers of 12 shards and two .pth, and the plan of all 2,626 tensors.
N_TENSORS = 2626


def read_headers(paths):
    return [open_checkpoint(path) for path in paths]


def plan_all(checkpoints):
    """Plan a load to a GPU of each, with the page cache asked; return how many blocks were planned."""
    policy, n_blocks = DtypePolicy("bfloat16", ("norm2",)), 0
    for checkpoint in checkpoints:
        request = LoadRequest(source=checkpoint, policy=policy)
        # as if there were a GPU, whose load is planned block by block, however much memory is here
        facts = replace(probe(checkpoint, request), device="cuda:0")
        n_blocks += sum(1 for _ in make_plan(request, checkpoint, facts).blocks)
    return n_blocks


def test_headers_of_the_full_checkpoint(benchmark, native):
    checkpoints = benchmark(read_headers, native)
    assert sum(len(c.tensors) for c in checkpoints) == N_TENSORS
    assert sum(c.nbytes for c in checkpoints) > 126e9


def test_plan_of_the_full_checkpoint(benchmark, native):
    checkpoints = read_headers(native)
    assert benchmark(plan_all, checkpoints) > 900


def test_headers_and_plan_of_the_full_checkpoint(benchmark, native):
    """The figure that is promised: under 50 ms."""
    benchmark(lambda: plan_all(read_headers(native)))


@pytest.mark.parametrize("look", [scan_pages, read_entries], ids=lambda look: look.__name__)
def test_proof_of_one_expert(benchmark, native, monkeypatch, look):
    """1095 tensors of 57 GB, mapped by safetensors and never touched; in both ways in which the kernel tells."""
    if look is scan_pages and own_pages._honest_look() is not look:
        pytest.skip("Linux before 6.7")
    tensors = {}
    for path in sorted(native[1].glob("*.safetensors")):
        tensors |= load_file(path)
    monkeypatch.setattr(own_pages, "_honest_look", lambda: look)
    assert len(benchmark(prove, tensors).ranges) == len(tensors) == 1095


def test_match_and_bind_of_one_expert(benchmark, expert):
    """1095 tensors; promised: under 20 microseconds each."""
    path, build = expert
    checkpoint = open_checkpoint(path)
    tensors = {t.name: torch.empty(1) for t in checkpoint.tensors}

    def run(module):
        binding = make_binding(LoadRequest(source=checkpoint), checkpoint, Into(module=module))
        binding.bind(tensors, "cpu")

    benchmark.pedantic(run, setup=lambda: ((build(),), {}), rounds=5)


def test_residency_probe(benchmark, checkpoint):
    with open(checkpoint, "rb") as file:
        nbytes = checkpoint.stat().st_size
        assert benchmark(cached_bytes, file.fileno(), 0, nbytes) == nbytes


def test_pinned_ring(benchmark, mb):
    """Make the ring, touch its slots once, give it back."""
    slot_bytes, n_slots = min(MIN_BLOCK_BYTES, mb * 10**6 // 4096 * 4096), 3

    def run():
        ring = PinnedRing(slot_bytes, n_slots)
        for slot in ring.slots:
            ctypes.memset(slot.address, 1, slot_bytes)
        return ring.close()

    assert benchmark(run)


@pytest.mark.parametrize("dtype", [None, torch.float32], ids=["copy", "cast_to_bf16"])
def test_copy_and_cast(benchmark, mb, dtype):
    """One block into the CPU target."""
    count = mb * 10**6 // 4
    source = torch.ones(count)
    flat = torch.empty(count, dtype=torch.bfloat16 if dtype else torch.float32)
    target = CpuWriter()
    target.bind([Destination(flat, flat.data_ptr(), dtype)])
    block = Block(Transport.BUFFERED, 0, 0, count * 4, (Segment(0, 0, 0, count * 4, 4),))
    benchmark(target.submit, [HostBlock(source.data_ptr(), block)])
    assert flat[-1] == 1
