"""Two checkouts of this project by turns on one machine: is a change as fast as what was there before?

    git worktree add ../before COMMIT
    python benchmarks/turns.py /data ../before . --pairs 8 --output turns.json

Makes the checkpoints it needs (60 GB, in the shapes of A14B's experts) unless they are there. Every sample is a fresh
process that has imported torch and the loader and made the CUDA context before its clock starts; which of the two comes
first alternates. The page cache is warm: one load of each case comes before those that count. The last process of each
case compares every tensor with safetensors, bit for bit. "plan" is `open_checkpoint` of 2,626 tensors; "start" is a
whole process that starts a pipeline (two blocks an expert, 18 GB, all resident), imports included, until all networks
have arrived.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

#: Case -> checkpoint below the directory, dtype asked for (- for the file's).
CASES = {
    "bf16": ("bf16", "-"),
    "fp32 to bf16": ("fp32", "bf16"),
    "plan safetensors": ("plan.safetensors", "plan"),
    "plan pth": ("plan.pth", "plan"),
    "start": ("start", "start"),
}
_PLANNED = 2626
_FILES = 6

_SAMPLE = """
import json, os, resource, sys, time
path, device, dtype, check = sys.argv[1:]
import torch
import wan_loader
wan_loader.load_file, wan_loader.open_checkpoint  # imported on first use

if device == "cuda":
    torch.zeros(1, device="cuda")
    torch.cuda.synchronize()

def cpu():
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime

def measured(action):
    before, start = cpu(), time.perf_counter()
    out = action()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, cpu() - before, out

if dtype == "plan":
    seconds, cpu_s, out = min(measured(lambda: (wan_loader.open_checkpoint(path), None)[1]) for _ in range(15))
else:
    wanted = None if dtype == "-" else dtype
    seconds, cpu_s, out = measured(lambda: wan_loader.load_file(path, device=device, dtype=wanted))
equal = None
if check == "check" and out is not None:
    from safetensors import safe_open
    equal = True
    for name in sorted(n for n in os.listdir(path) if n.endswith(".safetensors")):
        with safe_open(os.path.join(path, name), "pt", device=device) as file:
            for key in file.keys():
                expected = file.get_tensor(key).to(out[key].dtype)
                equal &= torch.equal(expected.view(torch.uint8), out[key].view(torch.uint8))
print(json.dumps({"seconds": seconds, "cpu_seconds": cpu_s, "equal": equal}))
"""


_START = """
import json, os, resource, sys, time
path, device = sys.argv[1:3]
from wan_pipeline import WanT2V

with WanT2V.from_checkpoint(path, preset="fastest", device=device, size=(832, 480), frame_num=17) as pipe:
    pipe.wait()
    seconds = (time.monotonic_ns() - int(os.environ["TURNS_START_NS"])) / 1e9
usage = resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps({"seconds": seconds, "cpu_seconds": usage.ru_utime + usage.ru_stime, "equal": None}))
"""


def block_shapes(n_blocks: int, width: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes in the blocks of an expert, by name (`width` 5120: of A14B)."""
    hidden, shapes = width * 27 // 10, dict[str, tuple[int, ...]]()
    for block in range(n_blocks):
        for attention in ("self_attn", "cross_attn"):
            for part in "qkvo":
                shapes[f"blocks.{block}.{attention}.{part}.weight"] = (width, width)
                shapes[f"blocks.{block}.{attention}.{part}.bias"] = (width,)
        shapes[f"blocks.{block}.ffn.0.weight"] = (hidden, width)
        shapes[f"blocks.{block}.ffn.2.weight"] = (width, hidden)
    return shapes


def make_expert(path: Path, n_blocks: int, dtype: str, width: int) -> None:
    """Make blocks in the shapes of an A14B expert (`width` 5120), random bytes, in six shards with an index."""
    import torch
    from safetensors.torch import save_file

    if path.exists():
        return
    path.mkdir(parents=True)
    shapes = block_shapes(n_blocks, width)
    names, kind = list(shapes), getattr(torch, dtype)
    largest = (
        max(map(math.prod, shapes.values())) * kind.itemsize // 2
    )  # in words of two bytes; of a longer pool the rest is never written
    pool = torch.randint(0, 1 << 14, (min(1 << 24, largest),), dtype=torch.int16)  # no NaN in any dtype

    def write(i: int) -> dict[str, str]:
        shard, tensors = f"model-{i + 1:05d}-of-{_FILES:05d}.safetensors", {}
        for k, name in enumerate(names[i::_FILES]):
            tensor = torch.empty(shapes[name], dtype=kind)
            for segment in tensor.view(-1).view(torch.int16).split(pool.numel()):
                segment.copy_(pool.roll(7919 * (i + k))[: segment.numel()])
            tensors[name] = tensor
        save_file(tensors, path / shard)
        return dict.fromkeys(tensors, shard)

    with ThreadPoolExecutor(_FILES) as threads:
        maps = list(threads.map(write, range(_FILES)))
    weight_map = {name: shard for part in maps for name, shard in part.items()}
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def make_planned(directory: Path) -> None:
    """Make as many tensors as a whole model has, tiny ones, in both formats."""
    import torch
    from safetensors.torch import save_file

    if not (directory / "plan.pth").exists():
        state = {f"transformer.blocks.{i // 26}.part.{i % 26}.weight": torch.full((64, 4), i) for i in range(_PLANNED)}
        save_file(state, directory / "plan.safetensors")
        torch.save(state, directory / "plan.pth")


def make_start(path: Path, checkout: Path, size: str) -> None:
    """Make a whole model in the published shapes, with few blocks."""
    if not path.exists():
        words = ["-m", "wan_pipeline", "synth", str(path), "--size", size, "--blocks", "2", "--dtype", "bf16"]
        subprocess.run([sys.executable, *words], env=environment(checkout), stdout=subprocess.DEVNULL, check=True)


def environment(checkout: Path) -> dict[str, str]:
    """Make the environment of a process that imports from a checkout; byte code is kept, as it is for users."""
    others = os.environ.get("PYTHONPATH", "")
    path = f"{checkout.resolve()}{os.pathsep}{others}"
    keeps = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    keeps["PYTHONPYCACHEPREFIX"] = str(Path(tempfile.gettempdir(), "turns-pycache"))  # wherever the checkouts lie
    started = str(time.monotonic_ns())
    return keeps | {"PYTHONPATH": path, "PYTHONWARNINGS": "ignore", "TURNS_START_NS": started}


def describe_run() -> dict[str, Any]:
    """Describe the machine and the command, for the document of a benchmark."""
    return {"command": " ".join(sys.argv), "machine": platform.platform(), "cores": os.cpu_count()}


def run_fresh(
    program: str, words: list[str], what: str, *, env: dict[str, str] | None = None, cwd: Path | None = None
) -> dict[str, Any]:
    """Run a program in a fresh process; return the JSON of its last line. If it fails, exit with what it said."""
    done = subprocess.run(
        [sys.executable, "-c", program, *words], env=env, cwd=cwd, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"{what}: {done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def sample(checkout: Path, path: Path, device: str, dtype: str, *, check: bool = False) -> dict[str, float]:
    """Load once in a fresh process that imports the loader from a checkout."""
    program, words = _START if dtype == "start" else _SAMPLE, [str(path), device, dtype, "check" if check else "-"]
    return run_fresh(program, words, f"{checkout}", env=environment(checkout), cwd=path.parent)


def take_turns(case: str, args: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    """Take all samples of a case."""
    name, dtype = CASES[case]
    path, ways = args.directory / name, {"before": args.before, "after": args.after}
    for checkout in ways.values():  # from here on the page cache is warm, and byte code is compiled
        sample(checkout, path, args.device, dtype)
    samples: dict[str, list[dict[str, float]]] = {"before": [], "after": []}
    pairs = args.starts if dtype == "start" else args.pairs
    for i in range(pairs):
        for way in ("before", "after") if i % 2 else ("after", "before"):
            last = i == pairs - 1
            samples[way].append(sample(ways[way], path, args.device, dtype, check=last and dtype != "plan"))
    return samples


def told(case: str, samples: dict[str, list[dict[str, float]]]) -> str:
    """Write a line for a case: medians, and the ratio of the two in each pair."""
    seconds = {way: [s["seconds"] for s in found] for way, found in samples.items()}
    ratios = sorted(after / before for before, after in zip(seconds["before"], seconds["after"], strict=True))
    wrong = "" if all(s["equal"] is not False for found in samples.values() for s in found) else "  WRONG TENSORS"
    medians = "  ".join(
        f"{way} {statistics.median(found):.4f} s, {statistics.median(s['cpu_seconds'] for s in samples[way]):.3f} CPU s"
        for way, found in seconds.items()
    )
    spread = f"{ratios[0]:.3f} .. {statistics.median(ratios):.3f} .. {ratios[-1]:.3f}"
    return f"{case:18s} {medians}  after/before {spread}{wrong}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="where the checkpoints are made")
    parser.add_argument("before", type=Path, help="a checkout")
    parser.add_argument("after", type=Path, help="another one")
    parser.add_argument("--pairs", type=int, default=8, help="samples of each (default: 8)")
    parser.add_argument("--starts", type=int, default=5, help="samples of each for the case start (default: 5)")
    parser.add_argument("--device", default="cuda", help="cuda or cpu (default: cuda)")
    parser.add_argument("--case", action="append", choices=CASES, help="only this one (again for more)")
    parser.add_argument("--size", choices=("full", "tiny"), default="full", help="tiny: some MB")
    parser.add_argument("--output", type=Path, help="all samples, as JSON")
    args = parser.parse_args()
    width, cases = (5120 if args.size == "full" else 64), args.case or list(CASES)
    args.directory.mkdir(parents=True, exist_ok=True)
    if "bf16" in cases:
        make_expert(args.directory / "bf16", 40, "bfloat16", width)
    if "fp32 to bf16" in cases:
        make_expert(args.directory / "fp32", 20, "float32", width)
    if "start" in cases:
        make_start(args.directory / "start", args.after, args.size)
    make_planned(args.directory)
    document = describe_run() | {"turns": {}}
    for case in cases:
        document["turns"][case] = samples = take_turns(case, args)
        print(told(case, samples), flush=True)
    if args.output is not None:
        args.output.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
