"""What `from_pretrained` itself takes: the Python of diffusers and transformers, with our fast path and without.

    python benchmarks/from_pretrained.py DIRECTORY --samples 5 --output from-pretrained.json

Makes a full-size A14B pipeline without weights in the directory (126 GB that take kilobytes on a disk) unless it is
there. `plain` is `WanPipeline.from_pretrained` without a dtype: no weight is looked at then, so none is read, and what
is left is Python. `ours` asks for bf16, for which plain diffusers reads 115 GB; with the fast path those casts wait.
Every sample is a fresh process that has imported the libraries. What counts is CPU time: on a shared machine the clock
tells of others, too. Reading ahead is left out, as there is nothing in the files.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

from sparse import make_sparse
from turns import describe_run, run_fresh

_SAMPLE = """
import json, sys, time, warnings
path, way = sys.argv[1:]
warnings.simplefilter("ignore")
import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from transformers import AutoTokenizer, UMT5EncoderModel
from wan_loader.fastpath.deferral.deferred import is_deferred
from wan_loader.fastpath.libraries.from_diffusers import FromDiffusers
from wan_loader.fastpath.libraries.from_transformers import FromTransformers
from wan_loader.fastpath.moving.moves import Moves
from wan_loader.fastpath.patches import Patches
from wan_loader.fastpath.tally import Tally

def anonymous():
    with open("/proc/self/smaps_rollup") as lines:
        return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Anonymous:"))

dtype = None
if way == "ours":
    tally, dtype = Tally(), torch.bfloat16
    patches, moves = Patches(tally), Moves(tally)
    for seam in (FromDiffusers(tally, moves), FromTransformers(tally, moves)):
        seam.install(patches)
before, cpu, start = anonymous(), time.process_time(), time.perf_counter()
pipe = WanPipeline.from_pretrained(path, torch_dtype=dtype)
found = {"cpu_s": time.process_time() - cpu, "seconds": time.perf_counter() - start, "anonymous": anonymous() - before}
networks = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
found["waiting"] = sum(is_deferred(p) for network in networks for p in network.parameters())
found["nbytes"] = sum(p.nbytes for network in networks for p in network.parameters())
print(json.dumps(found))
"""


def main() -> None:
    """Take the samples by turns, and say what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="where the pipeline is, or is made")
    parser.add_argument("--samples", type=int, default=5, help="of each (default: 5)")
    parser.add_argument("--size", choices=("full", "tiny"), default="full", help="tiny: some MB")
    parser.add_argument("--output", type=Path, help="all samples, as JSON")
    args = parser.parse_args()
    path = args.directory / f"sparse-{args.size}"
    if not path.exists():
        make_sparse(path, layout="diffusers", size=args.size)
    ways = ("plain", "ours")
    found: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    for way in ways:
        run_fresh(_SAMPLE, [str(path), way], way)
    for i in range(args.samples):
        for way in ways if i % 2 else reversed(ways):
            found[way].append(run_fresh(_SAMPLE, [str(path), way], way))
    for way, samples in found.items():
        cpu = sorted(s["cpu_s"] for s in samples)
        seconds = statistics.median(s["seconds"] for s in samples)
        line = f"{way:6s} {statistics.median(cpu):.3f} CPU s ({cpu[0]:.3f} .. {cpu[-1]:.3f}), {seconds:.3f} s"
        line += f", {max(s['anonymous'] for s in samples) >> 20} MiB of its own, {samples[0]['waiting']} casts wait"
        print(line, flush=True)
    if args.output is not None:
        document = describe_run()
        args.output.write_text(json.dumps(document | {"samples": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
