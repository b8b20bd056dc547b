"""The whole text-to-video pipeline on several GPUs: is it the video of one GPU, and what does loading cost?

    python benchmarks/parallel_pipeline.py /data/bench --processes 2 --blocks 8 --output benchmarks/results/NAME.json
    python benchmarks/parallel_pipeline.py /tmp/bench --size tiny --device cpu

Makes an A14B-shaped checkpoint of random weights with N blocks per expert (native layout) unless it is there. Every
case is a set of fresh processes with the environment that torchrun gives them; the files are in the page cache.

    one                 one process, preset fastest
    again               one process: the same video, with another attention kernel, and two that are meant to differ
    ulysses             N processes that divide attention; each has all weights of experts and text encoder
    ulysses+fsdp        N processes that divide attention and these weights
    fp32                one process, experts in fp32; also with another attention kernel, and one meant to differ
    fp32 ulysses+fsdp   N processes, experts in fp32

Frames are compared as they leave the VAE, in levels of 255; final latents by their distance, over that by which the
experts moved them from the noise; the text by the distance of the prompts' embeddings. What bf16 tolerance is, two
yardsticks say: how far the video of one process is from the same with another attention kernel, which adds up in
another order, and from that in fp32. Within twice a yardstick, in mean frames and in latents, is as close as bf16 gets.
That says little where mistakes are as close: another prompt, and a pair of blocks exchanged, show whether they are. In
fp32 mistakes are not covered by rounding: those videos are compared among themselves.

`loading` is the sum over the networks, as the pipeline reports it, beside the imports; `read` is what all processes
read together, over the weights needed (of the VAE the decoder alone); `kept` is what loading left on a device;
`process` is the life of a process with all its videos; `host peak` is anonymous memory. Each is that of the process
with the most; one sample each.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import parallel_worker
import pipeline_start
from pipeline_start import machine, watch_memory
from videos import compare, judge, verdicts

GB = 1e9
#: By the video with which others are compared.
YARDSTICKS = {"one": ("other attention", "fp32"), "fp32": ("fp32 other attention",)}
CONTROLS = ("other prompt", "exchanged blocks", "fp32 exchanged blocks")


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Processes that start together, and the videos that they make."""

    name: str
    processes: int = 1
    start: dict = field(default_factory=dict)
    """Arguments of `WanT2V.from_checkpoint`."""
    videos: tuple[str, ...] = ()
    """Names; the case's own unless given."""


def cases(n: int) -> list[Case]:
    ulysses, fsdp = {"preset": "multi-gpu", "ulysses_size": n}, {"dit_fsdp": True, "t5_fsdp": True}
    alone, fp32 = {"preset": "fastest"}, {"dtype": "fp32"}
    return [
        Case(name="one", start=alone),
        Case(name="again", start=alone, videos=("again", "other attention", *CONTROLS[:2])),
        Case(name="ulysses", processes=n, start=ulysses),
        Case(name="ulysses+fsdp", processes=n, start=ulysses | fsdp),
        Case(name="fp32", start=alone | fp32, videos=("fp32", "fp32 other attention", CONTROLS[-1])),
        Case(name="fp32 ulysses+fsdp", processes=n, start=ulysses | fsdp | fp32),
    ]


def run_case(case: Case, options: argparse.Namespace, path: Path, results: Path) -> dict:
    """Run all processes of a case; with `error` where one of them failed or had not ended in time."""
    spec = {"ckpt": str(path), "device": options.device, "start": case.start, "steps": options.steps}
    spec |= {"size": options.wh, "frame_num": options.frames, "result": str(results / case.name)}
    spec |= {"videos": case.videos or (case.name,)}
    resident, start = warm(path), time.perf_counter()
    started = [start_process(spec, env) for env in environments(case.processes)]
    late = threading.Timer(options.timeout, lambda: [process.kill() for process in started])
    late.start()

    def watch(process: subprocess.Popen) -> dict:
        return watch_memory(process) | {"seconds": time.perf_counter() - start, "exit": process.returncode}

    with ThreadPoolExecutor(case.processes) as pool:
        watched = list(pool.map(watch, started))
    late.cancel()
    found = {"case": case.name, "resident_before": resident, "processes": watched}
    if any(process["exit"] for process in watched):
        return found | {"error": problem(spec["result"], watched, options.timeout)}
    for rank, process in enumerate(watched):
        process |= json.loads(Path(f"{spec['result']}.{rank}.json").read_text())
    return found


def environments(n: int) -> list[dict]:
    """Return the environment of each process, as torchrun sets it."""
    if n == 1:
        return [{}]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": n, "LOCAL_WORLD_SIZE": n}
    common["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", 1)
    return [common | {"RANK": rank, "LOCAL_RANK": rank} for rank in range(n)]


def start_process(spec: dict, env: dict) -> subprocess.Popen:
    command = [sys.executable, parallel_worker.__file__, json.dumps(spec)]
    with open(f"{spec['result']}.{env.get('RANK', 0)}.stderr", "wb") as errors:
        env = os.environ | {key: str(value) for key, value in env.items()}
        return subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=errors)


def problem(result: str, watched: list[dict], timeout_s: float) -> str:
    """Return the last lines of the processes that failed."""
    lines = [f"no end after {timeout_s:g} s"] if max(x["seconds"] for x in watched) >= timeout_s else []
    for rank, process in enumerate(watched):
        text = Path(f"{result}.{rank}.stderr").read_text(errors="replace").strip()
        if process["exit"]:
            lines.append(f"process {rank}: {text.splitlines()[-1] if text else 'exit ' + str(process['exit'])}")
    return "; ".join(lines)


def warm(path: Path) -> float:
    """Bring the weights into the page cache; return the share that is there then."""
    from wan_loader.warming.evict import resident_bytes
    from wan_loader.warming.tree import list_tree
    from wan_loader.warming.warm import warm

    files = [file for file in list_tree(path).files if file.is_weights]
    warm(files)
    return (resident_bytes([file.path for file in files]) or 0) / sum(file.nbytes for file in files)


COLUMNS = [
    *("video", "processes", "loading", "read", "kept each", "device peak", "host peak", "process", "denoising"),
    *("decode", "beside", "frames differ: mean, max", "PSNR", "latents differ", "text differs"),
    *("times other attention: frames, latents", "times fp32: frames, latents"),
]


def table(document: dict) -> str:
    rows = [COLUMNS, ["---"] * len(COLUMNS)]
    for case in document["cases"]:
        head = [case["case"], str(len(case["processes"]))]
        if "error" in case:
            rows.append([*head, f"failed: {case['error']}".replace("|", "/")])
            continue
        for index, name in enumerate(case["processes"][0]["videos"]):
            costs = (
                [*head, *process_cells(case["processes"], document["checkpoint"]["nbytes"])]
                if index == 0
                else [name, *[""] * 7]
            )
            parts = [process["videos"][name] for process in case["processes"]]
            seconds = [f"{max(part['denoise_s'] for part in parts):.2f} s", f"{parts[0]['decode_s']:.2f} s"]
            rows.append([*costs, *seconds, *difference_cells(name, document["videos"].get(name))])
    return "\n".join(f"| {' | '.join(row + [''] * (len(COLUMNS) - len(row)))} |" for row in rows)


def process_cells(processes: list[dict], nbytes: dict[str, int]) -> list[str]:
    needed = sum(x["nbytes"] if x["name"] == "vae" else nbytes[x["name"]] for x in processes[0]["loads"])
    most = {key: max(p[key] for p in processes) for key in ("loading_s", "nbytes_kept", "seconds")}
    device, host = (max(p[f"{key}_peak_bytes"] for p in processes) for key in ("device", "host_anonymous"))
    return [
        f"{most['loading_s']:.2f} s",
        f"{sum(p['nbytes_read'] for p in processes) / needed:.2f} x",
        f"{most['nbytes_kept'] / GB:.3g} GB",
        f"{device / GB:.3g} GB" if device else "-",
        f"{host / GB:.3g} GB",
        f"{most['seconds']:.1f} s",
    ]


def difference_cells(name: str, video: dict | None) -> list[str]:
    if video is None:
        return ["nothing to compare with"]
    if name == video["beside"]:
        return [""]
    if video["identical"]:
        return [video["beside"], "identical"]
    times = [[unit["mean_levels"], unit["latents"]] for unit in video["yardsticks"].values()]
    return [
        video["beside"],
        f"{video['mean_levels']:.3g}, {video['max_levels']:.3g}",
        "-" if video["psnr_db"] is None else f"{video['psnr_db']:.1f} dB",
        *(f"{video[key] * 100:.3g} %" for key in ("latents", "text")),
        *(", ".join("-" if ratio is None else f"{ratio:.3g} x" for ratio in pair) for pair in times),
    ]


def make(options: argparse.Namespace) -> Path:
    from wan_pipeline.synth import synth

    blocks = options.blocks if options.size == "full" else None
    target = options.directory / f"native-{options.size}-{blocks or 'all'}-{options.file_dtype}"
    if not target.exists():
        say(f"making {target}")
        synth(target, layout="native", size=options.size, blocks=blocks, dtype=options.file_dtype)
    return target


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="where checkpoints are made")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--size", choices=["full", "tiny"], default="full")
    parser.add_argument("--blocks", type=int, default=8, help="DiT blocks per expert, of 40; tiny has all of its 4")
    parser.add_argument("--file-dtype", choices=["bf16", "fp32"], default="bf16", help="of the experts' files")
    parser.add_argument("--video-size", help="WIDTH*HEIGHT; 640*384 unless given, tiny 64*64")
    parser.add_argument("--frames", type=int, help="4n+1; 17 unless given, tiny 9")
    parser.add_argument("--steps", type=int, default=4, help="enough for both experts")
    parser.add_argument("--only", nargs="+", choices=[case.name for case in cases(2)], help="and no other cases")
    parser.add_argument("--timeout", type=float, default=180, help="seconds for each case")
    parser.add_argument("--output", type=Path, help="write everything as JSON")
    options = parser.parse_args()
    options.video_size = options.video_size or ("64*64" if options.size == "tiny" else "640*384")
    options.frames = options.frames or (9 if options.size == "tiny" else 17)
    options.wh = tuple(int(x) for x in options.video_size.split("*"))
    return options


def main() -> None:
    from wan_loader.errors import WanLoaderError

    options = parse()
    options.directory.mkdir(parents=True, exist_ok=True)
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    command = [sys.executable, pipeline_start.__file__, str(options.directory), "--child", "imports"]
    importing = subprocess.Popen(command)  # their byte code is compiled once, untimed
    try:
        path = make(options)
        importing.wait()
        run(options, path)
    except WanLoaderError as error:
        sys.exit(f"{Path(__file__).name}: {error}")


def run(options: argparse.Namespace, path: Path) -> None:
    from wan_pipeline.parallel import Degrees
    from wan_pipeline.wan_checkpoint import open_wan

    checkpoint = open_wan(path)
    Degrees(ulysses_size=options.processes).check_model(checkpoint, options.wh, options.frames)
    document = {
        "schema_version": 1,
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "machine": machine(),
        "checkpoint": {"path": str(path), "nbytes": {c.name: c.facts.nbytes for c in checkpoint.components}},
        "processes": options.processes,
        "settings": {"video_size": options.video_size, "frames": options.frames, "steps": options.steps},
        "cases": [],
        "videos": {},
    }
    with tempfile.TemporaryDirectory() as results:
        for case in cases(options.processes):
            if options.only and case.name not in options.only:
                continue
            say(f"{case.name}: {', '.join(case.videos or [case.name])}")
            found = run_case(case, options, path, Path(results))
            document["cases"].append(found)
            say(f"    {found.get('error', 'done')}, {max(p['seconds'] for p in found['processes']):.1f} s")
            note(document, found, Path(results))
            if options.output:  # after each: a benchmark that is ended keeps what it has
                options.output.write_text(json.dumps(document, indent=1) + "\n")
    print(table(document) + "\n")
    print("\n".join(document["verdicts"]))


def note(document: dict, found: dict, results: Path) -> None:
    """Compare the videos of a case with that of one process in the same precision."""
    videos = document["videos"]
    for name in () if "error" in found else found["processes"][0]["videos"]:
        beside = "fp32" if name.startswith("fp32 ") else "one"
        if (reference := results / f"{beside}.{beside}.npz").exists():
            compared = compare(results / f"{found['case']}.{name}.npz", reference)
            videos[name] = {"beside": beside, **compared, "yardsticks": {}}
    for name, video in videos.items():
        units = YARDSTICKS[video["beside"]]
        if name not in (video["beside"], *units):
            video["yardsticks"] = judge(video, {unit: videos[unit] for unit in units if unit in videos})
    document["verdicts"] = verdicts(videos, CONTROLS)


if __name__ == "__main__":
    main()
