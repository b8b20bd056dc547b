"""A start from the stand-by server beside a direct one: from the start of the process to what the user waits for.

    python benchmarks/standby.py /data --output benchmarks/results/NAME.json
    python benchmarks/standby.py /tmp/bench --size tiny --device cpu --pairs 1

Makes a checkpoint in A14B's shapes with few blocks an expert, in the diffusers layout, unless it is there. Programs:

    script     knows nothing of us: WanPipeline.from_pretrained(torch_dtype=bf16).to(device); clocks: its first line,
               after its imports, when the device has finished
    generate   wan-pipeline generate; the clock of its own report: the first denoising step can run
    step       to the first denoising step and to its end, by a program of five lines: `plain` is diffusers'
               from_pretrained(torch_dtype=bf16).to(device), the others are WanT2V
    ranks      the script in two processes, each to a GPU of its own; torchrun, or `wan-loader run --nproc`; only when
               it is asked for

Ways: `plain` (python, torchrun), `direct` (wan-loader, without a server; for `step`, python), `stand-by`, and for
`step` also `kept`: stand-by, and the networks are in the device's memory before (`wan-loader standby keep`). Every
sample is a fresh process; ways take turns, every second round the other way round, apart from `kept`, which comes at
the end, when there is room. One round comes before those that count: from then on the page cache is warm, byte code is
compiled, and the server has learned what is imported. Samples of --cold find none of the files in the page cache. A sum
over the bytes of all weights must be the same in all, and what a step gives. The server is one of the benchmark's own,
and its start is told as well. Each round also measures what no start can do without: the start of Python, `import
torch`, the device's context, and the rate of copies from pinned memory.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import string
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from pipeline_start import machine, make_checkpoint
from turns import describe_run, environment, run_fresh

from wan_loader.warming.evict import evict

_SCRIPT = """
import json, os, sys, time
begun = time.monotonic_ns()
path, device = sys.argv[1:3]
import torch
from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel
from transformers import AutoTokenizer, UMT5EncoderModel
imported = time.monotonic_ns()
if device == "cuda" and "LOCAL_RANK" in os.environ:
    device = "cuda:" + os.environ["LOCAL_RANK"]
pipe = WanPipeline.from_pretrained(path, torch_dtype=torch.bfloat16).to(device)
if device != "cpu":
    torch.cuda.synchronize()
loaded = time.monotonic_ns()
total = 0
for module in pipe.components.values():
    if isinstance(module, torch.nn.Module):
        for tensor in module.state_dict().values():
            total += int(tensor.contiguous().view(-1).view(torch.uint8).sum(dtype=torch.int64))
start = int(os.environ["TURNS_START_NS"])
seconds = {"first line": begun - start, "imported": imported - start, "loaded": loaded - start}
print(json.dumps({"seconds": {name: ns / 1e9 for name, ns in seconds.items()}, "sum": total}))
"""
_STEP = """
import json, os, sys, time
path, device, size, frames, way = sys.argv[1:]
width, height = map(int, size.split("*"))
seconds, found = {}, []

class Done(Exception):
    pass

def clock(name):
    import torch
    if device != "cpu":
        torch.cuda.synchronize()
    seconds[name] = (time.monotonic_ns() - int(os.environ["TURNS_START_NS"])) / 1e9

def before(module, args):
    clock("first step")

def after(module, args, output):
    import torch
    clock("end of step")
    output = output if isinstance(output, tuple) else output.sample
    found.append(output[0].float().sum(dtype=torch.float64).item())
    raise Done

def watch(network):
    network.register_forward_pre_hook(before)
    network.register_forward_hook(after)

prompt = "two cats boxing on a stage"
pipeline = None
try:
    if way == "plain":
        import torch
        from diffusers import WanPipeline
        pipe = WanPipeline.from_pretrained(path, torch_dtype=torch.bfloat16).to(device)
        watch(pipe.transformer)
        generator = torch.Generator("cpu").manual_seed(1)
        options = {"num_frames": int(frames), "num_inference_steps": 4, "generator": generator}
        pipe(prompt, width=width, height=height, **options)
    else:
        from wan_pipeline import WanT2V
        settings = {"size": (width, height), "frame_num": int(frames)}
        preset, kept = "fastest", way == "kept"
        with WanT2V.from_checkpoint(path, preset=preset, device=device, keep=kept, **settings) as pipe:
            watch(pipe.pipe.transformer)
            try:
                pipe(prompt, steps=4, seed=1, **settings)
            finally:
                pipeline = pipe.report()["pipeline"] | {"phases": pipe.report()["phases"]}
except Done:
    pass
print(json.dumps({"seconds": seconds, "sum": found[0], "pipeline": pipeline}))
"""
_NEEDED = """
import json, os, sys, time
def elapsed():
    return (time.monotonic_ns() - int(os.environ["TURNS_START_NS"])) / 1e9
device, seconds = sys.argv[1], {"python": elapsed()}
import torch
seconds["import torch"] = elapsed() - seconds["python"]
rate = None
if device != "cpu":
    begun = elapsed()
    torch.zeros(1, device=device)
    torch.cuda.synchronize()
    seconds["context"] = elapsed() - begun
    source = torch.empty(1 << 28, dtype=torch.uint8, pin_memory=True)
    target = torch.empty_like(source, device=device)
    target.copy_(source)
    torch.cuda.synchronize()
    begun = elapsed()
    for _ in range(8):
        target.copy_(source, non_blocking=True)
    torch.cuda.synchronize()
    rate = 8 * target.nbytes / (elapsed() - begun)
print(json.dumps({"seconds": seconds, "bytes_per_s": rate}))
"""
WAYS = ("plain", "direct", "stand-by", "kept")
_N_PIECES = 256_300
PROGRAMS = ["step", "script", "generate", "ranks"]
_VIDEO = {"full": ("832*480", "17"), "tiny": ("32*32", "5")}


def command(program: str, way: str, args: argparse.Namespace) -> list[str] | None:
    """Return the command line of a sample; None where there is none."""
    script = [str(args.script), args.ckpt, args.device]
    flag = "--standby" if way in ("stand-by", "kept") else "--no-standby"
    run = ["-m", "wan_loader", "run", "--quiet", flag]
    if program == "generate":
        size, frames = _VIDEO[args.size]
        words = ["--prompt", "two cats boxing on a stage", "--size", size, "--frame_num", frames, "--sample_steps", "1"]
        words += ["--save_file", str(args.script.parent / "video.mp4"), "--force", "--json", "--device", args.device]
        generate = ["-m", "wan_pipeline", "generate", "--ckpt_dir", args.ckpt, "--base_seed", "1", *words, flag]
        return None if way in ("plain", "kept") else generate
    if program == "step":
        step = [str(args.script.with_name("step.py")), args.ckpt, args.device, *_VIDEO[args.size], way]
        return [*run, *step] if way in ("stand-by", "kept") else step
    if way == "kept":
        return None
    if program == "ranks":
        launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2"]
        return [*launcher, *script] if way == "plain" else [*run, "--nproc", "2", *script]
    return script if way == "plain" else [*run, *script]


def sample(program: str, way: str, args: argparse.Namespace, *, cold: bool = False) -> dict[str, Any] | None:
    """Take one sample: seconds by what has happened, and the sum of the weights."""
    words = command(program, way, args)
    if words is None:
        return None
    if cold:
        evict([str(file) for file in Path(args.ckpt).rglob("*.safetensors")])
    env = args.environment | {"TURNS_START_NS": str(time.monotonic_ns())}
    done = subprocess.run([sys.executable, *words], env=env, cwd="/", capture_output=True, text=True, check=False)
    if done.returncode or "started directly" in done.stderr:
        sys.exit(f"{program}, {way}: {done.stderr}")
    if program == "generate":
        report = json.loads(done.stdout)
        expected = "forked" if way == "stand-by" else "imported"
        if report["pipeline"]["started"] != expected:
            sys.exit(f"{program}, {way}: it was {report['pipeline']['started']}")
        return {"seconds": {"first step": report["pipeline"]["time_to_first_step_s"]}, "sum": 0}
    each = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    slowest = {name: max(one["seconds"][name] for one in each) for name in each[0]["seconds"]}
    return each[0] | {"seconds": slowest, "sum": sum(one["sum"] for one in each) // len(each)}


def needed(args: argparse.Namespace) -> dict[str, Any]:
    """Measure what no start can do without."""
    return run_fresh(
        _NEEDED, [args.device], "needed", env=args.environment | {"TURNS_START_NS": str(time.monotonic_ns())}
    )


def standby(args: argparse.Namespace, *words: str) -> dict[str, Any] | None:
    """Give the server a command; return what it says of itself."""
    whole = [sys.executable, "-m", "wan_loader", "standby", *words]
    done = subprocess.run(whole, env=args.environment, cwd="/", capture_output=True, text=True, check=False)
    if words[0] in ("start", "keep") and done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout)["server"] if "--json" in words else None


def wait_until_ready(args: argparse.Namespace) -> dict[str, Any]:
    """Wait for a server that imports what it has learned."""
    for _ in range(600):
        time.sleep(0.5)  # it looks once a second
        if (found := standby(args, "status", "--json")) and "n_modules" in found:
            return found
    sys.exit("the stand-by server is not ready")


def make_vocabulary(directory: Path) -> None:
    """Have a checkpoint's tokenizer have as many pieces as umT5's, 256,300; those that it lacks are made up."""
    path = directory / "tokenizer" / "tokenizer.json"
    document = json.loads(path.read_bytes())
    vocabulary = document["model"]["vocab"]
    pieces = {piece for piece, _ in vocabulary}
    numbers = random.Random(0)
    while len(vocabulary) < _N_PIECES:
        letters = "".join(numbers.choices(string.ascii_lowercase, k=numbers.randint(2, 9)))
        if (piece := numbers.choice(["", "\N{LOWER ONE EIGHTH BLOCK}"]) + letters) not in pieces:
            pieces.add(piece)
            vocabulary.append([piece, -100.0])  # and are never taken
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False))


def take_turns(args: argparse.Namespace) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Take all samples: program -> way -> samples."""
    turns = [(program, way) for program in args.program for way in args.way if way != "kept"]
    for program, way in turns:
        sample(program, way, args)
    time.sleep(2)
    args.server = wait_until_ready(args)
    samples: dict[str, dict[str, list[dict[str, Any]]]] = {program: {} for program in args.program}
    for i in range(args.pairs):
        args.needed.append(needed(args))
        for program, way in reversed(turns) if i % 2 else turns:
            if (found := sample(program, way, args)) is not None:
                samples[program].setdefault(way, []).append(found)
                write(args, samples)
                print(f"{program}, {way}: {_seconds(found)}", file=sys.stderr, flush=True)
    for program, way in turns * args.cold:
        if (found := sample(program, way, args, cold=True)) is not None:
            samples[program].setdefault(f"{way}, cold", []).append(found)
            print(f"{program}, {way}, cold: {_seconds(found)}", file=sys.stderr, flush=True)
    if "step" in args.program and "kept" in args.way:
        standby(args, "keep", args.ckpt, "--device", args.device)
        sample("step", "kept", args)
        time.sleep(2)
        wait_until_ready(args)  # it has learned of attaching
        samples["step"]["kept"] = [found for _ in range(args.pairs) if (found := sample("step", "kept", args))]
        standby(args, "keep", "stop")
    return samples


def _seconds(found: dict[str, Any]) -> str:
    return ", ".join(f"{name} {seconds:.2f} s" for name, seconds in found["seconds"].items())


def write(args: argparse.Namespace, samples: dict[str, dict[str, list[dict[str, Any]]]]) -> None:
    """Write what there is: a benchmark that is ended keeps it."""
    if args.output is not None:
        document = describe_run() | {
            "machine": machine(),
            "server": args.server,
            "needed": args.needed,
            "samples": samples,
        }
        args.output.write_text(json.dumps(document, indent=1) + "\n")


def table(samples: dict[str, dict[str, list[dict[str, Any]]]]) -> str:
    """Write medians, with the fastest and the slowest sample."""
    ways = dict.fromkeys(way for found in samples.values() for way in found)
    lines = ["| program | until | " + " | ".join(ways) + " |", "|---|---|" + "---:|" * len(ways)]
    for program, found in samples.items():
        sums = {one["sum"] for taken in found.values() for one in taken}
        for name in next(iter(found.values()))[0]["seconds"]:
            cells = [_told([one["seconds"][name] for one in found[way]]) if way in found else "" for way in ways]
            lines.append(f"| {program}{'' if len(sums) == 1 else ' OTHER WEIGHTS'} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _told(seconds: list[float]) -> str:
    return f"{statistics.median(seconds):.2f} s ({min(seconds):.2f} .. {max(seconds):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", help="where the checkpoint is made")
    parser.add_argument("--ckpt", help="a checkpoint in the diffusers layout to take instead")
    parser.add_argument("--size", choices=["tiny", "full"], default="full")
    parser.add_argument("--blocks", type=int, default=8, help="blocks per expert, of 40")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="bf16", help="of the experts' files")
    parser.add_argument("--device", default="cuda", help="cuda or cpu (default: cuda)")
    parser.add_argument("--program", nargs="+", choices=PROGRAMS, default=PROGRAMS[:3])
    parser.add_argument("--pairs", type=int, default=5, help="samples of each (default: 5)")
    parser.add_argument("--cold", type=int, default=0, help="samples from a cold page cache, after the others")
    parser.add_argument("--way", nargs="+", choices=WAYS, default=list(WAYS), help="only these")
    parser.add_argument("--vocabulary", action="store_true", help="give the tokenizer as many pieces as umT5's has")
    parser.add_argument("--output", type=Path, help="all samples, as JSON")
    args = parser.parse_args()
    Path(args.directory).mkdir(parents=True, exist_ok=True)
    args.needed = []
    args.ckpt = os.path.abspath(args.ckpt or make_checkpoint(args))
    if args.vocabulary:
        make_vocabulary(Path(args.ckpt))
    with tempfile.TemporaryDirectory(prefix="sb-") as own:
        args.script = Path(own, "script.py")
        args.script.write_text(_SCRIPT)
        args.script.with_name("step.py").write_text(_STEP)
        args.environment = environment(Path(__file__).parents[1]) | {"XDG_RUNTIME_DIR": own, "XDG_CACHE_HOME": own}
        args.environment.pop("WAN_LOADER_STANDBY", None)
        standby(args, "start")
        try:
            samples = take_turns(args)
        finally:
            standby(args, "stop")
    print(table(samples))
    for name in args.needed[0]["seconds"]:
        print(f"{name}: {_told([one['seconds'][name] for one in args.needed])}")
    if rates := [one["bytes_per_s"] for one in args.needed if one["bytes_per_s"]]:
        nbytes, rate = (
            sum(file.stat().st_size for file in Path(args.ckpt).rglob("*.safetensors")),
            statistics.median(rates),
        )
        print(f"the link: {rate / 1e9:.1f} GB/s, {nbytes / rate:.2f} s for all files")
    print(f"the server: {args.server['n_modules']} modules in {args.server['seconds']:.1f} s")
    write(args, samples)


if __name__ == "__main__":
    main()
