"""One A14B expert onto several GPUs: every byte read once, beside the usual way, where each process reads all of them.

    python benchmarks/several_gpus.py /data/bench --processes 2 --output benchmarks/results/NAME.json

Two placements: divided (FSDP2: each process keeps its rows) and replicated (each keeps all). Two loaders for each:
ours, and safetensors in every process, followed by `fully_shard` where it is to be divided. Every sample is a set of
fresh processes; the clock runs from a barrier after the start of CUDA and NCCL to the barrier after the last byte has
arrived. Cold means no page of the files is resident, warm means all are; both are checked and stand in the sample. The
first sample of each case compares what each process keeps with the files, bit for bit.

`--size tiny --device cpu` runs everything in seconds, with gloo, and measures nothing worth knowing.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

from load_expert import GB, evict, files_of, read_bytes, resident_share, warm

CASES = [
    (f"{placement}, {loader}, {cache}", placement, loader, cache)
    for cache in ("warm", "cold")
    for placement in ("divided", "replicated")
    for loader in ("wan-loader", "usual")
]


def tree_of(path: Path):
    """Modules with the names of the file, parameters on meta, and FSDP2 block by block where they are divided."""
    import torch

    from wan_loader import open_checkpoint

    tree = torch.nn.Module()
    for facts in open_checkpoint(path).tensors:
        *parts, leaf = facts.name.split(".")
        owner = tree
        for part in parts:
            if part not in owner._modules:
                owner.add_module(part, torch.nn.Module())
            owner = owner._modules[part]
        empty = torch.empty(facts.shape, dtype=getattr(torch, facts.dtype), device="meta")
        owner.register_parameter(leaf, torch.nn.Parameter(empty, requires_grad=False))
    return tree


def divide(tree, mesh) -> None:
    from torch.distributed.fsdp import fully_shard

    for block in tree.blocks.children():
        fully_shard(block, mesh=mesh)
    fully_shard(tree, mesh=mesh)


def load(placement: str, loader: str, path: Path, dtype: str | None, threads: int | None, device, mesh) -> dict:
    """Return what this process keeps, by name; and our loader's report."""
    import safetensors.torch
    import torch
    import torch.distributed as dist

    import wan_loader

    cast = getattr(torch, dtype) if dtype else None
    if loader == "wan-loader":
        if placement == "replicated":
            loaded = wan_loader.load(path, device=device, dtype=dtype, threads=threads, group=dist.group.WORLD)
            return {"tensors": loaded.tensors, "report": loaded.report.to_json()}
        tree = tree_of(path)
        divide(tree, mesh)
        report = wan_loader.load_into(tree, path, device=device, dtype=dtype, threads=threads)
        return {"tensors": dict(tree.named_parameters()), "report": report.to_json()}
    on = "cpu" if placement == "divided" else str(device)
    state = {}
    for name in files_of(path):
        state |= safetensors.torch.load_file(name, device=on)
    if cast:
        state = {name: tensor.to(cast) for name, tensor in state.items()}
    if placement == "replicated":
        return {"tensors": state}
    tree = tree_of(path)
    tree.load_state_dict(state, assign=True)
    del state
    divide(tree, mesh)  # moves each parameter to the device and keeps its rows
    return {"tensors": dict(tree.named_parameters())}


def check(path: Path, tensors: dict, dtype: str | None) -> int:
    """Compare what this process keeps with the files; return how many tensors that were."""
    import torch
    from safetensors import safe_open
    from torch.distributed.tensor import DTensor

    for file in files_of(path):
        with safe_open(file, "pt") as handle:
            for name in handle.keys():  # noqa: SIM118
                tensor, whole = tensors.pop(name), handle.get_tensor(name)
                if isinstance(tensor, DTensor):
                    chunks = whole.chunk(tensor.device_mesh.size())
                    rank = tensor.device_mesh.get_local_rank()
                    tensor, whole = tensor.to_local(), chunks[rank] if rank < len(chunks) else whole[:0]
                whole = whole.to(getattr(torch, dtype)) if dtype else whole
                if not torch.equal(tensor.cpu().view(torch.uint8), whole.contiguous().view(torch.uint8)):
                    raise AssertionError(f"{name} differs")
    if tensors:
        raise AssertionError(f"{len(tensors)} tensors too many")
    return 1


def warm_up(mesh, device) -> None:
    """Do what is paid once a process: imports, and the first collective."""
    import safetensors.torch  # noqa: F401
    import torch
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    import wan_loader

    assert wan_loader.load_into
    fully_shard(torch.nn.Linear(8, 8, device="meta"), mesh=mesh)
    dist.all_reduce(torch.ones(1, device=device))


def sample(
    placement: str, loader: str, path: Path, dtype: str | None, threads: int | None, verify: bool, kind: str
) -> dict:
    """Load this process's share once; the parent makes fresh processes."""
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device("cuda", rank) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if kind == "cuda" else "gloo", device_id=device if kind == "cuda" else None)
    mesh = init_device_mesh(kind, (world,))
    warm_up(mesh, device)
    resident = resident_share(path)
    dist.barrier()
    before, start = read_bytes(), time.perf_counter()
    loaded = load(placement, loader, path, dtype, threads, device, mesh)
    if kind == "cuda":
        torch.cuda.synchronize()
    own_seconds = time.perf_counter() - start
    dist.barrier()
    result = {
        "rank": rank,
        "seconds": time.perf_counter() - start,
        "own_seconds": own_seconds,
        "disk_bytes": read_bytes() - before,
        "resident_before": resident,
        "host_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "device_peak_bytes": torch.cuda.max_memory_allocated() if kind == "cuda" else 0,
        "report": loaded.get("report"),
    }
    if verify:
        check(path, loaded["tensors"], dtype)
        result["verified"] = True
    dist.barrier()
    dist.destroy_process_group()
    return result


def run_sample(case: tuple, path: Path, options: argparse.Namespace, verify: bool) -> dict:
    """Run all processes of one sample, and sum up what they come to together."""
    _, placement, loader, cache = case
    if cache == "cold":
        evict(path)
    for _ in range(3):
        if cache == "warm" and resident_share(path) < 1:
            warm(path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(options.processes)}
    spec = json.dumps([placement, loader, str(path), options.dtype, options.threads, verify, options.device])
    command = [sys.executable, __file__, "--sample", spec]
    started = [
        subprocess.Popen(
            command, env=env | {"RANK": str(rank)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for rank in range(options.processes)
    ]
    ended = [process.communicate(timeout=900) for process in started]
    if any(process.returncode for process in started):
        return {"error": [error.strip().splitlines()[-3:] for _, error in ended]}
    ranks = [json.loads(out.splitlines()[-1]) for out, _ in ended]
    return {
        "seconds": max(r["seconds"] for r in ranks),
        "disk_bytes": sum(r["disk_bytes"] for r in ranks),
        "host_peak_bytes": max(r["host_peak_bytes"] for r in ranks),
        "device_peak_bytes": max(r["device_peak_bytes"] for r in ranks),
        "ranks": ranks,
    }


def make(options: argparse.Namespace) -> Path:
    from wan_pipeline.synth import synth

    if options.path:
        return options.path
    target = options.directory / f"{options.size}-{options.file_dtype}-{options.blocks}"
    if not target.exists():
        synth(
            target,
            layout="native",
            size=options.size,
            components=["high_noise"],
            blocks=options.blocks,
            dtype=options.file_dtype,
        )
    return target / "high_noise_model"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, nargs="?")
    parser.add_argument("--path", type=Path, help="load this checkpoint instead of making one")
    parser.add_argument("--threads", type=int, help="reads side by side of each of our processes")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--size", choices=["full", "tiny"], default="full")
    parser.add_argument("--blocks", type=int, help="DiT blocks of the expert; all of them unless given")
    parser.add_argument("--file-dtype", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--dtype", help="convert to this torch dtype on the way, such as bfloat16")
    parser.add_argument("--repeat", type=int, default=3, help="samples of each warm case; cold ones are taken once")
    parser.add_argument("--only", action="append", default=[], help="only cases whose names contain this; repeatable")
    parser.add_argument("--no-cold", action="store_true")
    parser.add_argument("--no-compare-cold", action="store_true", help="after cold loads, which reads the files again")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--sample", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.sample:
        placement, loader, path, *rest = json.loads(options.sample)
        print(json.dumps(sample(placement, loader, Path(path), *rest)))
        return
    run(options)


def run(options: argparse.Namespace) -> None:
    from wan_loader.system.machine import machine_card

    path = make(options)
    nbytes = sum(os.path.getsize(name) for name in files_of(path))
    document = {
        "schema_version": 1,
        "command": " ".join(sys.argv),
        "processes": options.processes,
        "nbytes": nbytes,
        "machine": machine_card(),
        "cases": [],
    }
    for case in CASES:
        title, *_, cache = case
        if (cache == "cold" and options.no_cold) or (options.only and not any(word in title for word in options.only)):
            continue
        repeat = 1 if cache == "cold" else options.repeat
        compare = cache == "warm" or not options.no_compare_cold
        samples = [run_sample(case, path, options, verify=compare and index == 0) for index in range(repeat)]
        document["cases"].append({"case": title, "samples": samples})
        if options.output:
            options.output.write_text(json.dumps(document, indent=1) + "\n")
    print_table(document)


def print_table(document: dict) -> None:
    print(f"{document['nbytes'] / GB:.2f} GB onto {document['processes']} devices\n")
    print("| case | median s | min s | read from disk | of the files | host peak | device peak | samples |")
    print("|---|---|---|---|---|---|---|---|")
    for case in document["cases"]:
        good = [s for s in case["samples"] if "error" not in s]
        if not good:
            print(f"| {case['case']} | failed: {case['samples'][0]['error']} | | | | | | 0 |")
            continue
        seconds = [s["seconds"] for s in good]
        disk = statistics.median(s["disk_bytes"] for s in good)
        host, device = (max(s[f"{k}_peak_bytes"] for s in good) / GB for k in ("host", "device"))
        print(
            f"| {case['case']} | {statistics.median(seconds):.3f} | {min(seconds):.3f} | {disk / GB:.2f} GB | "
            f"{disk / document['nbytes']:.2f} x | {host:.2f} GB | {device:.2f} GB | {len(good)} |"
        )


if __name__ == "__main__":
    main()
