"""The benchmark suites run, tiny and untimed, so that they cannot rot."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"


@pytest.mark.parametrize("suite", ["test_stages.py", "test_loads.py"])
def test_suite_runs(suite):
    pytest.importorskip("pytest_benchmark")
    words = [sys.executable, "-m", "pytest", "--benchmark-disable", "-q", "-p", "no:cacheprovider", BENCHMARKS / suite]
    done = subprocess.run(
        [str(w) for w in words], capture_output=True, text=True, timeout=110, check=False, cwd=BENCHMARKS.parent
    )
    assert done.returncode == 0, done.stdout[-3000:]


def test_turns_of_one_checkout_with_itself(tmp_path):
    root = BENCHMARKS.parent
    words = [
        tmp_path / "data",
        root,
        root,
        "--pairs",
        "1",
        "--device",
        "cpu",
        "--size",
        "tiny",
        "--case",
        "fp32 to bf16",
    ]
    words += ["--output", tmp_path / "turns.json"]
    command = [sys.executable, BENCHMARKS / "turns.py", *words]
    done = subprocess.run([str(w) for w in command], capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stderr
    assert "after/before" in done.stdout
    ((before,), (after,)) = json.loads((tmp_path / "turns.json").read_text())["turns"]["fp32 to bf16"].values()
    assert before["seconds"] > 0
    assert before["equal"] is after["equal"] is True
