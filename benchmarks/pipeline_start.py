"""From the start of a process to its first denoising step: ours, diffusers, and the official order of work.

    python benchmarks/pipeline_start.py /data/bench --blocks 10 --output benchmarks/results/NAME.json
    python benchmarks/pipeline_start.py /tmp/bench --size tiny --device cpu

Makes an A14B-shaped checkpoint of random weights with N blocks per expert (diffusers layout: all three can read it)
unless it is there. Every sample is a fresh process; its clock starts just before the process does and stops when the
device has finished everything before the first call of the high-noise expert. Latents are small, the prompt is real.
All libraries are imported once, untimed, before the first sample, so that their byte code is compiled and cached; where
PYTHONDONTWRITEBYTECODE forbids that, it is unset, as every import would compile everything again.

    ours:PRESET   WanT2V.from_checkpoint(preset=PRESET): loads beside the imports
    alone:PRESET  the same after all imports: how long the loading takes when nothing else runs
    diffusers     WanPipeline.from_pretrained(torch_dtype=bf16).to(device)
    official      one after the other: text encoder initialised at random on the CPU and then loaded, VAE, low-noise and
                  high-noise expert in fp32, cast on the CPU, pageable copies

`load_s` of the last three is the time from the end of the imports and of the device's start-up until all networks have
arrived, construction included. `waits_s` of ours is how long the start waited for weights.

Warm means every page resident, cold none; the share found before the start stands in the sample. `NAME@cold` and
`NAME@warm` are taken once, after the others. `run:PRESET` makes a whole video of few steps and gives the peaks of
memory and the stall at the switch of experts. Host memory is that of the process, read by the measuring process every
20 ms: its own (anonymous), and page-cache pages of the files, mapped.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MiB = 1 << 20
PROMPT = "two cats boxing on a stage"


class FirstStepError(Exception):
    """The end of a sample, when the first denoising step would begin."""


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
    """Call a plain diffusers pipeline once."""
    pipe.set_progress_bar_config(disable=True)
    pipe(PROMPT, width=size[0], height=size[1], num_frames=frames, num_inference_steps=4, output_type="latent")


def import_all():
    import torch  # noqa: F401
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel  # noqa: F401
    from transformers import AutoTokenizer, UMT5Config, UMT5EncoderModel  # noqa: F401


def import_and_start_device(args, found):
    """Time all imports and the device's context; what follows is loading."""
    import_all()
    found["imports_s"] = elapsed_s()
    if args.device.startswith("cuda"):
        import torch

        torch.empty(1, device=args.device)
        sync(args.device)
    found["ready_s"] = elapsed_s()


def start_ours(args, preset, *, alone=False):
    found = {}
    if alone:
        import_and_start_device(args, found)
    from wan_pipeline import WanT2V

    with WanT2V.from_checkpoint(
        args.ckpt, preset=preset, device=args.device, size=args.wh, frame_num=args.frames
    ) as pipe:
        if alone:
            pipe.wait()
            sync(args.device)
            found["load_s"] = elapsed_s() - found["ready_s"]
        else:
            found["imports_s"] = elapsed_s()
        stop_at_first_step(pipe.pipe, args.device, found)
        try:
            pipe(PROMPT, size=args.wh, frame_num=args.frames, steps=4)
        except FirstStepError:
            pipe.wait()
        report = pipe.report()
    loads = report["pipeline"]["loads"]
    found["all_loaded_s"] = max(x["start_s"] + x["seconds"] for x in loads)
    found["loads_s"] = sum(x["seconds"] for x in loads)
    found["waits_s"] = {x["name"]: x["seconds"] for x in report["pipeline"]["waits"]}
    found["nbytes"] = sum(x["nbytes"] for x in loads)
    return found | {"loads": loads, "phases": report["phases"], "memory": report["memory"]}


def start_diffusers(args):
    found = {}
    import_and_start_device(args, found)
    import torch
    from diffusers import WanPipeline

    pipe = WanPipeline.from_pretrained(args.ckpt, torch_dtype=torch.bfloat16).to(args.device)
    sync(args.device)
    return finish(args, pipe, found)


def start_official(args):
    found = {}
    import_and_start_device(args, found)
    import torch
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
    from transformers import AutoTokenizer

    root = Path(args.ckpt)
    text = random_text_encoder(root / "text_encoder").to(torch.bfloat16)
    text.load_state_dict(read_all(root / "text_encoder"), strict=False)
    text.to(args.device)
    sync(args.device)
    found["text_encoder_s"] = elapsed_s() - found["ready_s"]
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


def random_text_encoder(directory):
    """As the official code makes it, in fp32 on the CPU: torch's initialisation of each layer, then the model's own.

    transformers' constructor would initialise more than once again; that is left out.
    """
    import torch
    from transformers import UMT5Config, UMT5EncoderModel

    with torch.device("meta"):
        model = UMT5EncoderModel(UMT5Config.from_pretrained(directory))
    model.to_empty(device="cpu")
    seen = set()
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, (torch.nn.Linear, torch.nn.Embedding)) and id(weight) not in seen:
            seen.add(id(weight))
            module.reset_parameters()
            if isinstance(module, torch.nn.Linear):
                torch.nn.init.normal_(weight, std=0.02)
    return model


def read_all(directory):
    from safetensors.torch import load_file

    return {
        name: tensor for file in sorted(directory.glob("*.safetensors")) for name, tensor in load_file(file).items()
    }


def finish(args, pipe, found):
    found["all_loaded_s"] = elapsed_s()
    found["load_s"] = found["all_loaded_s"] - found["ready_s"]
    stop_at_first_step(pipe, args.device, found)
    with contextlib.suppress(FirstStepError):
        call(pipe, args.wh, args.frames)
    return found | {"memory": {}}


def run_ours(args, preset):
    """Make a whole video; steps are timed with the device synchronised after each."""
    from wan_pipeline import WanT2V
    from wan_pipeline.presets import load_preset

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
        "contract_device_bytes": int(load_preset(preset).device_memory_gb * 1e9),
        "loads": report["pipeline"]["loads"],
        "memory": report["memory"],
    }


def child(args):
    kind, _, preset = args.child.partition(":")
    if kind == "imports":
        import_all()
        return
    if kind in ("ours", "alone"):
        found = start_ours(args, preset, alone=kind == "alone")
    elif kind == "run":
        found = run_ours(args, preset)
    else:
        found = {"diffusers": start_diffusers, "official": start_official}[kind](args)
    if args.device.startswith("cuda"):
        import torch

        memory, cuda = found["memory"], torch.cuda
        memory["device_peak_bytes"] = max(memory.get("device_peak_bytes", 0), cuda.max_memory_allocated())
        reserved = max(memory.get("device_reserved_peak_bytes", 0), cuda.max_memory_reserved())
        memory["device_reserved_peak_bytes"] = reserved
    Path(args.result).write_text(json.dumps(found))


# --- the measuring process


def weight_files(directory):
    return sorted(str(p) for kind in ("*.safetensors", "*.pth") for p in Path(directory).rglob(kind))


def resident_share(directory):
    from wan_loader.warming.evict import resident_bytes

    files = weight_files(directory)
    return (resident_bytes(files) or 0) / sum(os.path.getsize(name) for name in files)


def evict(directory):
    from wan_loader.warming.evict import evict

    evict(weight_files(directory))


def warm(directory):
    from wan_loader.warming.prewarm import prewarm_files

    prewarm_files(weight_files(directory), threads=8).wait()


def sample(args, name, cache):
    """Run one fresh process."""
    {"cold": evict, "warm": warm}[cache](args.ckpt)
    share = resident_share(args.ckpt)
    result = Path(args.directory) / "sample.json"
    result.unlink(missing_ok=True)
    command = [sys.executable, __file__, args.directory, "--child", name, "--ckpt", args.ckpt, "--device", args.device]
    command += ["--result", str(result), "--video-size", args.video_size, "--frames", str(args.frames)]
    command += ["--steps", str(args.steps)]
    start_ns = time.monotonic_ns()
    with tempfile.TemporaryFile("w+") as errors:
        env = os.environ | {"BENCH_START_NS": str(start_ns)}
        process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=errors)
        host = watch_memory(process)
        errors.seek(0)
        lines = errors.read().strip().splitlines()
    head = {"name": name, "cache": cache, "resident_before": share, "seconds": (time.monotonic_ns() - start_ns) / 1e9}
    if process.returncode != 0 or not result.exists():
        return head | {"error": lines[-3:]}
    found = json.loads(result.read_text())
    return head | found | {"memory": found["memory"] | host}


def watch_memory(process):
    """Watch the process's peaks of anonymous and of mapped file memory while it runs."""
    peaks = {"host_anonymous_peak_bytes": 0, "host_mapped_file_peak_bytes": 0}
    while process.poll() is None:
        with contextlib.suppress(OSError):
            text = Path(f"/proc/{process.pid}/status").read_text()
            kB = {name: int(number) for name, number in re.findall(r"^Rss(\w+):\s+(\d+) kB", text, re.M)}
            if kB:  # a process that has ended has none
                now = (kB["Anon"] * 1024, (kB["File"] + kB["Shmem"]) * 1024)
                peaks = {key: max(old, new) for (key, old), new in zip(peaks.items(), now, strict=True)}
        time.sleep(0.02)
    return peaks


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
        f"{'sample':<18} {'cache':<5} {'first step':>11} {'imports':>9} {'loading':>9} {'waited':>8} "
        f"{'device peak':>12} {'host':>7}"
    ]
    for s in samples:
        head = f"{s['name']:<18} {s['cache']:<5}"
        if "error" in s:
            lines.append(f"{head} {s['error']}")
        elif "step_s" in s:
            stall = f"switch stall {s['switch_stall_s'] * 1e3:.2f} ms ({s['switch_stall_of_a_step']:.2%} of a step)"
            peaks = f"{gb(s, 'device_peak_bytes')} device, {gb(s, 'host_anonymous_peak_bytes')} host"
            lines.append(f"{head} step {s['step_s']:.3f} s, {stall}, {peaks}")
        else:
            waited = f"{sum(s['waits_s'].values()):.2f} s" if "waits_s" in s else ""
            load_s = s.get("load_s", s.get("loads_s"))
            lines.append(
                f"{head} {s['first_step_s']:>9.2f} s {s['imports_s']:>7.2f} s {load_s:>7.2f} s "
                f"{waited:>8} {gb(s, 'device_peak_bytes'):>12} {gb(s, 'host_anonymous_peak_bytes'):>7}"
            )
    return "\n".join(lines)


def gb(s, key):
    return f"{s['memory'].get(key, 0) / 1e9:.1f} GB"


def machine():
    from wan_loader.system.machine import machine_card

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
    parser.add_argument("--samples", nargs="+", default=["ours:fastest", "alone:fastest", "diffusers", "official"])
    parser.add_argument("--runs", nargs="*", default=["run:fastest", "run:balanced", "run:min-memory"])
    parser.add_argument("--cache", nargs="+", choices=["cold", "warm"], default=["warm", "cold"])
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
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    importing = subprocess.Popen([sys.executable, __file__, args.directory, "--child", "imports"])
    args.ckpt = args.ckpt or make_checkpoint(args)
    importing.wait()
    files = weight_files(args.ckpt)
    document = {
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "machine": machine(),
        "checkpoint": {"path": args.ckpt, "nbytes": sum(os.path.getsize(f) for f in files)},
        "settings": {"video_size": args.video_size, "frames": args.frames, "steps": args.steps},
        "samples": [],
    }
    for name, cache in plan_samples(args):
        document["samples"].append(sample(args, name, cache))
        print(table(document["samples"][-1:]).splitlines()[-1], file=sys.stderr, flush=True)
        if args.output:  # after each: a benchmark that is ended keeps what it has
            Path(args.output).write_text(json.dumps(document, indent=2) + "\n")
    print(table(document["samples"]))


def plan_samples(args):
    """Names without a cache state for each of --cache, runs with the warm ones; then those that name theirs."""
    plan = []
    for cache in args.cache:
        plan += [(name, cache) for name in args.samples if "@" not in name for _ in range(args.repeat)]
        plan += [(name, cache) for name in args.runs if cache == "warm"]
    pairs = [tuple(name.split("@")) for name in args.samples if "@" in name]
    return plan + [pair for pair in pairs for _ in range(args.repeat)]


if __name__ == "__main__":
    main()
