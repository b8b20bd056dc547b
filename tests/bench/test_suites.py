"""The benchmark suites run, tiny and untimed, so that they cannot rot."""

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
