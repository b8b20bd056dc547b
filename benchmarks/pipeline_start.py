"""From the start of a process to its first denoising step: ours, diffusers, and the official order of work.

    python benchmarks/pipeline_start.py /data/bench --blocks 10 --output benchmarks/results/NAME.json
    python benchmarks/pipeline_start.py /tmp/bench --size tiny --device cpu

Makes an A14B-shaped checkpoint of random weights with N blocks per expert (diffusers layout: all three can read it)
unless it is there. Every sample is a fresh process; its clock starts just before the process does and stops when the
device has finished everything before the first call of the high-noise expert. Latents are small, the prompt is real.

    ours:PRESET   WanT2V.from_checkpoint(preset=PRESET)
    diffusers     WanPipeline.from_pretrained(dtype=bf16).to(device)
    official      one after the other: text encoder initialised at random on the CPU and then loaded, VAE, low-noise and
                  high-noise expert in fp32, cast on the CPU, pageable copies

Warm means every page resident, cold none; the share found before the start stands in the sample. `run:PRESET` makes a
whole video of few steps and gives the peaks of memory and the stall at the switch of experts.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

MiB = 1 << 20
PROMPT = "two cats boxing on a stage"


class FirstStepError(Exception):
    """Ends a sample when the first denoising step would begin."""


# --- the measured processes


def sync(device):
    import torch

    if device.startswith("cuda"):
        torch.cuda.synchronize()


def elapsed_s():
    return (time.monotonic_ns() - int(os.environ["BENCH_START_NS"])) / 1e9


def stop_at_first_step(pipe, device, found):
    def hook(module, args, kwargs):
        sync(device)
        found["first_step_s"] = elapsed_s()
        raise FirstStepError

    pipe.transformer.register_forward_pre_hook(hook, with_kwargs=True)


def call(pipe, size, frames):
    """One call of a plain diffusers pipeline."""
    pipe.set_progress_bar_config(disable=True)
    pipe(PROMPT, width=size[0], height=size[1], num_frames=frames, num_inference_steps=4, output_type="latent")


def start_ours(args, preset):
    from wan_pipeline import WanT2V

    found = {}
    with WanT2V.from_checkpoint(
        args.ckpt, preset=preset, device=args.device, size=args.wh, frame_num=args.frames
    ) as pipe:
        found["imports_s"] = elapsed_s()
        stop_at_first_step(pipe.pipe, args.device, found)
        try:
            pipe(PROMPT, size=args.wh, frame_num=args.frames, steps=4)
        except FirstStepError:
            pipe.wait()
        report = pipe.report()
    loads = report["pipeline"]["loads"]
    found["all_loaded_s"] = max(x["start_s"] + x["seconds"] for x in loads)
    found["load_s"] = sum(x["seconds"] for x in loads)
    found["nbytes"] = sum(x["nbytes"] for x in loads)
    return found | {"loads": loads, "memory": report["memory"]}


def start_diffusers(args):
    import torch
    from diffusers import WanPipeline

    found = {"imports_s": elapsed_s()}
    dtype = torch.bfloat16
    pipe = WanPipeline.from_pretrained(args.ckpt, torch_dtype=dtype).to(args.device)
    sync(args.device)
    return finish(args, pipe, found)


def start_official(args):
    import torch
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
    from transformers import AutoTokenizer, UMT5Config, UMT5EncoderModel

    found = {"imports_s": elapsed_s()}
    root = Path(args.ckpt)
    for _ in range(2):  # modules initialise themselves, then the encoder initialises them again
        text = UMT5EncoderModel(UMT5Config.from_pretrained(root / "text_encoder"))
    text = text.to(torch.bfloat16)
    text.load_state_dict(read_all(root / "text_encoder"), strict=False)
    text.to(args.device)
    vae = AutoencoderKLWan.from_pretrained(root / "vae").to(args.device)
    low = WanTransformer3DModel.from_pretrained(root / "transformer_2").to(torch.bfloat16).to(args.device)
    high = WanTransformer3DModel.from_pretrained(root / "transformer").to(torch.bfloat16).to(args.device)
    sync(args.device)
    pipe = WanPipeline(
        tokenizer=AutoTokenizer.from_pretrained(root / "tokenizer"),
        text_encoder=text.eval(),
        vae=vae,
        scheduler=UniPCMultistepScheduler.from_pretrained(root / "scheduler"),
        transformer=high,
        transformer_2=low,
        boundary_ratio=0.875,
    )
    return finish(args, pipe, found)


def read_all(directory):
    from safetensors.torch import load_file

    return {
        name: tensor for file in sorted(directory.glob("*.safetensors")) for name, tensor in load_file(file).items()
    }


def finish(args, pipe, found):
    from wan_loader.machine import peak_resident

    found["all_loaded_s"] = elapsed_s()
    found["load_s"] = found["all_loaded_s"] - found["imports_s"]
    stop_at_first_step(pipe, args.device, found)
    with contextlib.suppress(FirstStepError):
        call(pipe, args.wh, args.frames)
    return found | {"memory": {"host_peak_bytes": peak_resident()}}


def run_ours(args, preset):
    """A whole video; steps are timed with the device synchronised after each."""
    from wan_pipeline import WanT2V

    with WanT2V.from_checkpoint(
        args.ckpt, preset=preset, device=args.device, size=args.wh, frame_num=args.frames
    ) as pipe:
        pipe(
            PROMPT,
            size=args.wh,
            frame_num=args.frames,
            steps=args.steps,
            progress=lambda phase, done, total: sync(args.device),
        )
        report = pipe.report()
    steps = report["pipeline"]["steps_s"]
    step_s = statistics.median(b - a for a, b in itertools.pairwise(steps))
    waits = {x["name"]: x["seconds"] for x in report["pipeline"]["waits"]}
    stall_s = waits["transformer_2"]
    return {
        "step_s": step_s,
        "switch_stall_s": stall_s,
        "switch_stall_of_a_step": stall_s / step_s,
        "waits_s": waits,
        "preset_reason": report["settings"]["preset_reason"],
        "memory": report["memory"],
    }


def child(args):
    kind, _, preset = args.child.partition(":")
    if kind == "ours":
        found = start_ours(args, preset)
    elif kind == "run":
        found = run_ours(args, preset)
    else:
        found = {"diffusers": start_diffusers, "official": start_official}[kind](args)
    if args.device.startswith("cuda"):
        import torch

        peak = max(found["memory"].get("device_peak_bytes", 0), torch.cuda.max_memory_allocated())
        found["memory"]["device_peak_bytes"] = peak
    Path(args.result).write_text(json.dumps(found))


# --- the measuring process


def weight_files(directory):
    return sorted(str(p) for p in Path(directory).rglob("*.safetensors"))


def resident_share(directory):
    from wan_loader.linux import cached_bytes

    cached = total = 0
    for name in weight_files(directory):
        fd = os.open(name, os.O_RDONLY)
        size = os.fstat(fd).st_size
        cached, total = cached + cached_bytes(fd, 0, size), total + size
        os.close(fd)
    return cached / total


def evict(directory):
    for name in weight_files(directory):
        fd = os.open(name, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def warm(directory):
    from wan_loader.source.prewarm import prewarm_files

    prewarm_files(weight_files(directory), threads=8).wait()


def sample(args, name, cache):
    """One fresh process."""
    {"cold": evict, "warm": warm}[cache](args.ckpt)
    share = resident_share(args.ckpt)
    result = Path(args.directory) / "sample.json"
    result.unlink(missing_ok=True)
    command = [sys.executable, __file__, args.directory, "--child", name, "--ckpt", args.ckpt, "--device", args.device]
    command += ["--result", str(result), "--video-size", args.video_size, "--frames", str(args.frames)]
    command += ["--steps", str(args.steps)]
    env = os.environ | {"BENCH_START_NS": str(time.monotonic_ns())}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    head = {"name": name, "cache": cache, "resident_before": share}
    if done.returncode != 0 or not result.exists():
        return head | {"error": done.stderr.strip().splitlines()[-3:]}
    return head | json.loads(result.read_text())


def make_checkpoint(args):
    from wan_pipeline.synth import synth

    blocks = args.blocks if args.size == "full" else None
    target = Path(args.directory) / f"{args.size}-{blocks or 'all'}-{args.dtype}"
    if not (target / "model_index.json").exists():
        print(f"making {target}", file=sys.stderr)
        synth(target, layout="diffusers", size=args.size, blocks=blocks, dtype=args.dtype)
    return str(target)


def table(samples):
    lines = [
        f"{'sample':<18} {'cache':<5} {'first step':>11} {'imports':>9} {'loading':>9} {'device peak':>12} {'host':>7}"
    ]
    for s in samples:
        if "error" in s:
            lines.append(f"{s['name']:<18} {s['cache']:<5} {s['error']}")
        elif "step_s" in s:
            stall = f"switch stall {s['switch_stall_s'] * 1e3:.2f} ms ({s['switch_stall_of_a_step']:.2%} of a step)"
            peaks = f"{gb(s, 'device_peak_bytes')} device, {gb(s, 'host_peak_bytes')} host"
            lines.append(f"{s['name']:<18} {s['cache']:<5} step {s['step_s']:.3f} s, {stall}, {peaks}")
        else:
            lines.append(
                f"{s['name']:<18} {s['cache']:<5} {s['first_step_s']:>9.2f} s {s['imports_s']:>7.2f} s "
                f"{s['load_s']:>7.2f} s {gb(s, 'device_peak_bytes'):>12} {gb(s, 'host_peak_bytes'):>7}"
            )
    return "\n".join(lines)


def gb(s, key):
    return f"{s['memory'].get(key, 0) / 1e9:.1f} GB"


def machine():
    from wan_loader.machine import machine_card

    card = dict(machine_card())
    try:
        query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
        card["gpu"] = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        card["gpu"] = None
    return card


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", help="where checkpoints are made")
    parser.add_argument("--ckpt", help="a checkpoint in the diffusers layout to take instead of making one")
    parser.add_argument("--size", choices=["tiny", "full"], default="full")
    parser.add_argument("--blocks", type=int, default=10, help="blocks per expert, of 40")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32", help="of the experts' files")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--samples", nargs="+", default=["ours:fastest", "diffusers", "official"])
    parser.add_argument("--runs", nargs="*", default=["run:fastest", "run:balanced", "run:min-memory"])
    parser.add_argument("--cache", nargs="+", choices=["cold", "warm"], default=["cold", "warm"])
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--video-size", default="832*480")
    parser.add_argument("--frames", type=int, default=33)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--output", help="write all samples as JSON")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--result", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.wh = tuple(int(x) for x in args.video_size.split("*"))
    return args


def main():
    args = parse()
    if args.child:
        child(args)
        return
    Path(args.directory).mkdir(parents=True, exist_ok=True)
    args.ckpt = args.ckpt or make_checkpoint(args)
    plan = [(name, cache) for cache in args.cache for name in args.samples for _ in range(args.repeat)]
    plan += [(name, "warm") for name in args.runs]
    samples = []
    for name, cache in plan:
        samples.append(sample(args, name, cache))
        print(table(samples[-1:]), file=sys.stderr, flush=True)
    files = weight_files(args.ckpt)
    document = {
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "machine": machine(),
        "checkpoint": {"path": args.ckpt, "nbytes": sum(os.path.getsize(f) for f in files)},
        "settings": {"video_size": args.video_size, "frames": args.frames, "steps": args.steps},
        "samples": samples,
    }
    if args.output:
        Path(args.output).write_text(json.dumps(document, indent=2) + "\n")
    print(table(samples))


if __name__ == "__main__":
    main()
