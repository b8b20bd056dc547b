"""The benchmark of limits of memory runs, tiny and on the CPU, so that it cannot rot."""

import json

import pytest
from programs import PIPELINE

pytest.importorskip("diffusers")
pytest.importorskip("transformers")


def test_it_compares_with_the_first_sample(tmp_path, benchmark_main, capfd):
    words = [tmp_path, "--size", "tiny", "--device", "cpu", "--video-size", "32*32", "--frames", "5", "--steps", "3"]
    words += ["--samples", "fastest", "22.08MB:16GB@cold", "--output", tmp_path / "out.json"]
    benchmark_main("vram_limit", *words, modules=PIPELINE)
    lines = capfd.readouterr().out.splitlines()
    assert lines[-2].split()[:2] == ["fastest", "fastest"]
    assert lines[-1].split()[:2] == ["22.08MB:16GB@cold", "streamed"]
    assert lines[-1].endswith("True")
    first, second = json.loads((tmp_path / "out.json").read_text())["samples"]
    assert first["latents"] == second["latents"]
    assert [one["name"] for one in second["pipeline"]["streams"]] == ["text_encoder"]
    assert second["host_anonymous_bytes"] > 10**6
