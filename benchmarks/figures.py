"""The figures of one machine, step by step, each with JSON, Markdown and picture under benchmarks/results/MACHINE.

    python benchmarks/figures.py /data/bench benchmarks/results/h100-80gb                   # lists the steps
    python benchmarks/figures.py /data/bench benchmarks/results/h100-80gb peers-warm sizes  # runs two of them
    python benchmarks/figures.py /data/bench benchmarks/results/h100-80gb --only readme     # those that README shows

Makes the checkpoints that a step needs (random weights in the published shapes) in the first directory, which should
lie on the disk to be measured, unless they are there. 60 GB are enough with --only; flashpack packs a copy beside.
`sparse-*` have holes for weights, which take no time to make and no room: for what is in the page cache anyway.
Each step is `wan-loader bench` with the options that the list shows; needs the extras `pipeline` and, for rival
loaders, `peers`. The seconds of the list are for one H100 with 16 cores and a disk of 2 GB/s: measured for the steps of
README, for the others estimated from what a sample takes; making checkpoints (20 s for 29 GB there) comes on top.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from sparse import make_sparse

GB = 10**9
MB = 10**6
#: Blocks by size in bf16: about 0.7 GB a block, and 40 are an expert. In fp32 half of them have the same size.
BLOCKS = {"1g": 1, "7g": 10, "14g": 20, "28g": 40, "57g": 80}


@dataclass(frozen=True)
class Step:
    checkpoints: tuple[str, ...]
    options: str
    seconds: int
    """About how long it takes, without making the checkpoints."""


#: As many samples as a figure in README needs (report.py).
ENOUGH = "--repeat 5 --repeat-rivals 3"
#: All that load an expert. transformers makes components of another kind, and would be a row without a time.
CACHED = "ours,safetensors,safetensors-cuda,safetensors-prefetch,torch,runai,flashpack"
FILES = f"{CACHED},fastsafetensors,instanttensor"
OF_DIFFUSERS = "diffusers,diffusers-parallel,diffusers-flashpack"
PEERS = f"{FILES},{OF_DIFFUSERS}"
#: Without the two that read the disk although the bytes lie in the page cache.
WARM = f"{CACHED},{OF_DIFFUSERS}"
#: Without those that take a minute for three samples; cold, where a sample takes 15 s, only who has been near the disk.
QUICK = "ours,safetensors,safetensors-prefetch,diffusers-parallel,diffusers-flashpack,runai,flashpack"
NEAR_THE_DISK = "ours,safetensors-prefetch,safetensors-cuda,fastsafetensors"
THREADS = " ".join(f"--threads {n}" for n in (1, 2, 4, 8, 16))
TWO = "ours,safetensors-cuda"
STEPS = {
    "peers-warm": Step(("bf16-28g",), f"--loader {WARM} --cache warm {ENOUGH}", 290),
    "peers-warm-all": Step(("bf16-28g",), f"--loader {PEERS} --cache warm {ENOUGH}", 450),
    "peers-cold": Step(("bf16-28g",), f"--loader {NEAR_THE_DISK} --cache cold {ENOUGH}", 285),
    "mapped": Step(("bf16-28g",), "--loader ours --io auto --io mapped --cache warm --repeat 5", 45),
    "size-57g": Step(("sparse-57g",), f"--loader ours,safetensors-prefetch --cache warm --dtype bf16 {ENOUGH}", 55),
    "fp32-to-bf16": Step(("fp32-28g",), f"--loader {QUICK} --cache warm --dtype bf16 {ENOUGH}", 220),
    "fp32-to-bf16-all": Step(("fp32-28g",), f"--loader {PEERS} --cache warm --dtype bf16 {ENOUGH}", 600),
    "encoder": Step(
        ("encoder",), f"--loader ours,safetensors,safetensors-prefetch,transformers --cache warm {ENOUGH}", 110
    ),
    "peers-small": Step(("small",), f"--loader {FILES} --cache warm {ENOUGH}", 120),
    "io": Step(
        ("bf16-28g",), "--loader ours --io auto --io mapped --io direct --io buffered --cache warm --repeat 3", 80
    ),
    "io-cold": Step(("bf16-28g",), "--loader ours --io auto --io direct --io buffered --cache cold --repeat 2", 180),
    "threads": Step(("bf16-28g",), f"--loader ours --io buffered {THREADS} --cache warm --repeat 3", 130),
    "threads-cold": Step(("bf16-7g",), f"--loader ours --io direct {THREADS} --cache cold --repeat 2", 120),
    "sizes": Step(
        ("sparse-1g", "sparse-7g", "sparse-28g", "sparse-57g"), f"--loader {TWO} --cache warm --repeat 3", 220
    ),
    "storage-ram": Step(("bf16-7g",), f"--loader {TWO} --storage ram=/dev/shm --cache warm --repeat 3", 50),
    "storage-disk": Step(("bf16-7g",), f"--loader {TWO} --cache cold --cache warm --repeat 3", 90),
    "storage-simulated": Step(
        ("bf16-1g",),
        "--loader ours --storage hdd=simulated --storage sata=simulated --storage nvme=simulated --repeat 3",
        70,
    ),
    "shapes": Step(("many", "huge"), f"--loader {TWO} --cache warm {ENOUGH}", 140),
}
#: What README shows, in an order that makes each checkpoint once.
README = ("peers-warm", "peers-cold", "mapped", "size-57g", "fp32-to-bf16")


def make(directory: Path, name: str) -> Path:
    """Return the checkpoint of a step; it is made unless it is there."""
    target = directory / name
    if name in ("small", "many", "huge"):
        return _make_plain(target, name)
    if name == "encoder":
        if not target.exists():
            _synth(target, layout="diffusers", size="full", components=["text_encoder"])
        return target / "text_encoder"
    done = target / "transformer"
    if not done.exists():
        dtype, size = name.split("-")
        fp32 = dtype == "fp32" or size == "57g"  # 57 GB are a whole expert in fp32
        shape = {
            "layout": "diffusers",
            "size": "full",
            "components": ["high_noise"],
            "blocks": BLOCKS[size] // (2 if fp32 else 1),
            "dtype": "fp32" if fp32 else "bf16",
        }
        started = time.perf_counter()
        (make_sparse if dtype == "sparse" else _synth)(target, **shape)
        nbytes = sum(path.stat().st_size for path in done.glob("*.safetensors"))
        print(f"{name}: made {nbytes / GB:.1f} GB in {time.perf_counter() - started:.0f} s", flush=True)
    return done


def _synth(target: Path, **shape) -> None:
    from wan_pipeline.synth import synth

    synth(target, **shape)


def _make_plain(target: Path, name: str) -> Path:
    """Make one of three files; small: 90 MB in 100 tensors; many: 10,000 of 1 kB; huge: one of 20 GB."""
    path = target / "model.safetensors"
    if path.exists():
        return target
    import torch
    from safetensors.torch import save_file

    target.mkdir(parents=True, exist_ok=True)
    count, nbytes = {"small": (100, 900_000), "many": (10_000, 1024), "huge": (1, 20 * GB)}[name]
    tensors = {f"w{i}": torch.empty(nbytes // 2, dtype=torch.bfloat16).fill_(i % 7 + 0.5) for i in range(count)}
    save_file(tensors, path)
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return target


def command(paths: list[str], step: Step, results: Path, name: str) -> list[str]:
    """Return the bench of a step."""
    exports = (("json", "json"), ("markdown", "md"), ("picture", "svg"))
    words = [sys.executable, "-m", "wan_loader", "bench", *paths, *shlex.split(step.options), "--force"]
    for option, suffix in exports:
        words += [f"--export-{option}", str(results / f"{name}.{suffix}")]
    return words


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="where the checkpoints are, or are made")
    parser.add_argument("results", type=Path)
    parser.add_argument("steps", nargs="*", metavar="STEP", help=f"of {', '.join(STEPS)}; or readme")
    parser.add_argument("--repeat", type=int, help="samples of each loader, instead of the step's own number")
    parser.add_argument("--only", action="store_true", help="remove checkpoints of other steps first, for small disks")
    parser.add_argument("--make-only", action="store_true", help="make the checkpoints, measure nothing")
    options = parser.parse_intermixed_args()
    options.steps = [step for name in options.steps for step in (README if name == "readme" else (name,))]
    if unknown := [name for name in options.steps if name not in STEPS]:
        parser.error(f"unknown step {unknown[0]}")
    if not options.steps:
        for name, step in STEPS.items():
            print(f"{name:17} {step.seconds:4} s  {', '.join(step.checkpoints)}: {step.options}")
        print(f"{'readme':17} {sum(STEPS[name].seconds for name in README):4} s  {', '.join(README)}")
        return
    options.results.mkdir(parents=True, exist_ok=True)
    failed = [name for name in options.steps if not _run(name, options)]
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


def _run(name: str, options: argparse.Namespace) -> bool:
    step = STEPS[name]
    if options.only:
        for other in {c for s in STEPS.values() for c in s.checkpoints} - set(step.checkpoints):
            shutil.rmtree(options.directory / other, ignore_errors=True)
    paths = [str(make(options.directory, checkpoint)) for checkpoint in step.checkpoints]
    if options.make_only:
        return True
    print(f"== {name}", flush=True)
    words = command(paths, step, options.results, name)
    if options.repeat:
        words += ["--repeat", str(options.repeat), "--repeat-rivals", str(options.repeat)]
    return subprocess.run(words, check=False).returncode == 0


if __name__ == "__main__":
    main()
