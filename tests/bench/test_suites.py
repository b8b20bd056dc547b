"""The benchmark suites run, tiny and untimed, so that they cannot rot."""

import json

import pytest
from programs import PIPELINE, ROOT, TORCH, run

BENCHMARKS = ROOT / "benchmarks"


@pytest.mark.parametrize("suite", ["test_stages.py", "test_loads.py"])
def test_suite_runs(suite):
    pytest.importorskip("pytest_benchmark")
    words = ["-m", "pytest", "--benchmark-disable", "-q", "-p", "no:cacheprovider", BENCHMARKS / suite]
    words += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # of modules that are imported before pytest begins
    done = run(*words, timeout=110, cwd=BENCHMARKS.parent, modules=PIPELINE)
    assert done.returncode == 0, done.stdout[-3000:]


def test_turns_of_one_checkout_with_itself(tmp_path, benchmark_main, capfd):
    words = [tmp_path / "data", ROOT, ROOT, "--pairs", "1", "--device", "cpu", "--size", "tiny"]
    words += ["--case", "fp32 to bf16", "--output", tmp_path / "turns.json"]
    benchmark_main("turns", *words, modules=TORCH)
    assert "after/before" in capfd.readouterr().out
    ((before,), (after,)) = json.loads((tmp_path / "turns.json").read_text())["turns"]["fp32 to bf16"].values()
    assert before["seconds"] > 0
    assert before["equal"] is after["equal"] is True
