"""The benchmark of what a recording costs: its arithmetic, and that it runs."""

import contextlib
import importlib
import json

import pytest
from programs import ROOT, TORCH


@pytest.fixture
def overhead(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("overhead")


def test_the_bound_is_above_the_mean_as_far_as_samples_scatter(overhead):
    assert overhead.bound([1.02] * 15) == pytest.approx((1.02, 1.02))
    close, wide = overhead.bound([1.01, 1.03] * 8), overhead.bound([0.92, 1.12] * 8)
    assert close[0] == pytest.approx(1.02, abs=0.001)
    assert 1.02 < close[1] < 1.03 < 1.05 < wide[1] < 1.12


def test_pairs_are_compared_and_not_medians(overhead):
    pairs = [(overhead.Cost(s, s / 2, 0.0), overhead.Cost(s * 1.1, s / 2, 0.1)) for s in (3.0, 5.0, 9.0)]
    assert overhead.compare(pairs, "seconds")["ratio"] == pytest.approx(1.1)
    assert overhead.compare(pairs, "cpu_s") == {"plain_s": 2.5, "recorded_s": 2.5, "ratio": 1.0, "upper_bound": 1.0}


def test_it_runs_and_counts_all_that_a_recording_takes(overhead, monkeypatch, tmp_path, benchmark_main, capfd):
    burn = "import time\nuntil = time.process_time() + 0.1\nwhile time.process_time() < until: pass"
    monkeypatch.setattr(overhead, "_START", burn)
    output = tmp_path / "overhead.json"
    with contextlib.suppress(SystemExit):  # of a start this short, the recording is a larger share
        benchmark_main("overhead", "--pairs", "2", "--size", "tiny", "--output", output, modules=TORCH)
    document = json.loads(output.read_text())
    assert len(document["pairs"]) == 2
    for pair in document["pairs"]:
        assert pair["recorded"]["cpu_s"] > 0.1
        assert pair["recorded"]["watching_s"] > pair["plain"]["watching_s"]
    assert document["cpu"]["upper_bound"] >= document["cpu"]["ratio"]
    assert "below" in capfd.readouterr().out
