"""The whole pipeline within a limit of device memory, beside presets that have all they want: one table.

    python benchmarks/vram_limit.py /data --blocks 40 --samples fastest balanced 12GB 12GB:24GB --output limit.json
    python benchmarks/vram_limit.py /tmp/limit --size tiny --device cpu --samples fastest 22.2MB

Makes an A14B-shaped checkpoint of random weights with N blocks an expert, in bf16, unless it is there. A sample is a
preset, a limit (12GB: `--vram_limit`), or two (12GB:24GB: `--ram_limit` as well), in a fresh process that makes one
video; `NAME@cold` has no page of the files in the page cache when it begins. Before the first, all libraries are
imported once.

    first step   seconds from the start of the process until the high-noise expert could run
    step         median of the denoising steps, each until the device is done; `switch` is the longest of them
    driver       the peak of what the driver counts on the device, beyond what was there before the process was:
                 context, libraries and the allocator's memory; polled by the measuring process every 2 ms. Nobody else
                 may use the device meanwhile.
    beside       what of that peak is not the allocator's, if both peaks were at the same time
    host         the peak of the process's own (anonymous) memory
    equal        True if the latents are those of the first sample, bit for bit
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import threading
from itertools import pairwise
from pathlib import Path
from typing import Any

from turns import run_fresh

_SAMPLE = """
import hashlib, json, sys, threading
path, device, size, frames, steps, options = sys.argv[1:]
size, anonymous, ended = tuple(map(int, size.split("*"))), [0], threading.Event()

def watch():
    while not ended.wait(0.05):
        kilobytes = open("/proc/self/status").read().partition("RssAnon:")[2].split()[0]
        anonymous[0] = max(anonymous[0], int(kilobytes) * 1024)

threading.Thread(target=watch, daemon=True).start()
from wan_pipeline import WanT2V

settings = {"size": size, "frame_num": int(frames)}
with WanT2V.from_checkpoint(path, device=device, **settings, **json.loads(options)) as pipe:
    import torch
    decode, digests = pipe._decode, []

    def noted(latents, tell):
        bits = latents.cpu().contiguous().view(torch.uint8).numpy().tobytes()
        digests.append(hashlib.sha256(bits).hexdigest())
        return decode(latents, tell)

    def settle(phase, done, total):
        if device.startswith("cuda"):
            torch.cuda.synchronize()

    pipe._decode = noted
    video = pipe("two cats boxing on a stage", steps=int(steps), seed=1, progress=settle, **settings)
    report = pipe.report()
ended.set()
finite = bool((video.frames_THWC >= 0).all())
print(json.dumps({
    "latents": digests[0], "finite": finite, "pipeline": report["pipeline"], "memory": report["memory"],
    "settings": report["settings"], "host_anonymous_bytes": anonymous[0], "seconds": report["seconds"],
    "torch": torch.__version__, "device": torch.cuda.get_device_name() if device.startswith("cuda") else "cpu",
}))
"""


class DriverWatch:
    """The peak of what the driver counts on a device, beyond what was there before."""

    def __init__(self, device: str) -> None:
        self.peak: int | None = None
        self._device = device
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _used(self) -> int:
        import torch

        free, total = torch.cuda.mem_get_info(self._device)
        return int(total - free)

    def _run(self) -> None:
        while not self._stop.wait(0.002):
            self.peak = max(self.peak or 0, self._used() - self._before)

    def __enter__(self) -> DriverWatch:
        if self._device.startswith("cuda"):
            self._before = self._used()
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join()


def options_of(name: str) -> dict[str, str]:
    """Return the arguments of `from_checkpoint` that a sample's name stands for."""
    if not re.match(r"\d", name):
        return {"preset": name}
    device, _, host = name.partition(":")
    return {"device_memory": device} | ({"host_memory": host} if host else {})


def make(args: argparse.Namespace) -> Path:
    """Make the checkpoint unless it is there."""
    path: Path = args.directory / f"limit-{args.size}-{args.blocks or 'all'}"
    if not (path / "model_index.json").exists():
        words = ["--layout", "diffusers", "--size", args.size, "--dtype", "bf16"]
        words += ["--blocks", str(args.blocks)] if args.blocks else []
        subprocess.run(
            [sys.executable, "-m", "wan_pipeline", "synth", str(path), *words], check=True, stdout=subprocess.DEVNULL
        )
    return path


def into_cache(path: Path, *, cold: bool) -> None:
    """Have all pages of the files in the page cache, or none."""
    from wan_loader.warming.evict import evict
    from wan_loader.warming.prewarm import prewarm_files

    files = [str(file) for file in sorted(path.rglob("*.safetensors"))]
    if cold:
        evict(files)
    else:
        prewarm_files(files, threads=8).wait()


def take(path: Path, name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Take one sample."""
    way, _, state = name.partition("@")
    into_cache(path, cold=state == "cold")
    words = [str(path), args.device, args.video_size, str(args.frames), str(args.steps), json.dumps(options_of(way))]
    with DriverWatch(args.device) as watch:
        found = run_fresh(_SAMPLE, words, name)
    return {"name": name, "driver_peak_bytes": watch.peak, **found}


def table(samples: list[dict[str, Any]]) -> str:
    """Write one line a sample."""
    lines = [
        f"{'sample':<16} {'preset':<11} {'first step':>10} {'step':>8} {'switch':>8} {'driver':>8} {'beside':>8} "
        f"{'allocator':>9} {'host':>7}  equal"
    ]
    for one in samples:
        steps = one["pipeline"]["steps_s"]
        seconds = [b - a for a, b in pairwise(steps)] or [steps[0] - one["pipeline"]["time_to_first_step_s"]]
        reserved, driver = one["memory"]["device_reserved_peak_bytes"], one["driver_peak_bytes"]
        beside = "" if driver is None else f"{(driver - reserved) / 1e9:.2f} GB"
        lines.append(
            f"{one['name']:<16} {one['settings']['preset']:<11} {one['pipeline']['time_to_first_step_s']:>8.2f} s "
            f"{statistics.median(seconds):>6.2f} s {max(seconds):>6.2f} s {(driver or 0) / 1e9:>5.1f} GB {beside:>8} "
            f"{reserved / 1e9:>6.1f} GB {one['host_anonymous_bytes'] / 1e9:>4.1f} GB  {one['equal']}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="where the checkpoint is, or is made")
    parser.add_argument("--ckpt", type=Path, help="a checkpoint to take instead of making one")
    parser.add_argument("--samples", nargs="+", default=["fastest", "balanced", "24GB", "12GB", "12GB:24GB"])
    parser.add_argument("--size", choices=("full", "tiny"), default="full")
    parser.add_argument("--blocks", type=int, help="blocks an expert (default: all 40)")
    parser.add_argument("--video-size", default="832*480")
    parser.add_argument("--frames", type=int, default=33)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--output", type=Path, help="all samples, as JSON")
    args = parser.parse_args()
    from wan_loader.system import machine_card

    args.directory.mkdir(parents=True, exist_ok=True)
    path = args.ckpt or make(args)
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    subprocess.run([sys.executable, "-c", "import wan_pipeline.pipeline, diffusers, transformers"], check=True)
    samples: list[dict[str, Any]] = []
    for name in args.samples:
        one = take(path, name, args)
        one["equal"] = one["finite"] and one["latents"] == (samples or [one])[0]["latents"]
        samples.append(one)
        print(f"{name}: {one['settings']['preset_reason']}", flush=True)
        if args.output is not None:  # after each: a benchmark that is ended keeps what it has
            document = {"command": " ".join(sys.argv), "machine": dict(machine_card()), "samples": samples}
            args.output.write_text(json.dumps(document, indent=1) + "\n")
    print(table(samples))
    if not all(one["equal"] for one in samples):
        sys.exit("latents differ, or frames are not finite")


if __name__ == "__main__":
    main()
