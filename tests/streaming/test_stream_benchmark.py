"""The benchmark of streamed blocks runs, tiny, and finds equal latents."""

import json

import pytest
from programs import PIPELINE

pytest.importorskip("diffusers")


def test_it_runs_tiny_on_the_cpu(tmp_path, benchmark_main):
    words = [tmp_path, "--size", "tiny", "--blocks", "4", "--frames", "5", "--steps", "1", "--device", "cpu"]
    benchmark_main("stream_blocks", *words, "--output", tmp_path / "out.json", modules=PIPELINE)
    (sample,) = json.loads((tmp_path / "out.json").read_text())["samples"]
    assert sample["equal"]
    assert "stream 4 of 4 blocks" in sample["streamed"]["report"]
