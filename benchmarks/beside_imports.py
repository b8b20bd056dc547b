"""What a load costs beside a busy interpreter: imports of large libraries, or a loop of Python, in the main thread.

    python benchmarks/beside_imports.py /data --output beside.json
    git worktree add ../before COMMIT
    python benchmarks/beside_imports.py /data --trees ../before . --pairs 5 --output beside.json

Loads the checkpoint that lies in the directory; where there is none, it makes an expert of A14B in bf16 there (28.6
GB), the one that turns.py uses. Every sample is a fresh process that has imported torch and the loader and made the
CUDA context before its clock starts. Then it loads alone, or imports alone what a pipeline of WAN does, or loads in a
thread while the main thread imports that, or while it runs a loop of Python; the last two with the interpreter's own
turns of 5 ms and with 0.1 ms, which wan_pipeline sets during imports. Cases and trees take turns, every second round
the other way round. One round comes before those that count: from then on the page cache is warm and byte code is
compiled. Five pairs of two trees are 72 processes: about eight minutes at six seconds each.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
from pathlib import Path

from turns import describe_run, environment, make_expert, run_fresh

#: Case -> does it load, what the main thread does meanwhile, turns of the interpreter in seconds (0: its own).
CASES = {
    "load alone": (True, "wait", 0.0),
    "imports alone": (False, "import", 0.0),
    "load beside imports": (True, "import", 0.0),
    "load beside imports, 0.1 ms": (True, "import", 0.0001),
    "load beside a loop": (True, "loop", 0.0),
    "load beside a loop, 0.1 ms": (True, "loop", 0.0001),
}

_SAMPLE = """
import json, resource, sys, threading, time
path, device, loads, main_does, turn_s = sys.argv[1:]
import torch
from wan_loader import load_file

if device == "cuda":
    torch.zeros(1, device="cuda")
    torch.cuda.synchronize()
found = {"load_s": None, "imports_s": None, "loop_alone": None, "loop_beside": None}

def load():
    start = time.perf_counter()
    tensors = load_file(path, device=device)
    if device == "cuda":
        torch.cuda.synchronize()
    found["load_s"] = time.perf_counter() - start
    found["nbytes"] = sum(t.nbytes for t in tensors.values())

def turn_of_loop():
    n = 0
    for i in range(1000):
        n += i & 3

def rounds_per_s(goes_on):
    rounds, start = 0, time.perf_counter()
    while goes_on():
        turn_of_loop()
        rounds += 1
    return rounds / max(time.perf_counter() - start, 1e-9)

if main_does == "loop":
    end = time.perf_counter() + 0.3
    found["loop_alone"] = rounds_per_s(lambda: time.perf_counter() < end)
if float(turn_s):
    sys.setswitchinterval(float(turn_s))
before = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
thread = threading.Thread(target=load)
if loads == "True":
    thread.start()
if main_does == "import":
    start = time.perf_counter()
    from transformers import AutoTokenizer, UMT5EncoderModel
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanTransformer3DModel
    found["imports_s"] = time.perf_counter() - start
elif main_does == "loop":
    found["loop_beside"] = rounds_per_s(thread.is_alive)
if loads == "True":
    thread.join()
    if found["load_s"] is None:
        sys.exit("the load failed")
found["cpu_seconds"] = sum(resource.getrusage(resource.RUSAGE_SELF)[:2]) - before
print(json.dumps(found))
"""


def checkpoint_in(directory: Path, size: str) -> Path:
    """Return the directory, if it is a checkpoint's, or else one below it, which is made unless it is there."""
    if any(directory.glob("*.safetensors")):
        return directory
    directory.mkdir(parents=True, exist_ok=True)
    make_expert(directory / "bf16", 40, "bfloat16", 5120 if size == "full" else 64)
    return directory / "bf16"


def sample(tree: Path, path: Path, device: str, case: str) -> dict[str, float | None]:
    """Run a case in a fresh process that imports the loader from a tree."""
    words = [str(path), device, *map(str, CASES[case])]
    offline = environment(tree) | {"HF_HUB_OFFLINE": "1"}
    return run_fresh(_SAMPLE, words, f"{tree}, {case}", env=offline, cwd=path.parent)


Samples = dict[str, dict[str, list[dict[str, float | None]]]]


def take_turns(trees: dict[str, Path], path: Path, device: str, pairs: int) -> Samples:
    """Take all samples: tree -> case -> samples."""
    turns = [(name, case) for case in CASES for name in trees]
    for name, case in turns:
        sample(trees[name], path, device, case)
    samples: Samples = {name: {case: [] for case in CASES} for name in trees}
    for i in range(pairs):
        for name, case in turns if i % 2 else reversed(turns):
            samples[name][case].append(sample(trees[name], path, device, case))
    return samples


def told(samples: Samples) -> list[str]:
    """Write a line for each case and tree: seconds, and their ratios to those of the load and of the imports alone."""
    lines = []
    width = max(map(len, samples))
    for case in CASES:
        for name, found in samples.items():
            words = [f"{case:28s} {name:{width}s}"]
            for key, what, alone in (("load_s", "load", "load alone"), ("imports_s", "imports", "imports alone")):
                if all(s[key] is not None for s in found[case]):
                    words.append(_seconds(what, _values(found[case], key), _values(found[alone], key)))
            if all(s["loop_beside"] for s in found[case]):
                words.append(f"loop at {statistics.median(map(_loop_share, found[case])):.2f} of its rate alone")
            lines.append("  ".join(words))
    return lines + _pairs(samples)


def _values(found: list[dict[str, float | None]], key: str) -> list[float]:
    return [s[key] for s in found if s[key] is not None]


def _loop_share(found: dict[str, float | None]) -> float:
    return (found["loop_beside"] or 0.0) / (found["loop_alone"] or 1.0)


def _seconds(what: str, seconds: list[float], alone: list[float]) -> str:
    median = statistics.median(seconds)
    ratio = "" if seconds == alone else f" = {median / statistics.median(alone):.2f} x alone"
    return f"{what} {median:.4f} s ({min(seconds):.4f} .. {max(seconds):.4f}){ratio}"


def _pairs(samples: Samples) -> list[str]:
    """Write the ratio of two trees in each pair, for each case that loads."""
    if len(samples) < 2:
        return []
    (before, first), (after, second) = samples.items()
    lines = []
    for case in (case for case, (loads, *_) in CASES.items() if loads):
        pairs = zip(_values(first[case], "load_s"), _values(second[case], "load_s"), strict=True)
        ratios = sorted(y / x for x, y in pairs)
        spread = f"{ratios[0]:.3f} .. {statistics.median(ratios):.3f} .. {ratios[-1]:.3f}"
        lines.append(f"{case:28s} load, {after}/{before} of each pair {spread}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="a checkpoint, or where one is made")
    parser.add_argument("--trees", nargs=2, type=Path, metavar=("BEFORE", "AFTER"), help="two checkouts by turns")
    parser.add_argument("--pairs", type=int, default=5, help="samples of each case and tree (default: 5)")
    parser.add_argument("--device", default="cuda", help="cuda or cpu (default: cuda)")
    parser.add_argument(
        "--size", choices=("full", "tiny"), default="full", help="of the one that is made; tiny: some MB"
    )
    parser.add_argument("--output", type=Path, help="all samples, as JSON")
    args = parser.parse_args()
    trees = (
        dict(zip(("before", "after"), args.trees, strict=True)) if args.trees else {"here": Path(__file__).parents[1]}
    )
    samples = take_turns(trees, checkpoint_in(args.directory, args.size).resolve(), args.device, args.pairs)
    print("\n".join(told(samples)), flush=True)
    if args.output is not None:
        cases = {
            case: dict(zip(("loads", "main_thread", "turn_s"), facts, strict=True)) for case, facts in CASES.items()
        }
        document = describe_run()
        document |= {"python": platform.python_version(), "device": args.device, "ways": cases, "turns": samples}
        args.output.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
