"""`wan-pipeline generate` and `load`: one whole run each as a process, everything else in this one."""

import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("imageio_ffmpeg")

from programs import PIPELINE

from wan_loader.formats import opening as checkpoint_module
from wan_pipeline.commands import generate as module
from wan_pipeline.commands.app import main
from wan_pipeline.commands.load_report import time_shares
from wan_pipeline.families import FAMILIES
from wan_pipeline.wan_checkpoint import open_wan

ROOT = Path(__file__).parents[2]
SMALL = ["--prompt", "two cats", "--size", "32*32", "--frame_num", "5", "--sample_steps", "3", "--base_seed", "3"]


@pytest.fixture
def run(call_main):
    """The exit code of a command in this process."""
    return functools.partial(call_main, main)


@pytest.fixture
def refuse_to_start(monkeypatch):
    monkeypatch.setattr(module, "_started", lambda *a: pytest.fail("loading was about to begin"))


# imageio's reader leaves its pipes to the garbage collector
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_whole_run(tiny_wan, tmp_path):
    """A fresh process: headers, prewarm, imports, loads, and the report of all that."""
    words = [*SMALL, "--ckpt_dir", tiny_wan(), "--device", "cpu", "--save_file", tmp_path / "cats.mp4"]
    words += ["--profile-out", tmp_path / "run.json"]
    env = os.environ | {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run(
        [sys.executable, "-m", "wan_pipeline", "generate", *map(str, words)], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path / 'cats.mp4'}\n"
    for text in (
        "preset fastest",
        "encode: 1 done",
        "denoise: 3 done",
        "decode: 1 done",
        "time to first denoising step",
    ):
        assert text in done.stderr
    report = json.loads((tmp_path / "run.json").read_text())
    assert report["command"] == "generate"
    assert {"import", "header", "init"} <= {p["name"] for p in report["phases"]}
    first = report["pipeline"]["loads"][0]
    assert first["name"] == "text_encoder"
    assert first["start_s"] < report["pipeline"]["time_to_first_step_s"] < report["seconds"]
    assert report["video"]["seed"] == 3
    assert read_video(tmp_path / "cats.mp4").shape == (5, 32, 32, 3)


def read_video(path):
    import imageio
    import numpy as np

    with imageio.get_reader(path, format="FFMPEG") as reader:
        return np.stack(list(reader.iter_data()))


def test_the_same_video_from_both_layouts_with_all_flags(tiny_wan, tmp_path, run, capfd):
    files = []
    for layout, flags in (
        ("native", ["--convert_model_dtype"]),
        ("diffusers", ["--t5-cpu", "--offload-model", "True", "--preset", "min-memory", "--frame-num", "5"]),
        ("native", ["--offload_model", "False", "--task", "t2v-A14B", "--sample_guide_scale", "3.0,4.0"]),
    ):
        files.append(tmp_path / f"{len(files)}.mp4")
        words = [
            "generate",
            *SMALL,
            "--ckpt_dir",
            tiny_wan(layout),
            "--device",
            "cpu",
            "--save_file",
            files[-1],
            *flags,
        ]
        assert run(*words) == 0, capfd.readouterr().err
    assert files[0].read_bytes() == files[1].read_bytes() == files[2].read_bytes()


def test_limits_of_memory(tiny_wan, tmp_path, run, capfd):
    words = ["generate", *SMALL, "--ckpt_dir", tiny_wan(), "--device", "cpu", "--save_file"]
    assert run(*words, tmp_path / "a.mp4") == 0
    assert run(*words, tmp_path / "b.mp4", "--vram-limit", "22.2MB", "--ram_limit", "16GB") == 0
    assert "preset min-memory: 22.1 MB while" in capfd.readouterr().err
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
    for flags, message in (
        (["--vram_limit", "much"], "--vram_limit: 'much' is not understood: write it like 3GB or 512MiB"),
        (["--ram_limit", "0"], "--ram_limit: '0' must be more than 0"),
        (["--vram_limit", "1MB"], "1 MB are allowed: allow 22"),
        (["--ram_limit", "1GB"], "1 GB of host memory are too little"),
    ):
        assert run(*words, tmp_path / "c.mp4", *flags) == 1
        assert message in " ".join(capfd.readouterr().err.split())
        assert not (tmp_path / "c.mp4").exists()


def test_json_and_overwriting(tiny_wan, tmp_path, run, capfd):
    words = ["generate", *SMALL, "--ckpt_dir", tiny_wan(), "--device", "cpu", "--save_file", tmp_path / "v.mp4"]
    (tmp_path / "v.mp4").write_text("mine")
    assert run(*words) == 1
    assert "overwrite it with --force" in capfd.readouterr().err
    assert (tmp_path / "v.mp4").read_text() == "mine"
    assert run(*words, "--force", "--json") == 0
    assert json.loads(capfd.readouterr().out)["video"]["path"] == str(tmp_path / "v.mp4")
    assert [p.name for p in tmp_path.iterdir()] == ["v.mp4"]


def noting(paths, function, path, *args):
    paths.append(path)
    return function(path, *args)


@pytest.mark.parametrize("layout", ["native", "diffusers"])
def test_a_start_reads_each_header_once(tiny_wan, tmp_path, run, monkeypatch, layout):
    """Four networks: four openings. What the command has opened to check its flags, the start loads."""
    opened = {"_open": [], "_open_file": []}
    for name, paths in opened.items():
        original = getattr(checkpoint_module, name)
        monkeypatch.setattr(checkpoint_module, name, functools.partial(noting, paths, original))
    words = [*SMALL, "--ckpt_dir", tiny_wan(layout), "--device", "cpu", "--save_file", tmp_path / "v.mp4"]
    assert run("generate", *words) == 0
    assert len(opened["_open"]) == 4
    opened_files = sorted(opened["_open_file"])
    assert opened_files == sorted(file for c in open_wan(tiny_wan(layout)).components for file in c.files)


def test_the_help_names_every_model(run, capfd):
    assert run("generate", "--help") == 0
    told = " ".join(capfd.readouterr().out.split())
    assert f"--task <str> {', '.join(f.task for f in FAMILIES[:-1])} or {FAMILIES[-1].task}." in told


def test_load(tiny_wan, tmp_path, run, capfd):
    words = ["load", "--ckpt-dir", tiny_wan(), "--device", "cpu", "--profile-out", tmp_path / "run.json"]
    assert run(*words) == 0
    lines = capfd.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines[:5]] == [
        "network",
        "text encoder",
        "high-noise expert",
        "low-noise expert",
        "VAE",
    ]
    assert re.search(r" since the start: imports .*s, loads .*s, all else .*s", lines[-2])
    assert lines[-1].startswith("verdict: ")
    assert json.loads((tmp_path / "run.json").read_text())["command"] == "load"


@pytest.mark.usefixtures("refuse_to_start")
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prompt", ""], "prompt is empty"),
        (["--size", "100*64"], "multiples of 16"),
        (["--size", "large"], "WIDTH*HEIGHT"),
        (["--save_file", "cats.gif"], "videos are written as MP4: name it cats.mp4; `ffmpeg -i cats.mp4 cats.gif`"),
        (["--frame_num", "80"], "4n+1"),
        (["--sample_solver", "euler"], "unipc or dpm++"),
        (["--sample_guide_scale", "a"], "sample_guide_scale"),
        (["--task", "ti2v-5B"], "is t2v-A14B"),
        (["--t5_cpu", "--t5_fsdp"], "contradict"),
        (["--dit_fsdp"], "torchrun"),
        (["--ulysses_size", "4"], "number of processes"),
        (["--offload_model", "maybe"], "True or False"),
        (["--convert_model_dtype", "--dtype", "fp32"], "converts to bf16"),
        (["--save_file", "/nowhere/v.mp4"], "cannot be written"),
        (["--profile-out", "/nowhere/run.json"], "cannot be written"),
        (["--ckpt_dir", "/nowhere"], "is no directory"),
    ],
)
def test_mistakes_are_found_before_loading(tiny_wan, tmp_path, run, capfd, words, message):
    start = ["generate", *SMALL, "--ckpt_dir", tiny_wan(), "--save_file", tmp_path / "v.mp4", "--device", "cpu"]
    assert run(*start, *words) == 1
    error = capfd.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert error.count("\n") == 1


def test_usage_and_interrupt(monkeypatch, capfd, tiny_wan, tmp_path, run):
    assert run("generate", "--prompt", "x") == 2

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_started", interrupt)
    words = ["generate", *SMALL, "--ckpt_dir", tiny_wan(), "--save_file", tmp_path / "v.mp4"]
    assert run(*words) == 130
    assert "Traceback" not in capfd.readouterr().err


def test_benchmark_runs(tmp_path, benchmark_main):
    """Tiny, so that it cannot rot."""
    words = [tmp_path, "--size", "tiny", "--device", "cpu", "--cache", "warm", "--video-size", "32*32", "--frames", "5"]
    words += ["--samples", "ours:balanced", "official", "alone:fastest@warm", "--runs", "run:fastest"]
    benchmark_main("pipeline_start", *words, "--output", tmp_path / "out.json", modules=PIPELINE)
    samples = json.loads((tmp_path / "out.json").read_text())["samples"]
    assert [s["name"] for s in samples] == ["ours:balanced", "official", "run:fastest", "alone:fastest"]
    assert not any("error" in s for s in samples), samples
    assert samples[0]["first_step_s"] > 0
    assert samples[2]["switch_stall_s"] < samples[2]["step_s"]
    assert 0 < samples[3]["load_s"] < samples[3]["first_step_s"]


@pytest.mark.usefixtures("refuse_to_start")
def test_flags_with_hyphens_are_those_with_underscores(tiny_wan, tmp_path, run, capfd):
    start = ["generate", *SMALL, "--ckpt-dir", tiny_wan(), "--save-file", tmp_path / "v.mp4", "--device", "cpu"]
    assert run(*start, "--sample-guide-scale", "a") == 1
    assert "sample_guide_scale" in capfd.readouterr().err
    assert run(*start, "--no-such-flag") == 2
    assert "No such option" in capfd.readouterr().err


def test_completion_of_commands_and_flags(tiny_wan):
    env = os.environ | {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}", "COMP_CWORD": "2"}
    env |= {"_WAN_PIPELINE_COMPLETE": "complete_bash", "COMP_WORDS": "wan-pipeline load --ckpt"}
    code = "import sys; sys.argv[0] = 'wan-pipeline'; from wan_pipeline.__main__ import main; main()"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.stdout.split() == ["--ckpt_dir"], done.stderr


def test_shares_of_a_start_add_up():
    loads = [{"start_s": 2.0, "seconds": 2.0}, {"start_s": 3.0, "seconds": 2.0}, {"start_s": 6.0, "seconds": 1.0}]
    report = {"seconds": 10.0, "phases": [{"name": "import", "busy_s": 3.5}], "pipeline": {"loads": loads}}
    assert time_shares(report) == {"imports": 3.5, "loads": 4.0, "all else": 2.5}
    assert time_shares(report | {"seconds": 6.0}) == {"imports": 2.0, "loads": 4.0, "all else": 0.0}
