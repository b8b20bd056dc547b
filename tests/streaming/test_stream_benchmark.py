"""The benchmarks of streamed blocks run, tiny, and find equal latents."""

import json

import pytest
from programs import PIPELINE

pytest.importorskip("diffusers", "0.35", reason="this diffusers is older than what the pipeline needs")

TINY = ("--size", "tiny", "--blocks", "4", "--frames", "5", "--steps", "1", "--device", "cpu")


def test_it_runs_tiny_on_the_cpu(tmp_path, benchmark_main):
    benchmark_main("stream_blocks", tmp_path, *TINY, "--output", tmp_path / "out.json", modules=PIPELINE)
    (sample,) = json.loads((tmp_path / "out.json").read_text())["samples"]
    assert sample["equal"]
    assert "stream 4 of 4 blocks" in sample["streamed"]["report"]


def test_all_ways_run_tiny_on_the_cpu_and_agree(tmp_path, benchmark_main):
    pytest.importorskip("accelerate")
    ways = ["streamed from disk", "group, by block", "sequential"]
    words = [word for way in ways for word in ("--way", way)] + ["--host-memory", "20kB"]
    benchmark_main("stream_offload", tmp_path, *TINY, *words, "--output", tmp_path / "out.json", modules=PIPELINE)
    (sample,) = json.loads((tmp_path / "out.json").read_text())["samples"]
    assert set(sample["ways"]) == {"resident", *ways}
    assert len({one["latents"] for one in sample["ways"].values()}) == 1
    assert "4 blocks)" in sample["ways"]["streamed from disk"]["report"]
