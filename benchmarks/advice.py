"""What the advice of `wan-loader profile` promises, and what comes of it when it is followed to the letter.

    python benchmarks/advice.py /tmp/advice --output benchmarks/results/MACHINE/advice.json

Writes five programs that start slowly, each for another reason, and what they read. Each is profiled, and what its
advice says is done as it stands there: lines to type are typed, lines of the program are replaced. Each piece is
followed alone, and all of them together. The program under the profiler, the plain program, and these ways take turns;
files are read into the page cache before each, as the host takes memory back. What all of them
print must be the same. A promise is the share of the profiled time that is to be saved, of the plain program's time.

Programs whose advice starts a stand-by server have it, in a directory of the benchmark's own, and the first start from
it is not counted: it learns there.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from turns import describe_run

_DATA = """
import sys
import torch
from safetensors.torch import save_file
n, width = int(sys.argv[1]), int(sys.argv[2])
values = torch.randn(width * width)
weights = {f"layers.{i}.weight": (values * (i + 1)).reshape(width, width) for i in range(n)}
torch.save(weights, "weights.pth")
save_file(weights, "weights.safetensors")
save_file({"bias": torch.ones(1 << 20)}, "small.safetensors")
from diffusers import WanTransformer3DModel
shape = dict(attention_head_dim=128, num_attention_heads=max(1, width // 256), text_dim=width, ffn_dim=2 * width)
WanTransformer3DModel(**shape, num_layers=max(1, n // 4)).save_pretrained("transformer")
"""
#: Each with what its name says, at the start.
PROGRAMS = {
    "from_pretrained": """
import torch
from diffusers import WanTransformer3DModel
model = WanTransformer3DModel.from_pretrained("transformer", torch_dtype=torch.bfloat16)
print(sum(float(p.detach().sum()) for p in model.parameters()))
""",
    "random_init": """
import torch
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(N))
net = Net()
net.load_state_dict(torch.load("weights.pth"))
print(sum(float(p.detach().sum()) for p in net.parameters()))
""",
    "fp32_to_bf16": """
import torch
from safetensors.torch import load_file
weights = load_file("weights.safetensors")
weights = {name: tensor.to(torch.bfloat16) for name, tensor in weights.items()}
print(sum(float(t.sum()) for t in weights.values()))
""",
    "imports": """
import torch
from diffusers import WanPipeline
from transformers import UMT5EncoderModel
from safetensors.torch import load_file
print(sum(float(t.sum()) for t in load_file("small.safetensors").values()))
""",
    "several_processes": """
import torch
import torch.multiprocessing
def work(rank):
    weights = torch.load("weights.pth")
    with open(f"{rank}.txt", "w") as file:
        print(sum(float(t.sum()) for t in weights.values()), file=file)
if __name__ == "__main__":
    torch.multiprocessing.spawn(work, nprocs=2)
    print(open("0.txt").read(), open("1.txt").read())
""",
}
_SCRIPT = "start.py"


class Home:
    """A directory with a program and its data, and an environment in which nothing else stands by."""

    def __init__(self, directory: Path, source: str) -> None:
        self.directory, self.source = directory, source
        self.private = Path(tempfile.mkdtemp(prefix="advice-"))
        self.environ = os.environ | {
            "XDG_RUNTIME_DIR": str(self.private / "run"),
            "XDG_CACHE_HOME": str(self.private / "cache"),
            "PYTHONWARNINGS": "ignore",
            "HF_HUB_OFFLINE": "1",
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        }
        self.environ.pop("WAN_LOADER_STANDBY", None)
        (self.private / "run").mkdir(mode=0o700)

    def type(self, line: str, *, standby: bool = True) -> tuple[float, str]:
        """Type a line; return the seconds it took, and what it printed."""
        environ = self.environ if standby else self.environ | {"WAN_LOADER_STANDBY": "0"}
        start = time.perf_counter()
        done = subprocess.run(
            shlex.split(line), cwd=self.directory, env=environ, capture_output=True, text=True, check=False
        )
        seconds = time.perf_counter() - start
        if done.returncode:
            sys.exit(f"{line}: exit code {done.returncode}\n{done.stdout}\n{done.stderr}")
        return seconds, done.stdout

    def write(self, edits: list[dict[str, Any]]) -> None:
        """Write the program, with lines of it replaced, the last ones first."""
        rows = self.source.splitlines()
        for edit in sorted(edits, key=lambda edit: -edit["line"]):
            at, height = edit["line"] - 1, len(edit["text"].splitlines())
            assert rows[at : at + height] == edit["text"].splitlines(), f"not the program's line: {edit}"
            rows[at : at + height] = edit["replacement"].splitlines()
        (self.directory / _SCRIPT).write_text("\n".join(rows) + "\n")

    def warm(self) -> None:
        """Read all weights."""
        for path in [*self.directory.glob("*.pth"), *self.directory.rglob("*.safetensors")]:
            with path.open("rb", buffering=0) as file:
                while file.read(1 << 24):
                    pass

    def close(self) -> None:
        """End what stands by, and take away what is private."""
        self.type("wan-loader standby stop")
        shutil.rmtree(self.private, ignore_errors=True)


def profiled(home: Home) -> tuple[dict[str, Any], str]:
    """Profile the program; return the session, and what the program printed."""
    home.write([])
    _, printed = home.type(f"wan-loader profile --force -o run.json -- python {_SCRIPT}", standby=False)
    return json.loads((home.directory / "run.json").read_text()), printed


def followed(home: Home, advice: list[dict[str, Any]]) -> tuple[float, str]:
    """Run the program as pieces of advice say; what is typed once was typed."""
    home.write([edit for piece in advice for edit in piece["edits"]])
    commands = [piece["command"] for piece in advice if piece["command"]]
    return home.type(
        max(commands, key=len, default=f"python {_SCRIPT}"), standby=any(p["rule"] == "stand-by" for p in advice)
    )


def prepare(home: Home, advice: list[dict[str, Any]]) -> None:
    """Type what is to be typed once, and start twice: copies are written, and stand-by learns and is ready again."""
    for line in dict.fromkeys(line for piece in advice for line in piece["once"]):
        home.type(line)
    for _ in range(2):
        followed(home, advice)
        for _ in range(60 if any(piece["rule"] == "stand-by" for piece in advice) else 0):
            time.sleep(1)
            if "ready" in home.type("wan-loader standby status")[1]:
                break


def measure(home: Home, samples: int) -> dict[str, Any]:
    """Profile, follow, and compare."""
    home.warm()
    session, _ = profiled(home)
    home.warm()
    session, expected = profiled(home)
    ways = {piece["rule"]: [piece] for piece in session["advice"]} | {"together": session["advice"]}
    for advice in ways.values():
        home.warm()
        prepare(home, advice)
    rows: dict[str, list[float]] = {way: [] for way in ("profiled", "plain", *ways)}
    promises: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(samples):
        for way in rows if turn % 2 else reversed(rows):
            home.warm()
            if way == "profiled":
                again, printed = profiled(home)
                rows[way].append(again["seconds"])
                gains = {piece["rule"]: piece["gain_s"] for piece in again["advice"]}
                gains["together"] = again["together"]["gain_s"]
                for rule, shares in promises.items():
                    shares.append(gains.get(rule, 0.0) / again["seconds"])
            else:
                seconds, printed = followed(home, ways.get(way, []))
                rows[way].append(seconds)
            if printed != expected:
                print(f"  {way} prints {printed.strip()} for {expected.strip()}", flush=True)
    return {
        "advice": [
            {k: piece[k] for k in ("rule", "gain_s", "beside_s", "once", "command", "edits")}
            for piece in ways["together"]
        ],
        "seconds": rows,
        "promised_shares": promises,
        "outcome": {way: outcome(rows["plain"], rows[way], promises[way]) for way in promises},
    }


def outcome(plain: list[float], after: list[float], shares: list[float]) -> dict[str, float]:
    """Compare what was promised with what came, by medians."""
    before_s, after_s = statistics.median(plain), statistics.median(after)
    promised_s, came_s = statistics.median(shares) * before_s, before_s - after_s
    return {
        "before_s": before_s,
        "after_s": after_s,
        "promised_s": promised_s,
        "came_s": came_s,
        "off": (promised_s - came_s) / came_s if came_s else 0.0,
        "unsteady_s": max(plain) - min(plain),
    }


def make(directory: Path, n: int, width: int) -> None:
    """Make what the programs read, unless it is there."""
    directory.mkdir(parents=True, exist_ok=True)
    if not (directory / "transformer").exists():
        subprocess.run([sys.executable, "-c", _DATA, str(n), str(width)], cwd=directory, check=True)


def main() -> None:
    """Measure all programs, and print a line for each way of following their advice."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="where the programs and their data are, or are made")
    parser.add_argument("--tensors", type=int, default=16, help="of each checkpoint (default: 16)")
    parser.add_argument("--width", type=int, default=4096, help="of each tensor (default: 4096: 67 MB)")
    parser.add_argument("--samples", type=int, default=3, help="of each way (default: 3)")
    parser.add_argument("--only", choices=PROGRAMS, action="append", help="this program (again for more)")
    parser.add_argument("--output", type=Path, help="all samples, as JSON; other programs' stay in it")
    args = parser.parse_args()
    make(args.directory, args.tensors, args.width)
    results = {}
    columns = ("before", "after", "promised", "came", "off")
    print(f"{'program':18s} {'followed':12s}" + "".join(f"{name:>11s}" for name in columns))
    for name in args.only or PROGRAMS:
        source = PROGRAMS[name].strip().replace("WIDTH", str(args.width)).replace("N)", f"{args.tensors})")
        home = Home(args.directory, source)
        try:
            results[name] = measure(home, args.samples)
        finally:
            home.close()
        for way, row in results[name]["outcome"].items():
            print(
                f"{name:18s} {way:12s}"
                + "".join(f"{row[key]:9.2f} s" for key in ("before_s", "after_s", "promised_s", "came_s"))
                + f"{row['off']:11.0%}"
                # what is promised and what came differ by less than the plain program from itself
                + (" (not to be told)" if abs(row["promised_s"] - row["came_s"]) < row["unsteady_s"] else ""),
                flush=True,
            )
        if args.output is not None:
            before = json.loads(args.output.read_text())["programs"] if args.output.exists() else {}
            args.output.write_text(json.dumps(describe_run() | {"programs": before | results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
