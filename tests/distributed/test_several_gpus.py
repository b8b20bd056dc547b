"""The benchmark of several GPUs runs, tiny and on the CPU, so that it cannot rot."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("diffusers")

ROOT = Path(__file__).parents[2]


def test_benchmark_runs(tmp_path):
    words = [tmp_path, "--size", "tiny", "--device", "cpu", "--repeat", "1", "--no-cold"]
    words += ["--only", "divided, usual", "--only", "replicated, wan-loader"]
    words += ["--dtype", "float16", "--output", tmp_path / "out.json"]
    env = os.environ | {
        "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}",
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
    }
    script = ROOT / "benchmarks" / "several_gpus.py"
    done = subprocess.run(
        [sys.executable, script, *map(str, words)], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    cases = json.loads((tmp_path / "out.json").read_text())["cases"]
    assert [case["case"] for case in cases] == ["divided, usual, warm", "replicated, wan-loader, warm"]
    for case in cases:
        for sample in case["samples"]:
            assert "error" not in sample, sample
            assert all(rank["verified"] for rank in sample["ranks"])
    read = sum(rank["report"]["settings"]["nbytes_read"] for rank in cases[1]["samples"][0]["ranks"])
    assert read == pytest.approx(json.loads((tmp_path / "out.json").read_text())["nbytes"], rel=0.05)
