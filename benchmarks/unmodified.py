"""Programs that know nothing of us, plain and under `wan-loader run`, by turns: seconds, memory, and the same weights?

    python benchmarks/unmodified.py /data --output benchmarks/results/NAME.json
    python benchmarks/unmodified.py /tmp/bench --size tiny --device cpu:0 --pairs 1

Makes a checkpoint in A14B's shapes with few blocks an expert (36 GB: text encoder and VAE whole, experts in fp32), in
the diffusers layout, unless it is there. Every sample is a fresh process, `python PROGRAM` or `wan-loader run PROGRAM`;
its clock starts after all imports and when the device is ready, and stops when the device has finished. A digest of all
weights on the device, which knows the place of every byte, must be the same in both.

    a  WanPipeline.from_pretrained(torch_dtype=bf16).to(device)
    b  the same with a VAE in fp32 passed in
    c  enable_model_cpu_offload(), up to the first step with the second expert
    d  the official order of work (official_order.py): text encoder initialised and loaded, experts cast on the CPU
    e  transformers' AutoModelForTextEncoding.from_pretrained(...).to(device)
    f  WanPipeline.from_pretrained(device_map=device)
    g  (a) in two processes under torchrun, each to a GPU of its own; only when it is asked for

Host memory is the process's own (anonymous), read by the measuring process every 20 ms. Cold means that the page cache
was emptied of the files before. With a tiny checkpoint or on the device `cpu:0`, for trying it out, the fast path is
installed for whatever is there, as `wan-loader run` serves GPUs alone, and nothing that is small.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from pipeline_start import evict, machine, make_checkpoint, resident_share, warm, watch_memory, weight_files
from turns import environment

HERE = Path(__file__).resolve().parent

#: What each program does; it leaves what it has loaded in `loaded`, modules or pipelines.
PROGRAMS = {
    "a": """
loaded = WanPipeline.from_pretrained(path, torch_dtype=torch.bfloat16).to(device)
""",
    "b": """
vae = AutoencoderKLWan.from_pretrained(path, subfolder="vae", torch_dtype=torch.float32)
loaded = WanPipeline.from_pretrained(path, vae=vae, torch_dtype=torch.bfloat16).to(device)
""",
    "c": """
loaded = WanPipeline.from_pretrained(path, torch_dtype=torch.bfloat16)
loaded.enable_model_cpu_offload(device=device)
loaded.set_progress_bar_config(disable=True)

def at_the_second(module, args, kwargs):
    raise Reached

loaded.transformer_2.blocks[0].register_forward_pre_hook(at_the_second, with_kwargs=True)
try:
    loaded("two cats boxing on a stage", width=480, height=272, num_frames=5, num_inference_steps=4,
           output_type="latent", generator=torch.Generator().manual_seed(1))
    raise SystemExit("the second expert was never asked")
except Reached:
    loaded = loaded.transformer_2
""",
    "d": """
loaded = official_order.start(path, device)
""",
    "e": """
loaded = AutoModelForTextEncoding.from_pretrained(os.path.join(path, "text_encoder"), dtype=torch.bfloat16).to(device)
""",
    "f": """
loaded = WanPipeline.from_pretrained(path, torch_dtype=torch.bfloat16, device_map=device.partition(":")[0])
""",
}

#: Programs that a launcher starts in several processes.
_N_PROCESSES = {"g": 2}
PROGRAMS["g"] = PROGRAMS["a"]

_HEAD = """
import json, os, sys, time
path, device = sys.argv[1:3]
import torch
if "LOCAL_RANK" in os.environ and device != "cpu:0":
    device = "cuda:" + os.environ["LOCAL_RANK"]
    torch.cuda.set_device(device)
{imports}

class Reached(Exception):
    pass

def finish():
    if device.startswith("cuda"):
        torch.cuda.synchronize()

torch.manual_seed(1)
torch.zeros(1, device=device)
finish()
start, start_cpu = time.perf_counter(), time.process_time()
"""

_TAIL = """
finish()
seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - start_cpu
peak = torch.cuda.max_memory_allocated() if device.startswith("cuda") else 0

def digest(tensor):
    words = tensor.detach().contiguous().flatten().view(torch.uint8)
    words = words[: words.numel() // 2 * 2].view(torch.int16)
    total = int(tensor.nbytes)
    for block in words.split(1 << 28):
        rows = block[: block.numel() // 4096 * 4096].view(-1, 4096)
        for line in (rows.sum(1, dtype=torch.int64), rows.sum(0, dtype=torch.int64), block[rows.numel():].long()):
            total += int((line * (2 * torch.arange(line.numel(), device=line.device) + 1)).sum())
    return total & (1 << 62) - 1

modules = {"": loaded} if isinstance(loaded, torch.nn.Module) else loaded
if not isinstance(modules, dict):
    modules = {n: m for n, m in loaded.components.items() if isinstance(m, torch.nn.Module)}
tensors = {f"{n}.{k}": t for n, m in modules.items() for k, t in m.state_dict().items()}
kinds = {f"{type(t).__name__} {t.dtype} {t.device.type}" for m in modules.values() for t in m.parameters()}
print(json.dumps({"seconds": seconds, "cpu_seconds": cpu_seconds, "device_peak_bytes": peak, "kinds": sorted(kinds),
                  "nbytes": sum(t.nbytes for t in tensors.values()),
                  "digests": {k: digest(t) for k, t in tensors.items()}}))
"""
_IMPORTS = {
    "d": "import official_order\nofficial_order.import_all()",
    "e": "from transformers import AutoModelForTextEncoding, UMT5EncoderModel",
}
_DIFFUSERS = "from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel\n"
_DIFFUSERS += "from transformers import AutoTokenizer, UMT5EncoderModel"

#: `wan-loader run` for a device that it does not serve, and for what is small.
_TRYING = """
import runpy, sys
from wan_loader.fastpath import Accelerator
script, *sys.argv[1:] = sys.argv[1:]
with Accelerator(kinds=(sys.argv[2].partition(":")[0],), min_nbytes=0) as accelerator:
    runpy.run_path(script, run_name="__main__")
print("wan-loader:", accelerator.tally.summary(), file=sys.stderr)
"""


def write_programs(directory: Path) -> dict[str, Path]:
    """Write each program as a script of its own."""
    scripts = {}
    for name, body in PROGRAMS.items():
        scripts[name] = directory / f"program_{name}.py"
        scripts[name].write_text(_HEAD.format(imports=_IMPORTS.get(name, _DIFFUSERS)) + body + _TAIL)
    return scripts


def run_sample(script: Path, way: str, args: argparse.Namespace) -> dict:
    """Run a program once, plain or ours, in a fresh process."""
    words = [str(script), args.ckpt, args.device]
    if n_processes := _N_PROCESSES.get(script.stem[-1]):
        words = ["-m", "torch.distributed.run", "--nproc_per_node", str(n_processes), *words]
        if way == "ours":
            words = ["-m", "wan_loader", "run", "--", sys.executable, *words]
    elif way == "ours" and (args.size == "tiny" or args.device.startswith("cpu")):
        words = ["-c", _TRYING, *words]
    elif way == "ours":
        words = ["-m", "wan_loader", "run", *words]
    env = environment(HERE.parent)
    env["PYTHONPATH"] = f"{HERE}{os.pathsep}{env['PYTHONPATH']}"
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen([sys.executable, *words], env=env, cwd="/", stdout=out, stderr=errors)
        peaks = watch_memory(process)
        for stream in (out, errors):
            stream.seek(0)
        said = errors.read().strip().splitlines()
        if process.returncode:
            return {"error": said[-5:]}
        each = [json.loads(line) for line in out.read().splitlines() if line.startswith("{")]
    # of several processes, the slowest; their weights are the same
    found = max(each, key=lambda one: one["seconds"])
    if any(one["digests"] != found["digests"] for one in each):
        return {"error": ["the processes have different weights"]}
    return found | peaks | {"said": [line for line in said if line.startswith("wan-loader")]}


def take_turns(name: str, cache: str, n_plain: int, n_ours: int, args: argparse.Namespace) -> list[dict]:
    """Take the samples of a program, plain and ours by turns, and drop the digests once they are compared."""
    samples, expected = [], None
    for i in range(max(n_plain, n_ours)):
        ways = [way for way, n in (("plain", n_plain), ("ours", n_ours)) if i < n]
        for way in ways if i % 2 == 0 else reversed(ways):
            {"cold": evict, "warm": warm}[cache](args.ckpt)
            head = {"program": name, "cache": cache, "way": way, "resident_before": resident_share(args.ckpt)}
            found = run_sample(args.scripts[name], way, args)
            if digests := found.pop("digests", None):
                expected = expected or digests
                found["equal"] = digests == expected
            samples.append(head | found)
            print(told(samples[-1]), file=sys.stderr, flush=True)
    return samples


def told(sample: dict) -> str:
    """Write a line for a sample."""
    head = f"{sample['program']} {sample['cache']:4} {sample['way']:5}"
    if "error" in sample:
        return f"{head} {' | '.join(sample['error'])}"
    memory = f"device {sample['device_peak_bytes'] / 1e9:.2f} GB, host {sample['host_anonymous_peak_bytes'] / 1e9:.2f}"
    equal = "" if sample["equal"] else "  OTHER WEIGHTS"
    return f"{head} {sample['seconds']:7.2f} s {sample['cpu_seconds']:7.2f} CPU-s  {memory} GB{equal} {sample['said']}"


def table(samples: list[dict]) -> str:
    """Write the table of medians: plain, ours, and how many times faster, with what the peaks of memory differ by."""
    lines = [
        "| program | cache | plain | ours | times | GPU peak more | host more |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for name, cache in dict.fromkeys((s["program"], s["cache"]) for s in samples):
        good = [s for s in samples if (s["program"], s["cache"]) == (name, cache) and "error" not in s]
        ways = {way: [s for s in good if s["way"] == way] for way in ("plain", "ours")}
        if not all(ways.values()):
            continue
        plain, ours = (statistics.median(s["seconds"] for s in ways[way]) for way in ("plain", "ours"))
        more = [
            max(s[key] for s in ways["ours"]) - max(s[key] for s in ways["plain"])
            for key in ("device_peak_bytes", "host_anonymous_peak_bytes")
        ]
        wrong = "" if all(s["equal"] for s in good) else " OTHER WEIGHTS"
        cells = [name, cache, f"{plain:.2f} s", f"{ours:.2f} s", f"{plain / ours:.1f}{wrong}"]
        lines.append("| " + " | ".join([*cells, *(f"{nbytes / 1e6:.0f} MB" for nbytes in more)]) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", help="where the checkpoint is made")
    parser.add_argument("--ckpt", help="a checkpoint in the diffusers layout to take instead")
    parser.add_argument("--size", choices=["tiny", "full"], default="full")
    parser.add_argument("--blocks", type=int, default=8, help="blocks per expert, of 40")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument(
        "--program", nargs="+", choices=PROGRAMS, default=[name for name in PROGRAMS if name not in _N_PROCESSES]
    )
    parser.add_argument("--cache", choices=["warm", "cold"], default="warm")
    parser.add_argument("--pairs", type=int, default=3, help="samples of each, plain and ours (default: 3)")
    parser.add_argument("--plain", type=int, help="samples of plain, if they are others")
    parser.add_argument("--output", type=Path, help="all samples, as JSON; added to what is there")
    args = parser.parse_args()
    args.dtype = "fp32"
    Path(args.directory).mkdir(parents=True, exist_ok=True)
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    args.ckpt = args.ckpt or make_checkpoint(args)
    if "d" in args.program:
        from official_order import make_files

        make_files(args.ckpt)
    nbytes = sum(os.path.getsize(file) for file in weight_files(args.ckpt))
    document: dict = {"machine": machine(), "checkpoint": {"nbytes": nbytes, "blocks": args.blocks}}
    document |= {"commands": [], "samples": []}
    if args.output and args.output.exists():
        document = json.loads(args.output.read_text())
    document["commands"].append(" ".join([Path(sys.argv[0]).name, *sys.argv[1:]]))
    with tempfile.TemporaryDirectory() as scripts:
        args.scripts = write_programs(Path(scripts))
        for name in args.program:
            n_plain = args.pairs if args.plain is None else args.plain
            document["samples"] += take_turns(name, args.cache, n_plain, args.pairs, args)
            if args.output:  # after each: a benchmark that is ended keeps what it has
                args.output.write_text(json.dumps(document, indent=1) + "\n")
    print(table(document["samples"]))


if __name__ == "__main__":
    main()
