"""The benchmarks of streamed blocks run, tiny, and find equal latents."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("diffusers")


def test_it_runs_tiny_on_the_cpu(tmp_path):
    script = Path(__file__).parents[2] / "benchmarks/stream_blocks.py"
    words = ["--size", "tiny", "--blocks", "4", "--frames", "5", "--steps", "1", "--device", "cpu"]
    subprocess.run([sys.executable, script, tmp_path, *words, "--output", tmp_path / "out.json"], check=True)
    (sample,) = json.loads((tmp_path / "out.json").read_text())["samples"]
    assert sample["equal"]
    assert "stream 4 of 4 blocks" in sample["streamed"]["report"]


def test_all_ways_run_tiny_on_the_cpu_and_agree(tmp_path):
    pytest.importorskip("accelerate")
    script = Path(__file__).parents[2] / "benchmarks/stream_offload.py"
    words = ["--size", "tiny", "--blocks", "4", "--frames", "5", "--steps", "1", "--device", "cpu"]
    words += ["--host-memory", "20kB", "--way", "streamed from disk", "--way", "group, by block", "--way", "sequential"]
    subprocess.run([sys.executable, script, tmp_path, *words, "--output", tmp_path / "out.json"], check=True)
    (sample,) = json.loads((tmp_path / "out.json").read_text())["samples"]
    assert len(sample["ways"]) == 4
    assert len({one["latents"] for one in sample["ways"].values()}) == 1
    assert "4 blocks)" in sample["ways"]["streamed from disk"]["report"]
