"""What commands print, on terminals of 80, 100 and 120 columns: no line is longer, and no word is broken."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from once import made_once
from rich.cells import cell_len
from safetensors.torch import save_file

import wan_loader
from wan_loader.cli import bench, render
from wan_loader.cli.app import main
from wan_loader.keeper import client
from wan_loader.profiler.analysis.ranks import RankComparison, RankSummary
from wan_loader.profiler.probe import ceilings, measure

WIDTHS = [80, 100, 120]
NAME = "diffusion_pytorch_model-of-the-high-noise-expert-00001-of-00006.safetensors"
RUN = {
    "schema_version": 1,
    "command": "generate",
    "target": "a/rather/long/path/to/a/checkpoint/of/the/model/Wan2.2-T2V-A14B/with/more/directories/below/it",
    "device": "cuda:0",
    "dtype": "bfloat16",
    "seconds": 20.0,
    "nbytes_file": 5 * 10**9,
    "phases": [{"name": "read", "busy_s": 2.0, "nbytes": 5 * 10**9, "gbps": 2.5}],
    "bottleneck": {"phase": "read", "why": "reading the files set the pace for 2.00 s of 6.00 s (33%), " * 3},
    "warnings": [],
    "pipeline": {
        "time_to_first_step_s": 6.5,
        "stages": [{"name": "encode", "start_s": 1.0, "seconds": 2.0}],
        "waits": [{"name": "a_network_with_a_very_long_name_" * 2, "start_s": 3.0, "seconds": 3.5}],
        "loads": [{"name": "transformer", "start_s": 0.5, "seconds": 6.0, "nbytes": 5 * 10**9}],
        "steps_s": [8.0, 9.5],
    },
}
KEPT = {
    "key": "0123456789abcdef",
    "nbytes": 28 * 10**9,
    "dtype": "bfloat16",
    "n_users": 2,
    "idle_s": 4000.0,
    "state": "kept",
    "device": "cuda:0",
    "label": f"/data/models/Wan2.2-T2V-A14B/high_noise_model/{NAME}",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with a checkpoint, its cache entry, and what profile and bench have saved of it."""
    made, _ = made_once(tmp_path_factory, "place-of-widths", make_place)
    return shutil.copytree(made, tmp_path_factory.mktemp("place-with-a-long-name"), dirs_exist_ok=True)


def make_place(place):
    tensors = {f"blocks.{i}.self_attn.some_projection.weight": torch.ones(40, 50) for i in range(3)}
    save_file(tensors, place / NAME)
    (place / "run.json").write_text(json.dumps(RUN))
    environment = os.environ | {"XDG_CACHE_HOME": str(place / "xdg"), "OMP_NUM_THREADS": "1"}

    def cli(*words):
        words = [sys.executable, "-m", "wan_loader", *map(str, words)]
        return subprocess.run(words, cwd=place, env=environment, check=True, capture_output=True, text=True)

    program = (
        f"import subprocess, sys\nfor i in range(2):\n  subprocess.run([sys.executable, '-c', 'import json', {NAME!r}])"
    )
    (place / "a_program_that_starts_others.py").write_text(program)
    words = [
        sys.executable,
        "a_program_that_starts_others.py",
        *(f"--an-option-with-a-long-name-{i}=1" for i in range(9)),
    ]
    cli("profile", "--no-ceilings", "-o", "family.json", "--", *words)
    cli("profile", "--no-ceilings", "-o", "load.json", "--dtype", "bf16", NAME)
    cli("bench", NAME, "--repeat", 1, "--loader", "safetensors", "--loader", "torch", "--export-json", "bench.json")
    cli("cache", "build", NAME, "--cache-dir", "cache")


@pytest.fixture
def printed(place, monkeypatch, printed):
    """What an action prints on stdout at some width, in the place."""
    monkeypatch.chdir(place)
    monkeypatch.setenv("XDG_CACHE_HOME", str(place / "xdg"))
    monkeypatch.setattr(ceilings, "_SAMPLES", 1)
    monkeypatch.setattr(measure, "measure_start", lambda: {"import_torch_s": 1.0, "start_s": 1.5})  # takes seconds
    return printed


def words_of(text):
    """Words that are whole: what stands beside an ellipsis is not."""
    return set(re.findall(r"(?<![\w…])[^\W\d_]{2,}(?![\w…])", text))


def check(printed, action):
    wide = printed(action, 1000)
    assert wide
    for width in WIDTHS:
        text = printed(action, width)
        for line in text.splitlines():
            # code that advice gives is no longer code when it is folded
            assert cell_len(line) <= width or line.startswith("     wan_loader."), line
            assert line == line.rstrip(), "nothing but spaces at the end"
        said = re.sub(r"^no room for: .*$", "", text, flags=re.M)
        # a piece of a path that has lost its middle is told by the ellipsis in it
        whole = " ".join(word for word in said.split() if "…" not in word)
        assert words_of(whole) <= words_of(wide), f"{width} columns"


COMMANDS = [
    ["inspect", NAME],
    ["inspect", NAME, "--tensors"],
    ["report", "family.json"],
    ["report", "load.json"],
    ["report", "run.json"],
    ["compare", "bench.json", "bench.json"],
    ["cache", "list", "--cache-dir", "cache"],
    ["doctor", NAME],
    ["estimate", NAME, "--disk", "hdd", "--disk", "150MB/s"],
    ["evict", NAME],
    ["warm", NAME],
]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_commands(printed, call_main, command):
    if command[0] == "doctor":
        call_main(main, *command)  # it says what was measured just now
    check(printed, lambda: call_main(main, *command))


def test_load(printed):
    report = wan_loader.load(NAME, dtype="bf16", observer=wan_loader.Recorder()).report
    check(printed, lambda: render.print_load(report))


def test_ranks(printed):
    ranks = tuple(RankSummary(i, 100.0 + i, 28 * 10**9, 10**9, 50.0 + 30 * i, 1.0, 6 * 10**10, 10**9) for i in range(3))
    found = RankComparison(RUN["target"], 4, ranks)
    check(printed, lambda: render.print_ranks(render.output_console(), found))


def test_bench(printed, place):
    document = json.loads((place / "bench.json").read_text())
    check(printed, lambda: bench._print_tables(document))


def test_keep_status(printed, call_main, monkeypatch):
    found = {"pid": 1, "items": [KEPT, KEPT | {"key": "fedcba9876543210"}], "limits": {"cuda:0": 6 * 10**10}}
    monkeypatch.setattr(client, "status", lambda: found)
    check(printed, lambda: call_main(main, "standby", "keep", "status"))


HELP = [[], ["inspect"], ["load"], ["bench"], ["compare"], ["doctor"], ["estimate"], ["report"], ["profile"], ["stage"]]
HELP += [
    ["run"],
    ["cache"],
    ["cache", "build"],
    ["cache", "verify"],
    ["standby"],
    ["standby", "start"],
    ["warm"],
    ["evict"],
]
HELP += [["standby", "keep"], ["standby", "keep", "drop"]]


@pytest.mark.parametrize("command", HELP, ids=" ".join)
def test_help(printed, call_main, command):
    def action():
        call_main(main, *command, "--help")

    wide = set(re.findall(r"[\w-]+", printed(action, 400)))
    for width in WIDTHS:
        text = printed(action, width)
        assert all(cell_len(line) <= width for line in text.splitlines())
        assert "…" not in text
        assert set(re.findall(r"[\w-]+", text)) <= wide, f"{width} columns"
