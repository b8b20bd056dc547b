"""Loads of an fp32 checkpoint as bf16: without the converted cache, while it is built, and from it.

    python benchmarks/converted_cache.py /data/fp32/high_noise_model --output benchmarks/results/NAME.json
    python benchmarks/converted_cache.py /tmp/tiny --device cpu --repeat 3

Cases, interleaved, each sample in a fresh process with torch imported and the CUDA context made outside the clock:

    without     the load as it is without a cache
    first       the first load with cache=True: read and converted as before, the entry is written behind it
    second      a load that finds the entry

`seconds` is the call, `build_seconds` what the entry took in the background after it. Cold is proved by the page cache
before the call. The first sample of a case compares every tensor with the source, bit for bit.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

from wan_loader.warming.evict import evict, resident_bytes

CASES = ("without", "first", "second")


def files_below(directory: Path) -> list[Path]:
    return sorted(p for p in directory.rglob("*.safetensors")) if directory.is_dir() else [directory]


def resident_share(directory: Path) -> float:
    files = files_below(directory)
    return (resident_bytes(files) or 0) / max(1, sum(path.stat().st_size for path in files))


def warm(directory: Path) -> None:
    for path in files_below(directory):
        with open(path, "rb", buffering=0) as f:
            while f.read(16 << 20):
                pass


def device_bytes_read() -> int:
    return int(Path("/proc/self/io").read_text().split("read_bytes:")[1].split()[0])


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def sample(case: str, path: Path, cache_dir: Path, device: str, check: bool) -> dict:
    """Load once in this process."""
    import torch

    import wan_loader

    if device == "cuda":
        torch.zeros(1, device="cuda")
        torch.cuda.synchronize()
    io = "auto" if device == "cuda" else "buffered"  # on the CPU, mapped views would not be read at all
    before = {"source": resident_share(path), "cache": resident_share(cache_dir)}
    read, cpu = device_bytes_read(), cpu_seconds()
    start = time.perf_counter()
    cached = {} if case == "without" else {"cache": True, "cache_dir": cache_dir}
    loaded = wan_loader.load(path, device=device, dtype="bf16", io=io, **cached)
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    result = {
        "case": case,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds() - cpu,
        "device_bytes_read": device_bytes_read() - read,
        "resident_before": before,
        "cache": loaded.report.to_json()["cache"],
        "nbytes_file": loaded.report.nbytes_file,
        "io": loaded.report.io.mode,
    }
    if loaded.build is not None:
        loaded.build.wait()
        result |= {
            "build_seconds": time.perf_counter() - start - seconds,
            "build_from_source_bytes": loaded.build.nbytes_from_source,
            "build_failure": loaded.build.failure,
        }
    if check:
        from wan_loader.verify import verify

        result["verified_tensors"] = verify(path, loaded.tensors)
    return result


def run_case(case: str, state: str, options: argparse.Namespace, cache_dir: Path, check: bool) -> dict:
    if case == "first" and cache_dir.exists():
        shutil.rmtree(cache_dir)
    cache_dir.mkdir(mode=0o700, exist_ok=True)
    for place in (options.path, cache_dir):
        evict(files_below(place)) if state == "cold" else warm(place)
    spec = json.dumps([case, str(options.path), str(cache_dir), options.device, check])
    command = [sys.executable, __file__, "--sample", spec, str(options.path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if done.returncode != 0:
        return {"case": case, "state": state, "error": done.stderr.strip()[-2000:]}
    return {"state": state, **json.loads(done.stdout)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, help="an fp32 checkpoint")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--cache-dir", type=Path, help="on the disk to be measured; default: beside the checkpoint")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--state", choices=("cold", "warm"), action="append", dest="states")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--sample", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.sample:
        case, path, cache_dir, device, check = json.loads(options.sample)
        print(json.dumps(sample(case, Path(path), Path(cache_dir), device, check)))
        return
    run(options)


def run(options: argparse.Namespace) -> None:

    from wan_loader.devices.resolve import device_card
    from wan_loader.system.machine import machine_card

    cache_dir = options.cache_dir or options.path.parent / "converted-cache"
    samples = []
    for state in options.states or ("warm", "cold"):
        for index in range(options.repeat):
            for case in CASES:
                found = run_case(case, state, options, cache_dir, check=index == 0)
                print(
                    f"{state} {case}: {found.get('error') or round(found['seconds'], 3)}", file=sys.stderr, flush=True
                )
                samples.append(found)
    shutil.rmtree(cache_dir, ignore_errors=True)
    machine = {**machine_card(), **device_card("cuda:0" if options.device == "cuda" else "cpu")}
    document = {"schema_version": 1, "command": " ".join(sys.argv), "machine": machine, "samples": samples}
    print_table(samples)
    if options.output:
        options.output.write_text(json.dumps(document, indent=1) + "\n")


def print_table(samples: list[dict]) -> None:
    print("| state | load | median s | all s | CPU s | read from the device | entry written in |")
    print("|---|---|---|---|---|---|---|")
    for state, case in dict.fromkeys((s["state"], s["case"]) for s in samples):
        group = [s for s in samples if (s["state"], s["case"]) == (state, case) and "error" not in s]
        if not group:
            print(f"| {state} | {case} | failed | | | | |")
            continue
        seconds = [s["seconds"] for s in group]
        built = [s["build_seconds"] for s in group if "build_seconds" in s]
        print(
            f"| {state} | {case} | {statistics.median(seconds):.3f} | {', '.join(f'{s:.3f}' for s in seconds)} | "
            f"{statistics.median(s['cpu_seconds'] for s in group):.2f} | "
            f"{statistics.median(s['device_bytes_read'] for s in group) / 1e9:.2f} GB | "
            f"{f'{statistics.median(built):.1f} s' if built else ''} |"
        )


if __name__ == "__main__":
    main()
