"""Streamed blocks beside what diffusers and accelerate offer for models that are larger than the device.

    python benchmarks/stream_offload.py /data --frames 17 81 --host-memory 10GB --output offload.json

Makes an expert in bf16 in the directory unless one is there, as `stream_blocks.py` does. Each way is a fresh process
that has imported everything and made the CUDA context before its clock starts:

    resident            all on the device, by load_into: the latents that the others must have
    streamed            stream_blocks
    streamed from disk  the same with --host-memory, whose value is the page cache that may be relied upon: the file is
                        pushed out of the page cache first
    group, by block     from_pretrained, enable_group_offload(offload_type="block_level", num_blocks_per_group=1)
    group, by leaf      the same with "leaf_level"; both with use_stream=True on a GPU
    group, lean         by leaf with low_cpu_mem_usage=True, which pins what it copies each time
    sequential          from_pretrained, accelerate.cpu_offload: what enable_sequential_cpu_offload does to each network

"start" ends before the first forward, "first" is that forward (group offloading learns the order of its layers in it),
"step" the median of those that follow. "CPU" is the processor time of the whole process a step. "anon" is the host
memory that is the process's own (RssAnon and RssShmem, the most that was seen after the start and after the steps),
"pinned" what torch's allocator of pinned memory has taken, which may be counted in "anon" or in no process. The page
cache is in neither. "GPU" is the peak of torch's allocator.
All load the same dtypes: bf16, and float32 where the model's class asks for it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from stream_blocks import make
from turns import describe_run, run_fresh

_SAMPLE = """
import hashlib, json, os, re, resource, sys, time
path, device, frames, way, steps, options = sys.argv[1:]
import torch
from diffusers import WanTransformer3DModel
import wan_loader
wan_loader.stream_blocks, wan_loader.load_into  # imported on first use

config, cuda = json.load(open(path + "/config.json")), device == "cuda"
tiny = config["num_layers"] * config["ffn_dim"] < 10_000
height, width = (8, 8) if tiny else (60, 104)
if cuda:
    torch.zeros(1, device="cuda")

if way == "sequential":
    import accelerate

def settle():
    if cuda:
        torch.cuda.synchronize()

def cpu():
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime

seen = []
def look():
    text = open("/proc/self/status").read()
    held = {name: int(kb) * 1024 for name, kb in re.findall(r"Rss(Anon|Shmem):\\s+(\\d+) kB", text)}
    stats = getattr(torch.cuda, "host_memory_stats", dict)() if cuda else {}
    seen.append((held.get("Anon", 0) + held.get("Shmem", 0), stats.get("allocated_bytes.current", 0)))

def empty():
    with wan_loader.empty_weights():
        return WanTransformer3DModel.from_config(config).eval()

begun = time.perf_counter()
report = None
same = dict(device=device, dtype="bf16", keep_fp32=WanTransformer3DModel._keep_in_fp32_modules or ())
if way == "resident":
    model = empty()
    wan_loader.load_into(model, path, **same)
elif way.startswith("streamed"):
    model = empty()
    streamed = wan_loader.stream_blocks(model, path, **same, **json.loads(options))
    report = str(streamed.report)
else:
    model = WanTransformer3DModel.from_pretrained(path, torch_dtype=torch.bfloat16).eval()
    if way == "sequential":
        accelerate.cpu_offload(model, device)
    else:
        kinds = {"group, by block": {"offload_type": "block_level", "num_blocks_per_group": 1}}
        kind = kinds.get(way, {"offload_type": "leaf_level"})
        if cuda:
            kind |= {"use_stream": True, "low_cpu_mem_usage": way == "group, lean"}
        model.enable_group_offload(torch.device(device), **kind)
settle()
start_s = time.perf_counter() - begun
look()
rng = torch.Generator().manual_seed(0)
latents = torch.randn(1, config["in_channels"], (int(frames) + 3) // 4, height, width, generator=rng)
text = torch.randn(1, 16 if tiny else 512, config["text_dim"], generator=rng)
inputs = dict(
    hidden_states=latents.to(device, torch.bfloat16),
    encoder_hidden_states=text.to(device, torch.bfloat16),
    timestep=torch.tensor([500], device=device),
    return_dict=False,
)

def forward():
    begun = time.perf_counter()
    out = model(**inputs)[0]
    settle()
    return time.perf_counter() - begun, out

with torch.no_grad():
    first_s, out = forward()
    look()
    before, seconds = cpu(), []
    for _ in range(int(steps)):
        taken, out = forward()
        seconds.append(taken)
    cpu_s = (cpu() - before) / int(steps)
    look()
digest = hashlib.sha256(out.cpu().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
print(json.dumps({
    "start_s": start_s, "first_s": first_s, "seconds": seconds, "cpu_s": cpu_s, "latents": digest,
    "finite": bool(out.isfinite().all()), "anon_bytes": max(anon for anon, _ in seen),
    "pinned_bytes": max(pinned for _, pinned in seen),
    "peak_bytes": torch.cuda.max_memory_allocated() if cuda else 0,
    "device": torch.cuda.get_device_name() if cuda else "cpu", "report": report,
}))
"""

WAYS = (
    "resident",
    "streamed",
    "streamed from disk",
    "group, by block",
    "group, by leaf",
    "group, lean",
    "sequential",
)
_COLUMNS = {"start s": 9, "first s": 9, "step ms": 10, "CPU s": 8, "anon GB": 9, "pinned GB": 11, "GPU GB": 8}
_HEADER = " " * 20 + "".join(f"{name:>{width}s}" for name, width in _COLUMNS.items())


def sample(path: Path, frames: int, way: str, args: argparse.Namespace) -> dict[str, Any]:
    """Measure one way in a fresh process; one that fails has an error in the place of figures."""
    options = {"buffers": args.buffers, "device_memory": args.device_memory, "pinned_memory": args.pinned_memory}
    if way == "streamed from disk":
        subprocess.run([sys.executable, "-m", "wan_loader", "evict", str(path)], check=True, stdout=subprocess.DEVNULL)
        options["host_memory"] = args.host_memory
    try:
        return run_fresh(_SAMPLE, [str(path), args.device, str(frames), way, str(args.steps), json.dumps(options)], way)
    except SystemExit as error:
        return {"error": str(error)[-2000:]}


def told(way: str, found: dict[str, Any], wanted: str | None) -> str:
    """Write a line of the table."""
    if "error" in found:
        return f"{way:20s}  failed: {found['error'].strip().splitlines()[-1]:.90s}"
    step = statistics.median(found["seconds"]) * 1e3
    memory = f"{found['anon_bytes'] / 1e9:9.2f}{found['pinned_bytes'] / 1e9:11.2f}{found['peak_bytes'] / 1e9:8.2f}"
    equal = "" if found["latents"] == wanted else "  OTHER LATENTS"
    return f"{way:20s}{found['start_s']:9.2f}{found['first_s']:9.2f}{step:10.1f}{found['cpu_s']:8.2f}{memory}{equal}"


def compare(path: Path, frames: int, ways: list[str], args: argparse.Namespace) -> dict[str, Any]:
    """Measure all ways for one length of a video."""
    print(f"\n{frames} frames\n{_HEADER}")
    found: dict[str, Any] = {}
    for way in ways:
        found[way] = sample(path, frames, way, args)
        print(told(way, found[way], found["resident"].get("latents")), flush=True)
    return {"frames": frames, "host_memory": args.host_memory, "ways": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="where the expert is, or is made")
    parser.add_argument("--frames", type=int, nargs="+", default=[17, 81])
    parser.add_argument("--steps", type=int, default=3, help="forwards that count (default: 3)")
    parser.add_argument("--blocks", type=int, default=40)
    parser.add_argument("--buffers", type=int, default=3)
    parser.add_argument("--device-memory", help="such as 12GB; default: no block stays on the device")
    parser.add_argument("--pinned-memory", help="such as 20GB; default: half of the memory")
    parser.add_argument("--host-memory", help="such as 10GB: measure streaming from the disk, too")
    parser.add_argument("--way", action="append", choices=WAYS[1:], help="only this one (again: more)")
    parser.add_argument("--device", default="cuda", help="cuda or cpu (default: cuda)")
    parser.add_argument("--size", choices=("full", "tiny"), default="full")
    parser.add_argument("--output", type=Path, help="all samples, as JSON")
    args = parser.parse_args()
    path = make(args.directory, args.size, args.blocks)
    others = args.way or [way for way in WAYS[1:] if way != "streamed from disk" or args.host_memory]
    found = [compare(path, frames, ["resident", *others], args) for frames in args.frames]
    if args.output is not None:
        args.output.write_text(json.dumps(describe_run() | {"samples": found}, indent=1) + "\n")
    ours = [(one["ways"]["resident"], s) for one in found for way, s in one["ways"].items() if way in WAYS[:3]]
    if not all(s.get("latents") == resident.get("latents") and s.get("finite") for resident, s in ours):
        sys.exit("latents differ, or are not finite")


if __name__ == "__main__":
    main()
