"""The benchmark of the pipeline on several GPUs runs, tiny and on the CPU, so that it cannot rot."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

ROOT = Path(__file__).parents[2]


def run(directory, *words):
    """(table and findings, document) of a run."""
    command = [sys.executable, ROOT / "benchmarks" / "parallel_pipeline.py", directory, "--size", "tiny"]
    command += ["--device", "cpu", "--output", directory / "out.json", *words]
    env = os.environ | {
        "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}",
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
    }
    done = subprocess.run([str(word) for word in command], env=env, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads((directory / "out.json").read_text())


def test_compares_with_the_video_of_one_process(tmp_path):
    output, document = run(tmp_path, "--only", "fp32", "fp32 ulysses+fsdp")
    assert not any("error" in case for case in document["cases"]), document["cases"]
    assert [len(case["processes"]) for case in document["cases"]] == [1, 2]
    assert all(calls > 0 for case in document["cases"] for p in case["processes"] for calls in p["calls"].values())
    assert output.count(" 1.00 x |") == 2  # every byte read once
    videos = document["videos"]
    assert videos["fp32 ulysses+fsdp"]["std_levels"] > 1
    assert not videos["fp32 exchanged blocks"]["yardsticks"]["fp32 other attention"]["within"]
    assert videos["fp32 ulysses+fsdp"]["latents"] < videos["fp32 exchanged blocks"]["latents"] / 20


def test_a_process_that_does_not_end_is_reported(tmp_path):
    output, document = run(tmp_path, "--only", "one", "--timeout", "0.2")
    assert document["cases"][0]["error"].startswith("no end after 0.2 s")
    assert "no end after 0.2 s" in output
