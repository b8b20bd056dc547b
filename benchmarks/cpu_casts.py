"""Loads into host memory with a conversion, beside what libraries offer, by turns: safetensors + `.to`, and torch.load.

    python benchmarks/cpu_casts.py /data --gb 1.6 --pairs 5 --output cpu_casts.json

Makes the files it needs (`--gb` each) unless they are there. Every sample is a fresh process that has imported torch
and the loaders before its clock starts; which of the two comes first alternates, and the ratio is that of each pair.
The page cache is warm: one load of each comes before those that count. The last process of each case that loads with
wan-loader compares every tensor with the other's, bit for bit. Peak memory counts mapped pages of the file, as the
system does.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
from pathlib import Path
from typing import Any, NamedTuple

from turns import run_fresh

ROOT = Path(__file__).resolve().parent.parent


class Case(NamedTuple):
    """A file, and what it is loaded as."""

    file: str
    source: str
    dtype: str | None


CASES = {
    "fp32 to bf16": Case("fp32.safetensors", "float32", "bfloat16"),
    "fp32 to fp16": Case("fp32.safetensors", "float32", "float16"),
    "bf16 to fp32": Case("bf16.safetensors", "bfloat16", "float32"),
    "fp8 to bf16": Case("fp8.safetensors", "float8_e4m3fn", "bfloat16"),
    "plain": Case("fp32.safetensors", "float32", None),
    "pth": Case("fp32.pth", "float32", None),
    "pth fp32 to bf16": Case("fp32.pth", "float32", "bfloat16"),
}

_SAMPLE = """
import json, re, resource, sys, time
way, path, name, check = sys.argv[1:]
import safetensors.torch
import torch
import wan_loader
wan_loader.load_file  # imported on first use

dtype = None if name == "-" else getattr(torch, name)

def theirs():
    if path.endswith(".pth"):
        state = torch.load(path, map_location="cpu", weights_only=True)
    else:
        state = safetensors.torch.load_file(path)
    return state if dtype is None else {key: tensor.to(dtype) for key, tensor in state.items()}

def ours():
    return wan_loader.load_file(path, dtype=dtype)

def cpu():
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime

load = ours if way == "ours" else theirs
before, start = cpu(), time.perf_counter()
out = load()
seconds, cpu_s = time.perf_counter() - start, cpu() - before
peak = int(re.search("VmHWM:.* ([0-9]+) kB", open("/proc/self/status").read())[1]) << 10
equal = None
if check == "check":
    expected = theirs()
    equal = out.keys() == expected.keys() and all(
        torch.equal(out[key].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))
        for key, tensor in expected.items()
    )
print(json.dumps({"seconds": seconds, "cpu_seconds": cpu_s, "peak_rss_bytes": peak, "equal": equal}))
"""


def make_file(path: Path, dtype: str, nbytes: int) -> None:
    """Make a file of random weights in the shapes of a large transformer's blocks."""
    import torch
    from safetensors.torch import save_file

    kind, state, left = getattr(torch, dtype), dict[str, torch.Tensor](), nbytes
    width = 5120 if nbytes >= 1 << 29 else 128
    shapes = [(width, width), (width,), (width, width), (width,), (width * 27 // 10, width), (width, width * 27 // 10)]
    pool = torch.randn(1 << 22, generator=torch.Generator().manual_seed(0)).to(kind).view(torch.uint8)
    while left > 0:
        for shape in shapes:
            tensor = torch.empty(shape, dtype=kind)
            for piece in tensor.view(-1).view(torch.uint8).split(pool.numel()):
                piece.copy_(pool[: piece.numel()])
            if left > 0:
                state[f"blocks.{len(state)}.weight"] = tensor
            left -= tensor.nbytes
    if path.suffix == ".pth":
        torch.save(state, path)
    else:
        save_file(state, path)


def sample(way: str, path: Path, dtype: str | None, *, check: bool = False) -> dict[str, Any]:
    """Load once in a fresh process."""
    others = os.environ.get("PYTHONPATH", "")
    words = [way, str(path), dtype or "-", "check" if check else "-"]
    return run_fresh(_SAMPLE, words, f"{way} {path}", env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{others}"})


def take_turns(case: Case, path: Path, pairs: int) -> dict[str, list[dict[str, Any]]]:
    """Take all samples of a case."""
    samples: dict[str, list[dict[str, Any]]] = {"theirs": [], "ours": []}
    for way in samples:
        sample(way, path, case.dtype)  # from here on the page cache is warm
    for i in range(pairs):
        for way in ("theirs", "ours") if i % 2 else ("ours", "theirs"):
            check = way == "ours" and i == pairs - 1
            samples[way].append(sample(way, path, case.dtype, check=check))
    return samples


def lines(name: str, samples: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Write a case: a line for each way, and what ours gains in each pair."""
    seconds = {way: [s["seconds"] for s in found] for way, found in samples.items()}
    gains = sorted(a / b for a, b in zip(seconds["theirs"], seconds["ours"], strict=True))
    out = []
    for way, found in samples.items():
        ordered = sorted(seconds[way])
        cpu_s = statistics.median(s["cpu_seconds"] for s in found)
        peak = statistics.median(s["peak_rss_bytes"] for s in found)
        out.append(
            f"{name if way == 'theirs' else '':17s} {way:7s} {statistics.median(ordered):7.3f} "
            f"{ordered[0]:7.3f} - {ordered[-1]:6.3f} {cpu_s:7.3f} {peak / 1e9:8.2f}"
        )
    out[-1] += f"   {statistics.median(gains):5.2f}x ({gains[0]:.2f} - {gains[-1]:.2f})"
    if not all(s["equal"] is not False for s in samples["ours"]):
        out.append("WRONG TENSORS")
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="where the files are made")
    parser.add_argument("--gb", type=float, default=1.6, help="the size of each file (default: 1.6)")
    parser.add_argument("--pairs", type=int, default=5, help="samples of each (default: 5)")
    parser.add_argument("--case", action="append", choices=CASES, help="only this one (again for more)")
    parser.add_argument("--output", type=Path, help="all samples, as JSON")
    args = parser.parse_args()
    args.directory.mkdir(parents=True, exist_ok=True)
    document: dict[str, Any] = {
        "command": " ".join(sys.argv),
        "machine": platform.platform(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "gb": args.gb,
        "ways": {},
    }
    print(
        f"{'case':17s} {'loader':7s} {'median':>7s} {'spread (s)':>16s} {'CPU s':>7s} {'peak GB':>8s}   gain in pairs"
    )
    for name in args.case or CASES:
        path = args.directory / CASES[name].file
        if not path.exists():
            make_file(path, CASES[name].source, int(args.gb * 1e9))
        document["ways"][name] = samples = take_turns(CASES[name], path, args.pairs)
        print("\n".join(lines(name, samples)), flush=True)
        if args.output is not None:
            args.output.write_text(json.dumps(document, indent=1) + "\n")
    if any(s["equal"] is False for samples in document["ways"].values() for s in samples["ours"]):
        sys.exit("tensors differ")


if __name__ == "__main__":
    main()
