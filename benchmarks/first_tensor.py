"""How soon `iter_file` hands out its first tensor, and what it takes in all beside `load_file`.

    python benchmarks/first_tensor.py /data --samples 5 --output first.json

Loads the checkpoint that lies in the directory; where there is none, it makes an expert of A14B in bf16 there (28.6
GB). Every sample is a fresh process that has imported torch and the loader and made the CUDA context before its clock
starts. `load_file` and `iter_file` take turns; the page cache is warm from a load of each that does not count. The
first tensor counts once the program has it; on a GPU all of its bytes are there then.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

from turns import describe_run, make_expert, run_fresh

_SAMPLE = """
import json, sys, time
path, device, dtype, way = sys.argv[1:]
import torch
from wan_loader import iter_file, load_file

if device == "cuda":
    torch.zeros(1, device="cuda")
    torch.cuda.synchronize()
wanted, first = None if dtype == "-" else dtype, None
start = time.perf_counter()
if way == "load_file":
    kept = load_file(path, device=device, dtype=wanted)
else:
    kept = {}
    for name, tensor in iter_file(path, device=device, dtype=wanted):
        first = first or time.perf_counter() - start
        kept[name] = tensor
if device == "cuda":
    torch.cuda.synchronize()
print(json.dumps({"first_s": first, "seconds": time.perf_counter() - start, "tensors": len(kept)}))
"""


def sample(path: Path, device: str, dtype: str, way: str) -> dict[str, float]:
    """Load once in a fresh process."""
    return run_fresh(_SAMPLE, [str(path), device, dtype, way], way)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="where the checkpoint is, or is made")
    parser.add_argument("--samples", type=int, default=5, help="of each (default: 5)")
    parser.add_argument("--device", default="cuda", help="cuda or cpu (default: cuda)")
    parser.add_argument("--dtype", default="-", help="convert to it on the way (default: as in the file)")
    parser.add_argument("--size", choices=("full", "tiny"), default="full", help="tiny: some MB")
    parser.add_argument("--output", type=Path, help="all samples, as JSON")
    args = parser.parse_args()
    path = args.directory
    if not any(path.glob("*.safetensors*")):
        path = args.directory / "bf16"
        args.directory.mkdir(parents=True, exist_ok=True)
        make_expert(path, 40, "bfloat16", 5120 if args.size == "full" else 64)
    ways = ("load_file", "iter_file")
    found: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    for way in ways:
        sample(path, args.device, args.dtype, way)
    for i in range(args.samples):
        for way in ways if i % 2 else reversed(ways):
            found[way].append(sample(path, args.device, args.dtype, way))
    for way, samples in found.items():
        seconds = sorted(s["seconds"] for s in samples)
        line = f"{way:10s} {statistics.median(seconds):.4f} s ({seconds[0]:.4f} .. {seconds[-1]:.4f})"
        if way == "iter_file":
            shares = sorted(s["first_s"] / s["seconds"] for s in samples)
            first = statistics.median(s["first_s"] for s in samples)
            line += f"  first tensor after {first * 1e3:.1f} ms, {statistics.median(shares):.3f} of the whole"
            line += f" ({shares[0]:.3f} .. {shares[-1]:.3f})"
        print(line, flush=True)
    if args.output is not None:
        document = describe_run()
        args.output.write_text(json.dumps(document | {"samples": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
