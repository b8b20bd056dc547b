"""What the imports of a start take, lean and full, beside `import torch`; with a checkpoint, the first step, too.

    python benchmarks/imports.py --samples 5 --output imports.json
    python benchmarks/imports.py --samples 5 --ckpt DIR --device cuda:0 --output imports.json
    python benchmarks/imports.py --importtime        # where the rest is, by `python -X importtime`

Every sample is a fresh process, the kinds by turns. Before more than one of each, one comes that counts for nothing:
byte code is cached then, and files are in the page cache. Seconds are from before a process is begun to the end of its
imports, or to its first denoising step, which does not run. On a busy machine, ratios of CPU seconds (the last but one
column) say more. Modules and seconds by package are of the last sample of a kind; a first step is that of a video of
832*480, or of what --size and --frames say.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KINDS = ["python", "torch", "full", "lean"]
FIRST_STEPS = ["first step full", "first step lean"]
#: The first step is to come within so many times the seconds of `import torch`, and so many seconds more.
FACTOR, MORE_S = 3.5, 0.6


def elapsed_s():
    return (time.monotonic_ns() - int(os.environ["BENCH_START_NS"])) / 1e9


# --- the measured processes


def import_libraries(lean):
    """As `wan_pipeline.startup` does."""
    from wan_pipeline.lean.import_times import import_seconds
    from wan_pipeline.short_imports import short_imports

    with short_imports(lean=lean) as imports:
        import torch  # noqa: F401
        from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel  # noqa: F401
        from transformers import AutoTokenizer, UMT5EncoderModel  # noqa: F401
    return {"by_package": import_seconds(imports)}


class FirstStepError(Exception):
    """Raised where the first step would begin."""


def start(args, lean):
    from wan_pipeline import WanT2V

    size = tuple(int(x) for x in args.size.split("*"))
    found = {}

    def stop(module, inputs):
        if args.device.startswith("cuda"):
            import torch

            torch.cuda.synchronize()
        found["seconds"] = elapsed_s()
        raise FirstStepError

    with WanT2V.from_checkpoint(
        args.ckpt, preset=args.preset, device=args.device, size=size, frame_num=args.frames, full_imports=not lean
    ) as pipe:
        found["imports_done_s"] = elapsed_s()
        pipe.pipe.transformer.register_forward_pre_hook(stop)
        with contextlib.suppress(FirstStepError):
            pipe("Two cats boxing on a stage", size=size, frame_num=args.frames, steps=4)
        report = pipe.report()["pipeline"]
    return found | {"by_package": report["imports"], "waited_s": {x["name"]: x["seconds"] for x in report["waits"]}}


def child(args):
    kind, found = args.child, {}
    if kind == "torch":
        import torch  # noqa: F401
    elif kind in ("full", "lean"):
        found = import_libraries(kind == "lean")
    elif kind in FIRST_STEPS:
        found = start(args, kind.endswith("lean"))
    found = {"seconds": elapsed_s(), "cpu_s": time.process_time(), "n_modules": len(sys.modules)} | found
    Path(args.result).write_text(json.dumps(found))


# --- the measuring process


def sample(args, kind, *, python=()):
    """Run one fresh process."""
    with tempfile.TemporaryDirectory() as place:
        result = Path(place) / "result.json"
        command = [sys.executable, *python, __file__, "--child", kind, "--result", str(result)]
        command += ["--device", args.device, "--size", args.size, "--frames", str(args.frames), "--preset", args.preset]
        command += ["--ckpt", args.ckpt] if args.ckpt else []
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        env = os.environ | {"PYTHONPATH": path, "BENCH_START_NS": str(time.monotonic_ns())}
        env.pop("PYTHONDONTWRITEBYTECODE", None)
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        if done.returncode != 0:
            raise SystemExit(f"{kind}: {done.stderr[-2000:]}")
        return {"kind": kind} | json.loads(result.read_text()), done.stderr


def self_seconds(text):
    """Return each package's own seconds from what `python -X importtime` says."""
    found = defaultdict(int)
    for own, name in re.findall(r"^import time:\s+(\d+) \|\s+\d+ \| +(\S+)$", text, re.M):
        found[name.partition(".")[0]] += int(own)
    return {name: us / 1e6 for name, us in sorted(found.items(), key=lambda item: -item[1])}


def median(samples, kind, field="seconds"):
    found = [s[field] for s in samples if s["kind"] == kind]
    return statistics.median(found) if found else None


def table(samples):
    torch_s, torch_cpu_s = (median(samples, "torch", f) - median(samples, "python", f) for f in ("seconds", "cpu_s"))
    lines = [f"{'':<16} {'seconds':>8} {'least':>7} {'most':>7} {'CPU':>7} {'x torch':>8} {'of CPU':>7} {'modules':>8}"]
    for kind in dict.fromkeys(s["kind"] for s in samples):
        found = [s for s in samples if s["kind"] == kind]
        seconds = [s["seconds"] for s in found]
        lines.append(
            f"{kind:<16} {statistics.median(seconds):>8.2f} {min(seconds):>7.2f} {max(seconds):>7.2f} "
            f"{median(samples, kind, 'cpu_s'):>7.2f} {statistics.median(seconds) / torch_s:>8.2f} "
            f"{median(samples, kind, 'cpu_s') / torch_cpu_s:>7.2f} {found[-1]['n_modules']:>8}"
        )
    lines.append(f"import torch: {torch_s:.2f} s; {FACTOR} times that + {MORE_S} s = {FACTOR * torch_s + MORE_S:.2f} s")
    for kind in ("full", "lean", *FIRST_STEPS):
        found = [s for s in samples if s["kind"] == kind]
        if found:
            packages = list(found[-1]["by_package"].items())[:8]
            lines.append(f"{kind}: " + ", ".join(f"{name} {seconds:.2f}" for name, seconds in packages))
    return "\n".join(lines)


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=5, help="of each kind")
    parser.add_argument("--ckpt", help="a checkpoint: then the first step is measured, too")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--preset", default="fastest")
    parser.add_argument("--size", default="832*480")
    parser.add_argument("--frames", type=int, default=33)
    parser.add_argument("--importtime", action="store_true", help="show the packages' own seconds, lean and full")
    parser.add_argument("--output", help="write all samples as JSON")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--result", help=argparse.SUPPRESS)
    return parser.parse_args()


def main():
    args = parse()
    if args.child:
        child(args)
        return
    if args.importtime:
        for kind in ("full", "lean"):
            sample(args, kind)
            found = self_seconds(sample(args, kind, python=["-X", "importtime"])[1])
            print(
                f"{kind}: {sum(found.values()):.2f} s, "
                + ", ".join(f"{n} {s:.2f}" for n, s in list(found.items())[:15])
            )
        return
    from wan_loader.system import machine_card

    kinds = KINDS + (FIRST_STEPS if args.ckpt else [])
    document = {"command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]), "machine": machine_card(), "samples": []}
    warm_ups = 1 if args.samples > 1 else 0
    for count in range(args.samples + warm_ups):
        for kind in kinds:
            found, _ = sample(args, kind)
            if count >= warm_ups:
                document["samples"].append(found)
                print(f"{kind} {found['seconds']:.2f} s", file=sys.stderr, flush=True)
    if args.output:
        Path(args.output).write_text(json.dumps(document, indent=2) + "\n")
    print(table(document["samples"]))


if __name__ == "__main__":
    main()
