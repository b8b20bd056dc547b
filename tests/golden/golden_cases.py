"""Every command of both programs on small files, one after the other: what it prints, and its exit code.

Commands run in this process, where torch is imported once, but for those that replace or start a process.
"""

import contextlib
import hashlib
import importlib
import io
import json
import os
import signal
import struct
import subprocess
import sys
import threading
import tomllib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest import mock

from golden_shape import flags, interface, normalised, types_of

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
WRITTEN = HERE / "written_by_0_1_0"

LOAD = "load --device cpu"
CACHED = f"{LOAD} /m.safetensors --dtype bf16 --cache --cache-dir /c --io buffered --threads 2 --json"
#: Name of a case -> its command. A word that begins with / is a path below the place of the run, one that begins with
#: @ is a file that 0.1.0 has written. Order counts.
LOADER = {
    "inspect": "inspect /m.safetensors --json",
    "inspect, tensors": "inspect /m.safetensors --tensors --json",
    "inspect, torch": "inspect /m.pth --part sd --tensors --json",
    "inspect, shards": "inspect /sharded --json",
    "inspect, text": "inspect /m.safetensors --tensors",
    "load, auto": f"{LOAD} /m.safetensors --threads 2 --json",
    "load, mapped": f"{LOAD} /m.safetensors --io mapped --threads 2 --json",
    "load, buffered": f"{LOAD} /m.safetensors --io buffered --threads 2 --json",
    "load, cast, verified": f"{LOAD} /m.safetensors --io buffered --threads 2 --dtype fp16 --verify --json",
    "load, part": f"{LOAD} /m.pth --part sd --io buffered --threads 2 --json",
    "load, shards": f"{LOAD} /sharded --io buffered --threads 2 --json",
    "load, cache written": CACHED,
    "load, cache hit": CACHED,
    "load, text": f"{LOAD} /m.safetensors",
    "profile, files": "profile /m.safetensors --device cpu --dtype bf16 --no-ceilings --json"
    " -o /run.json --trace /trace.json --html /run.html",
    "profile, text": "profile /m.safetensors --device cpu --no-ceilings",
    "profile, output there": "profile /m.safetensors --device cpu --no-ceilings -o /run.json",
    "report": "report /run.json --json",
    "report, text": "report /run.json",
    "report, files": "report /run.json --trace /trace2.json --html /run2.html",
    "report, several": "report @session.rank0.json @session.rank1.json --json",
    "report, not of one load": "report @session.json @session.json --json",
    "compare, sessions": "compare /run.json /run.json --json",
    "estimate": "estimate /m.safetensors --disk 1MB/s --disk hdd --pcie 1GB/s --dtype bf16 --json",
    "estimate, cpu": "estimate /m.safetensors --disk 150MB/s --device cpu --json",
    "estimate, text": "estimate /m.safetensors --disk 150MB/s",
    "doctor": "doctor /m.safetensors --device cpu --json",
    "warm": "warm /sharded --json",
    "warm, limit": "warm /sharded --limit 8kB --threads 2 --json",
    "evict": "evict /sharded --json",
    "stage": "stage /sharded --to /staged --json",
    "stage, again": "stage /sharded --to /staged --threads 2 --json",
    "stage, remove": "stage /sharded --remove --to /staged --json",
    "cache build": "cache build /m.safetensors --cache-dir /cache --contents --json",
    "cache build, there": "cache build /m.safetensors --cache-dir /cache --json",
    "cache build, fp16": "cache build /m.safetensors --dtype fp16 --cache-dir /cache --json",
    "cache verify": "cache verify --sources --cache-dir /cache --json",
    "cache list": "cache list --cache-dir /cache --json",
    "cache list, text": "cache list --cache-dir /cache",
    "cache prune": "cache prune --max-age 30d --cache-dir /cache --json",
    "cache clear, not confirmed": "cache clear --cache-dir /cache --json",
    "cache clear": "cache clear --yes --cache-dir /cache --json",
    "download, dry run": "download a/b --to /down --layout native --dry-run --json",
    "download": "download a/b --to /down --json",
    # mistakes
    "no command": "",
    "unknown command": "lod /m.safetensors",
    "inspect, missing": "inspect /none.safetensors --json",
    "inspect, garbage": "inspect /garbage.safetensors --json",
    "inspect, a model without parts": "inspect /incomplete --json",
    "inspect, no path": "inspect",
    "load, missing": f"{LOAD} /none.safetensors --json",
    "load, garbage": f"{LOAD} /garbage.safetensors --json",
    "load, truncated": f"{LOAD} /truncated.safetensors --json",
    "load, header too large": f"{LOAD} /huge.safetensors --json",
    "load, a key twice": f"{LOAD} /twice.safetensors --json",
    "load, overlap": f"{LOAD} /overlap.safetensors --json",
    "load, outside": f"{LOAD} /outside/model.safetensors.index.json --json",
    "load, empty directory": f"{LOAD} /empty --json",
    "load, no such part": f"{LOAD} /m.pth --part nothing --json",
    "load, code in a pickle": f"{LOAD} /evil.pth --json",
    "load, dtype": f"{LOAD} /m.safetensors --dtype fp12",
    "load, device": "load --device tpu /m.safetensors",
    "load, threads": f"{LOAD} /m.safetensors --threads 0",
    "load, cache dir alone": f"{LOAD} /m.safetensors --cache-dir /c",
    "profile, missing": "profile /none.safetensors --device cpu --json",
    "profile, nothing": "profile",
    "profile, no directory": "profile /m.safetensors --device cpu -o /none/run.json",
    "bench, missing": "bench /none.safetensors --repeat 1 --device cpu",
    "bench, no such loader": "bench /m.safetensors --loader nobody --repeat 1 --device cpu",
    "bench, repeat": "bench /m.safetensors --repeat 0",
    "compare, missing": "compare /none.json /run.json",
    "compare, garbage": "compare /garbage.json /run.json",
    "compare, metric": "compare @bench.json @bench.json --fail-if median",
    "doctor, missing": "doctor /none.safetensors --device cpu --json",
    "estimate, missing": "estimate /none.safetensors --json",
    "estimate, rate": "estimate /m.safetensors --disk fast",
    "report, missing": "report /none.json",
    "report, garbage": "report /garbage.json --json",
    "report, two pages": "report @session.json @session.json --html /two.html",
    "warm, missing": "warm /none --json",
    "warm, limit unknown": "warm /sharded --limit much",
    "evict, missing": "evict /none --json",
    "stage, missing": "stage /none --to /staged --json",
    "stage, nowhere": "stage /sharded",
    "cache build, missing": "cache build /none.safetensors --cache-dir /cache --json",
    "cache build, dtype": "cache build /m.safetensors --dtype fp12 --cache-dir /cache",
    "cache verify, no such entry": "cache verify ffff --cache-dir /cache --json",
    "cache prune, age": "cache prune --max-age old --cache-dir /cache",
    "cache build, shared memory": "cache build /m.pth --part sd --cache-dir /cache --json",
    "download, name": "download nonsense --to /down2",
    "download, nowhere": "download a/b",
    "run, missing": "run /none.py",
    "run, nothing": "run",
    "version": "--version",
}
PIPELINE = {
    "synth": "synth /wan",
    "synth, diffusers": "synth /wand --layout diffusers --dtype bf16 --seed 1",
    "load": "load --ckpt_dir /wan --device cpu --json --profile-out /start.json",
    "load, diffusers": "load --ckpt-dir /wand --device cpu --dtype fp32 --preset min-memory --json",
    "load, text": "load --ckpt_dir /wan --device cpu",
    "load, cache written": "load --ckpt_dir /wan --device cpu --cache --cache_dir /pc --json",
    "load, cache hit": "load --ckpt_dir /wan --device cpu --cache --cache_dir /pc --json",
    "generate": "generate --ckpt_dir /wan --prompt cats --size 32*32 --frame_num 5 --sample_steps 2 --base_seed 3"
    " --device cpu --save_file /cats.mp4 --json",
    # mistakes
    "no command": "",
    "generate, missing": "generate --ckpt_dir /none --prompt cats",
    "generate, no prompt": "generate --ckpt_dir /wan",
    "generate, task": "generate --ckpt_dir /wan --prompt cats --task ti2v-5B",
    "generate, size": "generate --ckpt_dir /wan --prompt cats --size big",
    "generate, frames": "generate --ckpt_dir /wan --prompt cats --frame_num 6",
    "generate, output there": "generate --ckpt_dir /wan --prompt cats --save_file /cats.mp4",
    "load, missing": "load --ckpt_dir /none --device cpu",
    "load, preset": "load --ckpt_dir /wan --device cpu --preset none",
    "load, dtype": "load --ckpt_dir /wan --device cpu --dtype fp12",
    "load, cache dir alone": "load --ckpt_dir /wan --device cpu --cache_dir /pc",
    "synth, not empty": "synth /wan",
    "synth, layout": "synth /wan3 --layout other",
    "version": "--version",
}
#: `wan-loader` on the checkpoint that `wan-pipeline synth` has made.
MODEL = {
    "inspect, model": "inspect /wan --json",
    "inspect, model, diffusers": "inspect /wand --json",
    "load, model": f"{LOAD} /wan --json",
    "load, expert": f"{LOAD} /wan/high_noise_model --io buffered --threads 2 --dtype bf16 --verify --json",
    "load, vae": f"{LOAD} /wan/Wan2.1_VAE.pth --io buffered --threads 2 --json",
    "warm, model": "warm /wan --limit 2MB --json",
    "estimate, model": "estimate /wan --disk 10MB/s --json",
    "cache list, model": "cache list --cache-dir /pc --json",
}
#: In processes of their own: they replace theirs, start others, or leave it changed.
STARTED = {
    "synth, size": "synth /none --size large",
    "run": "run --quiet /script.py one two",
    "profile, program": "profile --no-ceilings --json -- {python} /script.py one",
    "bench": "bench /m.safetensors --loader ours --cache as-is --repeat 1 --device cpu --json"
    " --export-json /bench.json --export-markdown /bench.md --export-picture /bench.svg",
}
#: Their numbers are functions of what they are given.
PURE = ("estimate", "compare", "report, several")
#: Of these only the types are kept: what they hold depends on the machine.
TYPES = ("bench", "doctor", "profile", "report", "run", "compare, sessions")
#: Their bytes are blocks of the file system.
ON_DISK = ("cache list", "cache prune", "cache clear")
HELP = {
    "wan-loader": "inspect load profile bench compare doctor estimate report warm evict stage download run synth cache",
    "wan-pipeline": "generate load synth",
}
CACHE_HELP = "build list verify prune clear"


def make_files(root):
    """Small checkpoints, good and bad."""
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    tensors = {
        "w": torch.arange(3000, dtype=torch.float32).view(50, 60),
        "b": torch.arange(33).bfloat16(),
        "h": torch.arange(7).half(),
        "n": torch.arange(9),
        "flag": torch.tensor([True, False]),
        "empty": torch.empty(0, 4),
        "scalar": torch.tensor(2.5),
    }
    save_file(tensors, root / "m.safetensors")
    torch.save({"sd": {**tensors, "tied": tensors["w"], "row": tensors["w"][3]}, "step": 7}, root / "m.pth")
    sharded = root / "sharded"
    sharded.mkdir()
    names = {"w": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    for name, file in names.items():
        save_file({name: tensors[name]}, sharded / file)
    index = {"metadata": {"total_size": 12066}, "weight_map": names}
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    _make_bad_files(root)
    (root / "script.py").write_text("import sys\nprint('script', *sys.argv[1:])\nsys.exit(7)\n")


def _make_bad_files(root):
    good = (root / "m.safetensors").read_bytes()
    entry = '"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    (root / "truncated.safetensors").write_bytes(good[:-1])
    (root / "garbage.safetensors").write_bytes(b"\xff" * 100)
    (root / "garbage.json").write_text("[1, 2")
    (root / "huge.safetensors").write_bytes(struct.pack("<Q", 1 << 40) + b"{}")
    overlap = '"v":{"dtype":"F32","shape":[1],"data_offsets":[2,6]}'
    for name, header in (("twice", f"{{{entry},{entry}}}"), ("overlap", f"{{{entry},{overlap}}}")):
        (root / f"{name}.safetensors").write_bytes(struct.pack("<Q", len(header)) + header.encode() + bytes(6))
    for name in ("empty", "outside", "incomplete", "incomplete/high_noise_model"):
        (root / name).mkdir()
    index = {"weight_map": {"w": "../m.safetensors"}}
    (root / "outside/model.safetensors.index.json").write_text(json.dumps(index))
    (root / "incomplete/high_noise_model/config.json").write_text("{}")
    (root / "incomplete/high_noise_model/diffusion_pytorch_model.safetensors").write_bytes(good)

    import torch

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(root / "executed"),)

    torch.save({"w": Evil()}, root / "evil.pth")


@contextlib.contextmanager
def small_hub():
    """A server with one repository in the native layout, a/b, as the hub would show it; gives its address."""
    experts = [f"{name}_noise_model" for name in ("high", "low")]
    names = ["models_t5_umt5-xxl-enc-bf16.pth", "Wan2.1_VAE.pth", "google/umt5-xxl/tokenizer.json", "README.md"]
    names += ["google/umt5-xxl/tokenizer_config.json"]
    names += [f"{e}/{n}" for e in experts for n in ("config.json", "diffusion_pytorch_model.safetensors")]
    files = {name: f"{name}\n".encode() for name in names}
    blobs = {n: hashlib.sha1(b"blob %d\0" % len(c) + c).hexdigest() for n, c in files.items()}
    siblings = [{"rfilename": n, "size": len(c), "blobId": blobs[n]} for n, c in files.items()]
    listing = {"id": "a/b", "modelId": "a/b", "sha": "c0ffee" + "0" * 34, "siblings": siblings}

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_GET(self):
            path = self.path.partition("?")[0]
            content = json.dumps(listing).encode() if path.startswith("/api/models/a/b") else None
            if path.startswith("/a/b/resolve/"):
                content = files.get(path.split("/", 5)[5])
            self.send_response(404 if content is None else 200)
            headers = {"Content-Length": str(len(content or b"")), "X-Repo-Commit": listing["sha"]}
            headers |= {"X-Error-Code": "RepoNotFound"} if content is None else {}
            for header in headers.items():
                self.send_header(*header)
            self.end_headers()
            self.wfile.write(content or b"")

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def entry_point(program):
    """The function that a program starts with."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    module, _, name = project["project"]["scripts"][program].partition(":")
    return getattr(importlib.import_module(module), name)


@contextlib.contextmanager
def surroundings(root, **environment):
    """No GPU, no caches but those below `root`, a wide terminal; Ctrl-C stays what it was."""
    home = root / "home"
    home.mkdir(exist_ok=True)
    changes = {"HOME": str(home), "XDG_CACHE_HOME": str(home / "cache"), "HF_HOME": str(home / "hf")}
    changes |= {"CUDA_VISIBLE_DEVICES": "", "COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1", **environment}
    changes |= {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    before = signal.signal(signal.SIGINT, lambda *_: sys.exit(130))  # ours is not to be replaced
    try:
        # a sample of each ceiling has the form of three
        with mock.patch.dict(os.environ, changes), mock.patch("wan_loader.profiler.probe.ceilings._SAMPLES", 1):
            for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "FORCE_COLOR", "HF_TOKEN", "HF_HUB_CACHE"):
                os.environ.pop(name, None)
            yield
    finally:
        signal.signal(signal.SIGINT, before)


def words_of(command, root):
    """The words of a command, with paths for those that stand for one."""
    words = command.replace("{python}", sys.executable).split()
    bases = {"/": root, "@": WRITTEN}
    return [str(bases[w[0]] / w[1:]) if w[0] in bases and w != sys.executable else w for w in words]


def run_here(program, words):
    """A command in this process: exit code, stdout, stderr."""
    out, err = io.StringIO(), io.StringIO()
    main, code = entry_point(program), 0
    with (
        mock.patch.multiple(sys, argv=[program, *words], stdin=io.StringIO()),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
    return code, out.getvalue(), err.getvalue()


def run_started(program, words):
    """A command in a process of its own."""
    module = {"wan-loader": "wan_loader", "wan-pipeline": "wan_pipeline"}[program]
    command = [sys.executable, "-m", module, *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False, stdin=subprocess.DEVNULL)
    return done.returncode, done.stdout, done.stderr


def recorded(case, done, root):
    """What is kept of a command's output."""
    code, out, err = done
    places = {root: "<place>", WRITTEN: "<written>", ROOT: "<project>"}
    found = {"exit_code": code, "stdout": "text" if out else "", "stderr": stderr_kind(err, root)}
    try:
        document = json.loads(out)
    except ValueError:
        return found
    if case.startswith(TYPES) and case not in PURE:
        found["stdout"] = types_of(document)
    else:
        found["stdout"] = normalised(document, places, pure=case.startswith(PURE))
    if case.removeprefix("wan-loader ").startswith(ON_DISK):
        for entry in [found["stdout"], *found["stdout"].get("entries", ())]:
            entry.pop("nbytes", None)
    return found


def stderr_kind(text, root):
    """Errors and mistakes of usage; progress and warnings may be there or not."""
    if "Traceback" in text:
        return "traceback"
    if text.startswith("error: "):
        return "error that names a file" if str(root) in text else "error"
    return "usage" if "Usage: " in text else "other"


def tree(path):
    """Files below a directory, with their sizes; hidden ones, too."""
    return {str(p.relative_to(path)): p.stat().st_size for p in sorted(path.rglob("*")) if p.is_file()}


def capture(program, cases, root, run=run_here):
    """What is kept of each case, by its name."""
    return {case: recorded(case, run(program, words_of(command, root)), root) for case, command in cases.items()}


def capture_loader(root):
    """All commands of `wan-loader` that run in this process, and the files that they write."""
    make_files(root)
    with small_hub() as address, surroundings(root, HF_ENDPOINT=address):
        hub = {name: LOADER[name] for name in ("download, dry run", "download")}
        rest = {name: command for name, command in LOADER.items() if name not in hub}
        found = capture("wan-loader", rest, root) | capture("wan-loader", hub, root, run_started)
    trace = json.loads((root / "trace.json").read_text())
    found["files"] = {
        "downloaded": sorted(tree(root / "down")),
        "trace": sorted(trace),
        "trace events": types_of([{k: v for k, v in e.items() if k != "args"} for e in trace["traceEvents"]]),
        "pages": [(root / name).read_text()[:15].lower() for name in ("run.html", "run2.html")],
        "executed": (root / "executed").exists(),
        "staged": sorted(tree(root / "staged")) if (root / "staged").exists() else [],
    }
    return found


def capture_pipeline(root):
    """All commands of `wan-pipeline`, and the files that they write."""
    with surroundings(root):
        found = capture("wan-pipeline", PIPELINE, root)
        found |= {f"wan-loader {name}": done for name, done in capture("wan-loader", MODEL, root).items()}
        build = {"wan-loader cache build, model": "cache build /wan --cache-dir /pc2 --json"}
        found |= capture("wan-loader", build, root, run_started)
    found["files"] = {"native": tree(root / "wan"), "diffusers": tree(root / "wand")}
    found["files"]["video"] = (root / "cats.mp4").stat().st_size > 0
    found["files"]["profile-out"] = types_of(json.loads((root / "start.json").read_text()))
    return found


def capture_started(root):
    """Commands in processes of their own."""
    make_files(root)
    with surroundings(root):
        found = capture("wan-loader", STARTED, root, run_started)
    found["files"] = {
        "bench": types_of(json.loads((root / "bench.json").read_text())),
        "exports": [(root / name).stat().st_size > 0 for name in ("bench.md", "bench.svg")],
    }
    return found


def capture_interface(root):
    """Flags of every command; public names of both packages with their parameters; classes of errors."""
    import wan_loader
    import wan_pipeline

    make_files(root)
    found = {"flags": {}, "wan_loader": interface(wan_loader), "wan_pipeline": interface(wan_pipeline)}
    with surroundings(root):
        pages = [(program, [name]) for program, names in HELP.items() for name in ["", *names.split()]]
        pages += [("wan-loader", ["cache", name]) for name in CACHE_HELP.split()]
        for program, names in pages:
            run = run_started if (program, names) == ("wan-loader", ["synth"]) else run_here
            words = [name for name in names if name]
            code, out, _ = run(program, [*words, "--help"])
            assert code == 0
            found["flags"][" ".join([program, *words])] = flags(out)
        found["errors"] = {name: raised(wan_loader, root / name) for name in BAD_FILES}
    return found


BAD_FILES = ("none.safetensors", "garbage.safetensors", "truncated.safetensors", "huge.safetensors")
BAD_FILES += ("twice.safetensors", "overlap.safetensors", "outside/model.safetensors.index.json", "empty", "evil.pth")


def raised(wan_loader, path):
    """The classes by which an error of a load can be caught."""
    try:
        wan_loader.load_file(path)
    except Exception as error:
        public = [c.__name__ for c in type(error).__mro__ if c.__name__ in wan_loader.__all__]
        return public + [c.__name__ for c in type(error).__mro__ if c.__module__ == "builtins"]
    return None


CAPTURES = {
    "loader": capture_loader,
    "pipeline": capture_pipeline,
    "started": capture_started,
    "interface": capture_interface,
}
