"""The benchmark of the pipeline on several GPUs runs, tiny and on the CPU, so that it cannot rot."""

import json

import pytest
from programs import PIPELINE

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from versions import needs_parallelism

pytestmark = needs_parallelism


@pytest.fixture
def run(tmp_path, benchmark_main, capfd):
    """(table and findings, document) of a run."""

    def run(*words):
        start = [tmp_path, "--size", "tiny", "--device", "cpu", "--output", tmp_path / "out.json"]
        benchmark_main("parallel_pipeline", *start, *words, modules=PIPELINE)
        return capfd.readouterr().out, json.loads((tmp_path / "out.json").read_text())

    return run


def test_compares_with_the_video_of_one_process(run):
    output, document = run("--only", "fp32", "fp32 ulysses+fsdp")
    assert not any("error" in case for case in document["cases"]), document["cases"]
    assert [len(case["processes"]) for case in document["cases"]] == [1, 2]
    assert all(calls > 0 for case in document["cases"] for p in case["processes"] for calls in p["calls"].values())
    assert output.count(" 1.00 x |") == 2  # every byte read once
    videos = document["videos"]
    assert videos["fp32 ulysses+fsdp"]["std_levels"] > 1
    assert not videos["fp32 exchanged blocks"]["yardsticks"]["fp32 other attention"]["within"]
    assert videos["fp32 ulysses+fsdp"]["latents"] < videos["fp32 exchanged blocks"]["latents"] / 20


def test_a_process_that_does_not_end_is_reported(run):
    output, document = run("--only", "one", "--timeout", "0.2")
    assert document["cases"][0]["error"].startswith("no end after 0.2 s")
    assert "no end after 0.2 s" in output
