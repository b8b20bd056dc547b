"""One expert whose blocks are streamed, beside the same one resident: step time, peak on the device, equal latents.

    python benchmarks/stream_blocks.py /data --frames 17 33 81 --output stream.json

Makes an expert in bf16 in the directory unless one is there (`--blocks 40`: 28.6 GB). Every case is a fresh process
that loads the expert, runs one forward that does not count, and then `--steps` forwards, each timed until the device is
done; the latents of the last are compared bit for bit. The page cache is warm from the resident load, which comes
first. CPU-seconds are those of the whole process during the timed forwards.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from turns import run_fresh

_SAMPLE = """
import hashlib, json, os, resource, sys, time
path, device, frames, way, steps, options = sys.argv[1:]
import torch
from diffusers import WanTransformer3DModel
import wan_loader

config, cuda = json.load(open(path + "/config.json")), device == "cuda"
tiny = config["num_layers"] * config["ffn_dim"] < 10_000
height, width = (8, 8) if tiny else (60, 104)

def settle():
    if cuda:
        torch.cuda.synchronize()

def cpu():
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime

with wan_loader.empty_weights():
    model = WanTransformer3DModel.from_config(config).eval()
begun = time.perf_counter()
report = None
if way == "resident":
    wan_loader.load_into(model, path, device=device, dtype="bf16")
else:
    streamed = wan_loader.stream_blocks(model, path, device=device, dtype="bf16", **json.loads(options))
settle()
start_s = time.perf_counter() - begun
rng = torch.Generator().manual_seed(0)
latents = torch.randn(1, config["in_channels"], (int(frames) + 3) // 4, height, width, generator=rng)
text = torch.randn(1, 16 if tiny else 512, config["text_dim"], generator=rng)
inputs = dict(
    hidden_states=latents.to(device, torch.bfloat16),
    encoder_hidden_states=text.to(device, torch.bfloat16),
    timestep=torch.tensor([500], device=device),
    return_dict=False,
)
seconds = []
with torch.no_grad():
    model(**inputs)
    settle()
    before = cpu()
    for _ in range(int(steps)):
        begun = time.perf_counter()
        out = model(**inputs)[0]
        settle()
        seconds.append(time.perf_counter() - begun)
    cpu_s = (cpu() - before) / int(steps)
digest = hashlib.sha256(out.cpu().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
print(json.dumps({
    "start_s": start_s, "seconds": seconds, "cpu_s": cpu_s, "latents": digest, "finite": bool(out.isfinite().all()),
    "peak_bytes": torch.cuda.max_memory_allocated() if cuda else None,
    "device": torch.cuda.get_device_name() if cuda else "cpu",
    "report": str(streamed.report) if way == "streamed" else None,
}))
"""


def make(directory: Path, size: str, blocks: int) -> Path:
    """Make the expert unless it is there; return its directory."""
    path = directory / f"stream-{size}-{blocks}"
    if not path.exists():
        words = ["--layout", "diffusers", "--size", size, "--component", "high_noise", "--dtype", "bf16"]
        command = [sys.executable, "-m", "wan_pipeline", "synth", str(path), *words, "--blocks", str(blocks)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return path / "transformer"


def compare(path: Path, frames: int, args: argparse.Namespace) -> dict[str, Any]:
    """Measure both ways for one length of a video."""
    options = {"buffers": args.buffers, "device_memory": args.device_memory, "pinned_memory": args.pinned_memory}
    options |= {"host_memory": args.host_memory, "io": args.io}
    found = {
        way: run_fresh(_SAMPLE, [str(path), args.device, str(frames), way, str(args.steps), json.dumps(options)], way)
        for way in ("resident", "streamed")
    }
    resident, streamed = found["resident"], found["streamed"]
    times = {way: statistics.median(one["seconds"]) for way, one in found.items()}
    equal = resident["latents"] == streamed["latents"] and resident["finite"]
    peaks = " and ".join(f"{(one['peak_bytes'] or 0) / 1e9:.2f} GB" for one in found.values())
    print(
        f"{frames} frames: resident {times['resident'] * 1e3:.1f} ms, streamed {times['streamed'] * 1e3:.1f} ms, "
        f"ratio {times['streamed'] / times['resident']:.3f}, peaks {peaks}, equal {equal}",
        flush=True,
    )
    return {"frames": frames, "options": options, "equal": equal, **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="where the expert is, or is made")
    parser.add_argument("--frames", type=int, nargs="+", default=[17, 33, 81])
    parser.add_argument("--steps", type=int, default=5, help="forwards that count (default: 5)")
    parser.add_argument("--blocks", type=int, default=40)
    parser.add_argument("--buffers", type=int, default=3)
    parser.add_argument("--device-memory", help="such as 12GB; default: no block stays on the device")
    parser.add_argument("--pinned-memory", help="such as 20GB; default: half of the memory")
    parser.add_argument("--host-memory", help="such as 24GB; what is beyond is read from the disk each time")
    parser.add_argument("--io", default="auto", help="direct reads from the disk each time")
    parser.add_argument("--device", default="cuda", help="cuda or cpu (default: cuda)")
    parser.add_argument("--size", choices=("full", "tiny"), default="full")
    parser.add_argument("--output", type=Path, help="all samples, as JSON")
    args = parser.parse_args()
    path = make(args.directory, args.size, args.blocks)
    found = [compare(path, frames, args) for frames in args.frames]
    if args.output is not None:
        document = {"command": " ".join(sys.argv), "machine": platform.platform(), "cores": os.cpu_count()}
        args.output.write_text(json.dumps(document | {"samples": found}, indent=1) + "\n")
    if not all(one["equal"] for one in found):
        sys.exit("latents differ, or are not finite")


if __name__ == "__main__":
    main()
