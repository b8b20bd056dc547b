"""Programs that stay on the CPU, as they are and under `wan-loader run`: what the fast path costs who cannot use it.

    python benchmarks/programs_on_cpu.py DIRECTORY --pairs 5 --output programs-on-cpu.json

Makes small models in the directory unless they are there. Each sample is a whole process, from its start to its end,
imports included, and the two ways take turns. Both must print the same. The ratio is that of each pair.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from turns import describe_run

#: What programs read -> the code that makes it.
_MAKE = {
    "weights": """
import torch
from safetensors.torch import save_file
weights = {f"layers.{i}.weight": torch.randn(4096, 4096) for i in range(N_TENSORS)}
torch.save(weights, "weights.pt")
save_file(weights, "weights.safetensors")
""",
    "llama": """
from transformers import LlamaConfig, LlamaForCausalLM
shape = dict(hidden_size=768, intermediate_size=2048, num_hidden_layers=8, num_attention_heads=12)
LlamaForCausalLM(LlamaConfig(vocab_size=16000, **shape)).save_pretrained("llama")
""",
    "ddpm": """
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
blocks = dict(down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"))
unet = UNet2DModel(sample_size=32, block_out_channels=(64, 128), **blocks)
DDPMPipeline(unet, DDPMScheduler()).save_pretrained("ddpm")
""",
}
#: A tensor of 4096 by 4096 in fp32.
_TENSOR_GB = 0.067

PROGRAMS = {
    "load_file, and a sum of each": """
from safetensors.torch import load_file
print(sum(float(t.sum()) for t in load_file("weights.safetensors").values()))
""",
    "torch.load, and a sum of each": """
import torch
print(sum(float(t.sum()) for t in torch.load("weights.pt").values()))
""",
    "torch.load, every byte overwritten": """
import torch
print(sum(float(t.mul_(2)[0, 0]) for t in torch.load("weights.pt").values()))
""",
    "transformers generates, fp32": """
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("llama")
print(model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=20, do_sample=False).tolist())
""",
    "transformers generates, bf16": """
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("llama", dtype=torch.bfloat16)
print(model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=20, do_sample=False).tolist())
""",
    "diffusers, two steps": """
import torch
from diffusers import DDPMPipeline
pipe = DDPMPipeline.from_pretrained("ddpm")
pipe.set_progress_bar_config(disable=True)
print(float(pipe(num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np").images.sum()))
""",
    "training": """
import torch
torch.manual_seed(0)
model = torch.nn.Sequential(*[torch.nn.Linear(1024, 1024) for _ in range(8)])
optimizer = torch.optim.Adam(model.parameters())
for _ in range(50):
    loss = model(torch.randn(64, 1024)).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
print(float(loss))
""",
}


def make(directory: Path, code: str, gb: float) -> None:
    """Make what a program reads, unless it is there."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, maker in _MAKE.items():
        if f'"{name}' in code and not list(directory.glob(f"{name}*")):
            maker = maker.replace("N_TENSORS", str(max(1, round(gb / _TENSOR_GB))))
            subprocess.run([sys.executable, "-c", maker], cwd=directory, check=True)


def measure(words: list[str], directory: Path) -> dict[str, Any]:
    """Run a program to its end: seconds, processor time, and what it prints."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    environ = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, *words]
    ended = subprocess.run(command, cwd=directory, env=environ, capture_output=True, text=True, check=False)
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if ended.returncode:
        sys.exit(f"{words}: exit code {ended.returncode}\n{ended.stderr}")
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": seconds, "cpu_s": cpu_s, "printed": ended.stdout}


def main() -> None:
    """Take the samples by turns, and print a line for each program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="where the models are, or are made")
    parser.add_argument("--pairs", type=int, default=5, help="of each program (default: 5)")
    parser.add_argument("--gb", type=float, default=1.0, help="the size of the file of weights (default: 1)")
    parser.add_argument("--program", help="only those whose names contain this")
    parser.add_argument("--output", type=Path, help="all samples, as JSON")
    args = parser.parse_args()
    results = {}
    print(f"{'program':36s} {'plain':>8s} {'run':>8s}  {'ratio of seconds':22s} {'CPU-seconds':14s}  ratio")
    for name, code in PROGRAMS.items():
        if args.program and args.program not in name:
            continue
        make(args.directory, code, args.gb)
        script = args.directory / "program.py"
        script.write_text(code)
        ways = {"plain": [script.name], "run": ["-m", "wan_loader", "run", "--quiet", script.name]}
        samples: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
        for words in ways.values():
            measure(words, args.directory)
        for pair in range(args.pairs):
            for way in ways if pair % 2 else reversed(ways):
                samples[way].append(measure(ways[way], args.directory))
        if len({one["printed"] for both in samples.values() for one in both}) > 1:
            sys.exit(f"{name}: the two ways print different things")
        results[name] = samples
        print(describe(name, samples), flush=True)
    if args.output is not None:
        args.output.write_text(json.dumps(describe_run() | {"samples": results}, indent=1) + "\n")


def describe(name: str, samples: dict[str, list[dict[str, Any]]]) -> str:
    """Return the line of one program."""
    median, found = {}, {}
    for key in ("seconds", "cpu_s"):
        median[key] = [statistics.median(one[key] for one in samples[way]) for way in ("plain", "run")]
        pairs = zip(samples["plain"], samples["run"], strict=True)
        found[key] = sorted(run[key] / plain[key] for plain, run in pairs)
    plain, run = median["seconds"]
    ratios, cpu = found["seconds"], found["cpu_s"]
    spread = f"{statistics.median(ratios):.3f} ({ratios[0]:.2f} - {ratios[-1]:.2f})"
    spent = " -> ".join(f"{one:.2f}" for one in median["cpu_s"])
    return f"{name:36s} {plain:6.2f} s {run:6.2f} s  {spread:22s} {spent:14s}  {statistics.median(cpu):.3f}"


if __name__ == "__main__":
    main()
