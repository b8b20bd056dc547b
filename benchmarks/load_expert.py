"""One A14B expert onto the GPU: our loader against the pinned-copy and disk ceilings measured in the same run.

    python benchmarks/load_expert.py /data/bench --output benchmarks/results/NAME.json

Makes the checkpoints it needs (random weights in the published shapes; 28.6 GB as bf16, and as many fp32 blocks as make
about the same) unless they are there. Every sample is a fresh process: the CUDA context is made first, then the clock
runs from the call to the synchronised end. Warm means every page resident, cold means none; both are checked and stand
in the sample. The first sample of each case compares every tensor with safetensors, bit for bit.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

GB = 1e9
MiB = 1 << 20


def files_of(path: Path) -> list[str]:
    return sorted(str(p) for p in path.glob("*.safetensors"))


def resident_share(path: Path) -> float:
    from wan_loader.warming.evict import resident_bytes

    return (resident_bytes(files_of(path)) or 0) / sum(os.path.getsize(name) for name in files_of(path))


def evict(path: Path) -> None:
    from wan_loader.warming.evict import evict

    evict(files_of(path))


def warm(path: Path) -> None:
    from wan_loader.warming.tree import list_tree
    from wan_loader.warming.warm import warm

    warm(list_tree(path).files)


def measure_copy_ceiling() -> float:
    """Return the best of several pinned host-to-device copies of 4 GiB in blocks of 16 MiB, GB/s."""
    import torch

    host = torch.empty(1 << 30, dtype=torch.uint8).pin_memory()
    device = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    best = 0.0
    for _ in range(6):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(4):
            for offset in range(0, 1 << 30, 16 * MiB):
                device[offset : offset + 16 * MiB].copy_(host[offset : offset + 16 * MiB], non_blocking=True)
        torch.cuda.synchronize()
        best = max(best, 4 * (1 << 30) / GB / (time.perf_counter() - start))
    return best


def measure_disk_ceiling(path: Path, threads: int, block: int) -> float:
    """Return the rate of cold O_DIRECT reads of all whole blocks, GB/s."""
    import mmap

    evict(path)
    work = [
        (name, offset) for name in files_of(path) for offset in range(0, os.path.getsize(name) // block * block, block)
    ]
    todo, lock = iter(work), threading.Lock()
    fds = {name: os.open(name, os.O_RDONLY | os.O_DIRECT) for name in files_of(path)}

    def read() -> None:
        buffer = mmap.mmap(-1, block)
        while True:
            with lock:
                task = next(todo, None)
            if task is None:
                return
            if os.preadv(fds[task[0]], [buffer], task[1]) != block:
                raise OSError("short read")

    workers = [threading.Thread(target=read) for _ in range(threads)]
    start = time.perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    seconds = time.perf_counter() - start
    for fd in fds.values():
        os.close(fd)
    return len(work) * block / GB / seconds


def sample(loader: str, path: Path, io: str, dtype: str | None, check: bool) -> dict:
    """Load once in this process; the parent makes it a fresh one."""
    import torch
    from safetensors.torch import load_file

    from wan_loader import load

    torch.cuda.init()
    torch.zeros(1, device="cuda")
    torch.cuda.synchronize()
    resident = resident_share(path)
    io_before = read_bytes()
    used = resource.getrusage(resource.RUSAGE_SELF)
    start = time.perf_counter()
    report = None
    if loader == "wan-loader":
        loaded = load(path, device="cuda", dtype=dtype, io=io)
        tensors, report = loaded.tensors, loaded.report.to_json()
    else:
        tensors = {}
        for name in files_of(path):
            tensors |= load_file(name, device="cuda")
        if dtype:
            tensors = {k: v.to(getattr(torch, dtype)) for k, v in tensors.items()}
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    now = resource.getrusage(resource.RUSAGE_SELF)
    nbytes = sum(os.path.getsize(name) for name in files_of(path))
    result = {
        "loader": loader,
        "seconds": seconds,
        "gbps": nbytes / GB / seconds,
        "cpu_seconds": now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime,
        "read_bytes": read_bytes() - io_before,
        "resident_before": resident,
        "resident_after": resident_share(path),
        "device_peak_bytes": torch.cuda.max_memory_allocated(),
        "host_peak_bytes": now.ru_maxrss * 1024,
        "report": report,
    }
    if check:
        from wan_loader.verify import verify

        result["verified_tensors"] = verify(path, tensors)
    return result


def read_bytes() -> int:
    text = Path("/proc/self/io").read_text()
    return int(text.split("read_bytes:")[1].split()[0])


def run_sample(loader: str, path: Path, io: str, dtype: str | None, check: bool) -> dict:
    spec = json.dumps([loader, str(path), io, dtype, check])
    done = subprocess.run([sys.executable, __file__, "--sample", spec], capture_output=True, text=True, timeout=300)
    if done.returncode != 0:
        return {"loader": loader, "error": done.stderr.strip().splitlines()[-1:]}
    return json.loads(done.stdout)


def make(directory: Path, dtype: str, blocks: int) -> Path:
    from wan_pipeline.synth import synth

    target = directory / dtype
    if not target.exists():
        start = time.perf_counter()
        report = synth(target, layout="native", size="full", components=["high_noise"], blocks=blocks, dtype=dtype)
        print(f"made {report.nbytes / GB:.1f} GB as {dtype} in {time.perf_counter() - start:.0f} s", flush=True)
    return target / "high_noise_model"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, nargs="?")
    parser.add_argument("--blocks", type=int, default=40, help="DiT blocks of the bf16 expert (40 is all of it)")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--no-cold", action="store_true")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--sample", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.sample:
        loader, path, io, dtype, check = json.loads(options.sample)
        print(json.dumps(sample(loader, Path(path), io, dtype, check)))
        return
    run(options)


def run(options: argparse.Namespace) -> None:
    from wan_loader.devices.resolve import device_card
    from wan_loader.system.machine import machine_card

    bf16 = make(options.directory, "bf16", options.blocks)
    fp32 = make(options.directory, "fp32", max(1, options.blocks // 2))
    cases = [
        ("warm bf16, mapped", "wan-loader", bf16, "mapped", None, "warm", options.repeat),
        ("warm bf16, auto", "wan-loader", bf16, "auto", None, "warm", options.repeat),
        ("warm bf16, buffered", "wan-loader", bf16, "buffered", None, "warm", 1),
        ("warm fp32 -> bf16, auto", "wan-loader", fp32, "auto", "bfloat16", "warm", options.repeat),
        ("warm bf16, safetensors", "safetensors", bf16, "", None, "warm", 1),
    ]
    if not options.no_cold:
        cases.append(("cold bf16, auto", "wan-loader", bf16, "auto", None, "cold", 1))
    document = {"schema_version": 1, "command": " ".join(sys.argv), "cases": []}
    disk = {}
    if not options.no_cold:
        for threads, block in ((8, 8), (16, 16)):
            disk[f"{threads} threads x {block} MiB"] = measure_disk_ceiling(bf16, threads, block * MiB)
        print({k: round(v, 2) for k, v in disk.items()}, flush=True)
    for title, loader, path, io, dtype, state, repeat in cases:
        samples = []
        for index in range(repeat):
            if state == "cold":
                evict(path)
            elif resident_share(path) < 1:
                warm(path)
            samples.append(run_sample(loader, path, io, dtype, check=index == 0))
        document["cases"].append({"case": title, "samples": samples})
        print_case(title, samples)
    ceiling = measure_copy_ceiling()
    import torch

    document |= {"copy_ceiling_gbps": ceiling, "disk_ceilings_gbps": disk}
    document["machine"] = {**machine_card(), **device_card(f"cuda:{torch.cuda.current_device()}")}
    print_table(document)
    if options.output:
        options.output.write_text(json.dumps(document, indent=1) + "\n")


def print_case(title: str, samples: list[dict]) -> None:
    for s in samples:
        if "error" in s:
            print(title, s, flush=True)
            continue
        phases = {
            p["name"]: round(p["busy_s"], 3) for p in (s["report"] or {}).get("phases", []) if p["busy_s"] > 0.003
        }
        print(f"{title}: {s['seconds']:.3f} s {s['gbps']:.1f} GB/s cpu {s['cpu_seconds']:.2f} {phases}", flush=True)


def print_table(document: dict) -> None:
    ceiling = document["copy_ceiling_gbps"]
    print(f"\npinned copy ceiling {ceiling:.1f} GB/s; disk {document['disk_ceilings_gbps']}\n")
    print("| case | median s | min s | GB/s | of the copy ceiling | CPU s | read from disk | samples |")
    print("|---|---|---|---|---|---|---|---|")
    for case in document["cases"]:
        good = [s for s in case["samples"] if "error" not in s]
        if not good:
            print(f"| {case['case']} | failed | | | | | | 0 |")
            continue
        seconds = [s["seconds"] for s in good]
        gbps = statistics.median(s["gbps"] for s in good)
        cpu = statistics.median(s["cpu_seconds"] for s in good)
        read = statistics.median(s["read_bytes"] for s in good) / GB
        print(
            f"| {case['case']} | {statistics.median(seconds):.3f} | {min(seconds):.3f} | {gbps:.1f} | "
            f"{gbps / ceiling:.2f} | {cpu:.2f} | {read:.1f} GB | {len(good)} |"
        )


if __name__ == "__main__":
    main()
