"""What `wan-loader estimate` says of a start, beside that start: ten loads, each a fresh process.

    python benchmarks/estimates.py /data --output benchmarks/results/MACHINE/estimates.json
    python benchmarks/estimates.py /data --device cuda --gb 10

Makes the files it needs (`--gb` each) unless they are there. Before each case the machine is measured again (`doctor
--refresh`, whose samples add up), then the estimate is made from headers, then the start is timed: from the start of
Python to the end of the load, imports included. The page cache is warm, or the files were evicted from it. An estimate
is right if it is within 10 % of the median; where the machine is not steady, if the median lies within what the
estimate itself says it may be off by. With --patience, each measurement waits until the machine is not busy.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from cpu_casts import make_file
from turns import describe_run


class Case(NamedTuple):
    """What is loaded, as what, and where it lies before."""

    files: tuple[str, ...]
    source: str
    dtype: str | None
    cold: bool = False


_SHARDS = tuple(f"shards/model-{i:05}-of-00004.safetensors" for i in range(1, 5))
CASES = {
    "fp32": Case(("fp32.safetensors",), "float32", None),
    "fp32 to bf16": Case(("fp32.safetensors",), "float32", "bf16"),
    "bf16": Case(("bf16.safetensors",), "bfloat16", None),
    "bf16 to fp32": Case(("bf16.safetensors",), "bfloat16", "fp32"),
    "pth": Case(("fp32.pth",), "float32", None),
    "pth fp32 to bf16": Case(("fp32.pth",), "float32", "bf16"),
    "four files": Case(_SHARDS, "float32", None),
    "four files fp32 to fp16": Case(_SHARDS, "float32", "fp16"),
    "cold bf16": Case(("bf16.safetensors",), "bfloat16", None, cold=True),
    "cold four files fp32 to bf16": Case(_SHARDS, "float32", "bf16", cold=True),
}

_START = """
import json, sys, time
import torch
import wan_loader
path, device, dtype, io = sys.argv[1:]
report = wan_loader.load(path, device=device, dtype=None if dtype == "-" else dtype, io=io).report
print(json.dumps({"ended_ns": time.monotonic_ns(), "load_s": report.seconds, "mode": report.io.mode}))
"""


def make(directory: Path, case: Case, gb: float) -> Path:
    """Make the files of a case, unless they are there; return what is loaded."""
    first = directory / case.files[0]
    if not first.exists():
        first.parent.mkdir(parents=True, exist_ok=True)
        make_file(first, case.source, int(gb * 1e9))
        if len(case.files) > 1:
            divide(directory, case.files)
    return first if len(case.files) == 1 else first.parent


def divide(directory: Path, files: tuple[str, ...]) -> None:
    """Share out the tensors of the first file among all, and write their index."""
    from safetensors.torch import load_file, save_file

    tensors = [*load_file(directory / files[0]).items()]
    index = {}
    for i, name in enumerate(files):
        part = {key: tensor.clone() for key, tensor in tensors[i :: len(files)]}
        save_file(part, directory / f"{name}.new")
        index |= dict.fromkeys(part, Path(name).name)
    for name in files:
        (directory / f"{name}.new").replace(directory / name)
    (directory / Path(files[0]).parent / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def settle(directory: Path, case: Case) -> None:
    """Bring the files into the page cache, or take them out of it."""
    for name in case.files:
        with (directory / name).open("rb", buffering=0) as file:
            if case.cold:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            else:
                while file.read(1 << 24):
                    pass


def run(*words: str, environ: dict[str, str]) -> str:
    """Run a command of ours, and return what it prints."""
    done = subprocess.run(
        [sys.executable, "-m", "wan_loader", *words], env=environ, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"{words}: {done.stderr}")
    return done.stdout


def wait_for_quiet(patience_s: float) -> None:
    """Wait until nobody waits for a processor, but not for ever."""
    from wan_loader.profiler.probe.busy import busy_reason

    until_s = time.monotonic() + patience_s
    while time.monotonic() < until_s and busy_reason():
        time.sleep(0.5)


def measure(directory: Path, name: str, args: argparse.Namespace, environ: dict[str, str]) -> dict[str, Any]:
    """Estimate and time one case."""
    case = CASES[name]
    path = make(directory, case, args.gb)
    settle(directory, case)
    wait_for_quiet(args.patience)
    run("doctor", str(path), "--device", args.device, "--refresh", "--json", environ=environ)
    words = ["--dtype", case.dtype] if case.dtype else []
    document = json.loads(run("estimate", str(path), "--device", args.device, *words, "--json", environ=environ))
    wanted = "this disk" if case.cold else "page cache"
    estimate = next((row for row in document["estimates"] if row["storage"] == wanted), None)
    if estimate is None:
        sys.exit(f"{name}: {wanted} was not measured: files that are larger may help (--gb)")
    # what lies in the page cache would else be mapped into host memory, and read later
    io = "buffered" if args.device == "cpu" and not case.cold else "auto"
    words = [sys.executable, "-c", _START, str(path), args.device, case.dtype or "-", io]
    samples = []
    for _ in range(args.samples):
        settle(directory, case)
        wait_for_quiet(args.patience)
        start_ns = time.monotonic_ns()
        done = subprocess.run(words, env=environ, capture_output=True, check=True)
        found = json.loads(done.stdout)
        samples.append({"seconds": (found.pop("ended_ns") - start_ns) / 1e9, **found})
    return {"estimate": estimate, "rates": document["rates"], "notes": document["notes"], "samples": samples}


def judged(result: dict[str, Any]) -> dict[str, Any]:
    """Compare an estimate with the median of the starts."""
    seconds = statistics.median(sample["seconds"] for sample in result["samples"])
    estimate = result["estimate"]
    return {
        "median_s": seconds,
        "off": estimate["seconds"] / seconds - 1,
        "within_10_percent": abs(estimate["seconds"] / seconds - 1) <= 0.1,
        "within_spread": estimate["fastest_s"] <= seconds <= estimate["slowest_s"],
    }


def main() -> None:
    """Measure all cases, and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="where the files are, or are made")
    parser.add_argument("--gb", type=float, default=1.6, help="of each case (default: 1.6)")
    parser.add_argument("--samples", type=int, default=3, help="starts of each case (default: 3)")
    parser.add_argument("--patience", type=float, default=0.0, help="wait so many seconds for a quiet machine")
    parser.add_argument("--case", choices=CASES, action="append", help="only this one (again for more)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--output", type=Path, help="all samples, as JSON")
    args = parser.parse_args()
    results = {}
    print(f"{'case':30s} {'estimate':>9s} {'from .. to':>16s} {'start':>9s} {'off':>6s}")
    with tempfile.TemporaryDirectory() as cache:
        environ = os.environ | {"XDG_CACHE_HOME": cache}
        for name in args.case or CASES:
            if not results:  # before the first: byte code is compiled, libraries are in the page cache
                subprocess.run([sys.executable, "-c", "import torch, wan_loader; wan_loader.load"], check=True)
            result = measure(args.directory, name, args, environ)
            results[name] = result | judged(result)
            row, outcome = result["estimate"], results[name]
            state = "right" if outcome["within_10_percent"] else "in its spread" if outcome["within_spread"] else "OFF"
            print(
                f"{name:30s} {row['seconds']:7.2f} s {row['fastest_s']:6.2f} .. {row['slowest_s']:6.2f} "
                f"{outcome['median_s']:7.2f} s {outcome['off']:6.0%}  {state}",
                flush=True,
            )
            if args.output is not None:
                args.output.write_text(json.dumps(describe_run() | {"gb": args.gb, "starts": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
