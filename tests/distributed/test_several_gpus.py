"""The benchmark of several GPUs runs, tiny and on the CPU, so that it cannot rot."""

import json

import pytest
from programs import PIPELINE

pytest.importorskip("diffusers")


def test_benchmark_runs(tmp_path, benchmark_main):
    words = [tmp_path, "--size", "tiny", "--device", "cpu", "--repeat", "1", "--no-cold"]
    words += ["--only", "divided, usual", "--only", "replicated, wan-loader"]
    words += ["--dtype", "float16", "--output", tmp_path / "out.json"]
    benchmark_main("several_gpus", *words, modules=PIPELINE)
    cases = json.loads((tmp_path / "out.json").read_text())["cases"]
    assert [case["case"] for case in cases] == ["divided, usual, warm", "replicated, wan-loader, warm"]
    for case in cases:
        for sample in case["samples"]:
            assert "error" not in sample, sample
            assert all(rank["verified"] for rank in sample["ranks"])
    read = sum(rank["report"]["settings"]["nbytes_read"] for rank in cases[1]["samples"][0]["ranks"])
    assert read == pytest.approx(json.loads((tmp_path / "out.json").read_text())["nbytes"], rel=0.05)
