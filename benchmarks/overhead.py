"""What does `wan-loader profile` cost the program that it records? Plain starts and recorded ones, by turns.

    python benchmarks/overhead.py [--pairs 15] [--output FILE]

A start imports torch and diffusers, builds a small WAN transformer with its random numbers, reads half of its weights'
size from a file, binds them and converts to bf16: some seconds in which all hooks have work. Which of a pair comes
first alternates, after one of each that does not count. Wall time is from the start of the program to its end.
Processor time is that of the program, the recording inside it included, and of the profiler that looks at it from
outside, writes what is to be started and reads what was recorded. The judgement and the report come later, and hold no
program up. Where others use the machine, processor time is the steadier figure.

The figure is the geometric mean of the pairs' ratios, with the bound that 97.5 % of 10,000 resamples stay below. The
exit code is 1 unless both bounds are below 1.05.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from turns import describe_run

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_MOST = 1.05
_START = """
import os, sys
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file

path, width, layers = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
net = WanTransformer3DModel(
    num_attention_heads=width // 128, attention_head_dim=128, ffn_dim=4 * width, num_layers=layers, text_dim=512
)
if not os.path.exists(path):
    save_file(net.state_dict(), path)
net.load_state_dict(load_file(path))
net.half()
"""


@dataclass(frozen=True, slots=True)
class Cost:
    """What one start took."""

    seconds: float
    cpu_s: float
    """Of the program and of what records it."""
    watching_s: float
    """Of it, what the profiler took outside of the program."""


def plain(words: list[str]) -> float:
    """Run a program, and return its seconds."""
    start = time.perf_counter()
    subprocess.run(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)
    return time.perf_counter() - start


def recorded(words: list[str]) -> float:
    """Run a program as `profile` does, and return its seconds."""
    from wan_loader.profiler.program import run_program

    recording = run_program(words, stdout=subprocess.DEVNULL)
    if recording.returncode:
        sys.exit(f"the program failed under the profiler: {recording.returncode}")
    return (recording.end_ns - recording.start_ns) / 1e9


def cost_of(run: Callable[[list[str]], float], words: list[str]) -> Cost:
    """Measure one start."""

    def cpu(who: int) -> float:
        usage = resource.getrusage(who)
        return usage.ru_utime + usage.ru_stime

    self_s, children_s = cpu(resource.RUSAGE_SELF), cpu(resource.RUSAGE_CHILDREN)
    seconds = run(words)
    watching_s = cpu(resource.RUSAGE_SELF) - self_s
    return Cost(seconds, cpu(resource.RUSAGE_CHILDREN) - children_s + watching_s, watching_s)


def bound(ratios: Sequence[float]) -> tuple[float, float]:
    """Return the geometric mean of ratios, and what it is most likely below."""
    chance = random.Random(0)
    means = sorted(statistics.geometric_mean(chance.choices(ratios, k=len(ratios))) for _ in range(10_000))
    return statistics.geometric_mean(ratios), means[9750]


def compare(pairs: Sequence[tuple[Cost, Cost]], what: str) -> dict[str, float]:
    """Compare plain and recorded starts by wall time or by processor time."""
    ratios = [getattr(b, what) / getattr(a, what) for a, b in pairs]
    ratio, upper = bound(ratios)
    return {
        "plain_s": round(statistics.median(getattr(a, what) for a, _ in pairs), 3),
        "recorded_s": round(statistics.median(getattr(b, what) for _, b in pairs), 3),
        "ratio": round(ratio, 4),
        "upper_bound": round(upper, 4),
    }


def take_turns(words: list[str], n_pairs: int) -> list[tuple[Cost, Cost]]:
    """Take all samples, (plain, recorded) in each pair."""
    for run in (plain, recorded):  # from here on byte code is compiled, and the page cache is warm
        cost_of(run, words)
    pairs = []
    for i in range(n_pairs):
        order = (plain, recorded) if i % 2 else (recorded, plain)
        costs = {run: cost_of(run, words) for run in order}
        pairs.append((costs[plain], costs[recorded]))
        a, b = pairs[-1]
        print(f"{i + 1:3}  wall {a.seconds:6.2f} {b.seconds:6.2f}  CPU {a.cpu_s:6.2f} {b.cpu_s:6.2f}", flush=True)
    return pairs


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=15, help="samples of each (default: 15)")
    parser.add_argument("--size", choices=("full", "tiny"), default="full", help="tiny: nothing to read")
    parser.add_argument("--output", type=Path, help="all samples, as JSON")
    arguments = parser.parse_args()
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    shape = ("1024", "4") if arguments.size == "full" else ("128", "1")
    with tempfile.TemporaryDirectory() as directory:
        script = Path(directory, "start.py")
        script.write_text(_START)
        pairs = take_turns(
            [sys.executable, str(script), str(Path(directory, "w.safetensors")), *shape], arguments.pairs
        )
    document: dict[str, Any] = {
        **describe_run(),
        "load_average": os.getloadavg(),
        "wall": compare(pairs, "seconds"),
        "cpu": compare(pairs, "cpu_s"),
        "watching_s": round(statistics.median(b.watching_s - a.watching_s for a, b in pairs), 3),
        "pairs": [{"plain": asdict(a), "recorded": asdict(b)} for a, b in pairs],
    }
    for what in ("wall", "cpu"):
        found = document[what]
        print(
            f"{what:4}  plain {found['plain_s']:.2f} s  recorded {found['recorded_s']:.2f} s  "
            f"ratio {found['ratio']:.3f}, below {found['upper_bound']:.3f}"
        )
    print(f"of that outside of the program: {document['watching_s']:.3f} s")
    if arguments.output:
        arguments.output.write_text(json.dumps(document, indent=1) + "\n")
    if max(document[what]["upper_bound"] for what in ("wall", "cpu")) >= _MOST:
        sys.exit(1)


if __name__ == "__main__":
    main()
