"""Weights that are kept beside weights that are loaded: how soon a fresh process has them.

    python benchmarks/kept.py /data --samples 5 --output kept.json

Loads the checkpoint that lies in the directory; where there is none, it makes an expert of A14B in bf16 there (28.6
GB; `--blocks` for less). Every sample is a fresh process. "seconds" counts from the call, with torch and the loader
imported and the CUDA context made before; "process" counts from the start of the process, imports and context included.
`load` reads from the page cache, `attach` takes what the keeper holds, `copy` copies that on the device; they take
turns. One more process, which does not count, compares all tensors of `load` and `attach`, bit for bit. The keeper is
one of the benchmark's own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path

from turns import describe_run, environment, make_expert, run_fresh

_SAMPLE = """
import json, os, sys, time
path, device, dtype, way = sys.argv[1:]
import torch
from wan_loader import load

def ready():
    if device == "cuda":
        torch.cuda.synchronize()

if device == "cuda":
    torch.zeros(1, device="cuda")
ready()
options = {"device": device, "dtype": None if dtype == "-" else dtype}
if way == "compare":
    found, expected = load(path, keep=True, **options).tensors, load(path, **options).tensors
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name
    print(json.dumps({"tensors": len(found)}))
    sys.exit()
start = time.perf_counter()
result = load(path, keep={"load": False, "attach": True, "copy": "copy"}[way], **options)
ready()
seconds = time.perf_counter() - start
process_s = (time.monotonic_ns() - int(os.environ["TURNS_START_NS"])) / 1e9
assert (result.kept is None) is (way == "load") and (result.kept is None or result.kept.state != "source"), result.kept
print(json.dumps({"seconds": seconds, "process_s": process_s, "tensors": len(result.tensors)}))
"""

_KEEP = """
import json, sys, time
path, device, dtype = sys.argv[1:]
from wan_loader import keep
start = time.perf_counter()
kept = keep(path, device, dtype=None if dtype == "-" else dtype)
print(json.dumps({"seconds": time.perf_counter() - start, "nbytes": kept.report.nbytes_device}))
"""

_STOP = "from wan_loader.keeper import client; print(int(client.stop()))"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="where the checkpoint is, or is made")
    parser.add_argument("--samples", type=int, default=5, help="of each (default: 5)")
    parser.add_argument("--device", default="cuda", help="cuda or cpu (default: cuda)")
    parser.add_argument("--dtype", default="-", help="convert to it on the way (default: as in the file)")
    parser.add_argument("--blocks", type=int, default=40, help="of the expert that is made (default: 40)")
    parser.add_argument("--size", choices=("full", "tiny"), default="full", help="tiny: some MB")
    parser.add_argument("--output", type=Path, help="all samples, as JSON")
    args = parser.parse_args()
    path = args.directory
    if not any(path.glob("*.safetensors*")):
        path = args.directory / "bf16"
        args.directory.mkdir(parents=True, exist_ok=True)
        make_expert(path, args.blocks, "bfloat16", 5120 if args.size == "full" else 64)
    with tempfile.TemporaryDirectory(prefix="kept-") as runtime:
        document = measure(path, args, runtime)
    if args.output is not None:
        args.output.write_text(json.dumps(describe_run() | document, indent=1) + "\n")


def measure(path: Path, args: argparse.Namespace, runtime: str) -> dict[str, object]:
    """Keep the checkpoint, and take all samples."""
    root, words = Path(__file__).parent.parent, [str(path.resolve()), args.device, args.dtype]

    def run(program: str, words: list[str], what: str) -> dict[str, float]:
        return run_fresh(program, words, what, env=environment(root) | {"XDG_RUNTIME_DIR": runtime})

    ways = ("load", "attach", "copy")
    found: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    try:
        kept = run(_KEEP, words, "keep")
        print(f"kept {kept['nbytes'] / 1e9:.2f} GB in {kept['seconds']:.2f} s", flush=True)
        run(_SAMPLE, [*words, "compare"], "compare")
        for i in range(args.samples):
            for way in ways if i % 2 else reversed(ways):
                found[way].append(run(_SAMPLE, [*words, way], way))
    finally:
        run(_STOP, [], "stop")
    for way, samples in found.items():
        line = f"{way:7s}"
        for name in ("seconds", "process_s"):
            seconds = sorted(s[name] for s in samples)
            line += f" {name} {statistics.median(seconds):.4f} ({seconds[0]:.4f} .. {seconds[-1]:.4f})"
        print(line, flush=True)
    return {"kept": kept, "samples": found}


if __name__ == "__main__":
    main()
