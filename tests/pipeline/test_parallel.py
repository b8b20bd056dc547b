"""The pipeline on several processes (CPU, gloo): the video of one process, one voice, and an end when one fails."""

import json
import os
import signal
import socket
import time
from pathlib import Path

import numpy as np
import pytest
from programs import PIPELINE, Program, run

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
pytest.importorskip("imageio_ffmpeg")

import torch
from versions import needs_parallelism

from wan_loader.errors import OptionError
from wan_pipeline import WanT2V
from wan_pipeline.commands.app import main
from wan_pipeline.parallel import Degrees, _of_library
from wan_pipeline.wan_checkpoint import open_wan

pytestmark = needs_parallelism
ROOT = Path(__file__).parents[2]
SMALL = ["--prompt", "two cats", "--size", "32*32", "--frame_num", "5", "--sample_steps", "3"]


def environment(n):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = os.environ | {
        "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}",
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
    }
    return env | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(n)}


def run_each(n, *words):
    """(exit code, (stdout, stderr)) of n processes."""
    env, started = environment(n), []
    try:
        for rank in range(n):
            mine = env | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            started.append(Program(*words, env=mine, modules=PIPELINE))
        return [(program.wait(80), program.output()) for program in started]
    finally:
        for program in started:
            program.kill()


def run_case(case, n, *words):
    """(exit code, output) of n processes of a case of worker_parallel.py."""
    script = Path(__file__).parent / "worker_parallel.py"
    ended = run_each(n, script, case, "generate", *SMALL, "--device", "cpu", *words)
    return [(code, "".join(output)) for code, output in ended]


@pytest.fixture
def frames():
    def frames(path):
        import imageio

        with imageio.get_reader(path, format="FFMPEG") as reader:
            return np.stack(list(reader.iter_data())).astype(int)

    return frames


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    ("layout", "flags", "divided"),
    [
        ("native", ["--dit_fsdp", "--t5_fsdp", "--ulysses_size", "2"], {"text_encoder", "transformer"}),
        ("diffusers", ["--ulysses-size", "2", "--preset", "multi-gpu"], set()),
    ],
)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_two_processes_make_the_video_of_one(
    tiny_wan, tmp_path, frames, layout, flags, divided, device, python_that_forks
):
    if device == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("fewer than 2 GPUs")
    with WanT2V.from_checkpoint(tiny_wan(), device=device) as pipe:
        pipe("two cats", size=(32, 32), frame_num=5, steps=3, seed=3).save(tmp_path / "one.mp4")
    words = [
        *SMALL,
        "--device",
        device,
        "--base_seed",
        "3",
        "--ckpt_dir",
        tiny_wan(layout),
        "--save_file",
        tmp_path / "two.mp4",
    ]
    words = ["-m", "wan_pipeline", "generate", *words, *flags, "--profile_out", tmp_path / "run.json"]
    if flags[0] == "--dit_fsdp":
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *words]
        env = environment(2) | {"PYTHON_EXEC": str(python_that_forks(PIPELINE))}
        done = run(*torchrun, env=env, timeout=100, modules=PIPELINE)
        assert done.returncode == 0, done.stderr
        out, err = done.stdout, done.stderr
    else:
        ended = run_each(2, *words)
        assert [code for code, _ in ended] == [0, 0], ended
        out, err = map("".join, zip(*(output for _, output in ended), strict=True))
    assert out == f"{tmp_path / 'two.mp4'}\n"
    assert err.count("preset multi-gpu") == err.count("denoise: 3 done") == 1
    assert np.abs(frames(tmp_path / "one.mp4") - frames(tmp_path / "two.mp4")).mean() < 1
    reports = [json.loads((tmp_path / f"run.rank{rank}.json").read_text()) for rank in range(2)]
    loads = [{load["name"]: load for load in report["pipeline"]["loads"]} for report in reports]
    assert "vae" in loads[0]
    assert "vae" not in loads[1]
    for component in open_wan(tiny_wan(layout)).components[:2]:
        read = [load[component.name]["nbytes_read"] for load in loads]
        assert sum(read) == pytest.approx(component.facts.nbytes, rel=0.02)
        assert max(read) < 0.6 * sum(read)
        kept = reports[0]["pipeline"]["loads"]
        share = next(load["nbytes_device"] for load in kept if load["name"] == component.name)
        whole = component.nbytes(None if component.name == "text_encoder" else "bfloat16")
        assert share == pytest.approx(whole / (2 if component.name in divided else 1), rel=0.05)


def test_a_killed_process_ends_the_others(tiny_wan, tmp_path):
    start = time.monotonic()
    words = ["--ckpt_dir", tiny_wan(), "--dit_fsdp", "--t5_fsdp", "--save_file", tmp_path / "v.mp4"]
    first, second = run_case("killed", 2, *words)
    assert second[0] == -signal.SIGKILL
    assert first[0] == 1
    assert "error: process 1 is gone" in first[1]
    assert "Traceback" not in first[1]
    assert first[1].count("error: ") == 1
    assert time.monotonic() - start < 40
    assert list(tmp_path.iterdir()) == []


def test_a_process_without_the_checkpoint_ends_the_others(tiny_wan, tmp_path):
    first, second = run_case("missing", 2, "--ckpt_dir", tiny_wan(), "--save_file", tmp_path / "v.mp4")
    assert (first[0], second[0]) == (1, 1)
    assert "error: /nowhere is no directory" in second[1]
    assert "error: process 1 failed: MissingFileError: /nowhere is no directory" in first[1]


def test_a_cancelled_load_tells_the_others_the_reason(tiny_wan, tmp_path):
    words = ["--ckpt_dir", tiny_wan(), "--dit_fsdp", "--t5_fsdp", "--save_file", tmp_path / "v.mp4"]
    first, second = run_case("cancels", 2, *words)
    assert (first[0], second[0]) == (1, 1)
    assert "error: the module and the checkpoint disagree" in second[1]
    reason = "process 1 failed: KeyMismatchError: the module and the checkpoint disagree"
    assert f"error: {reason}\n" in first[1], first[1]
    assert "cancelled" not in first[1] + second[1]


def test_decoding_may_take_longer_than_collectives(tiny_wan, tmp_path):
    words = ["--ckpt_dir", tiny_wan(), "--dit_fsdp", "--ulysses_size", "2", "--save_file", tmp_path / "v.mp4"]
    for code, output in run_case("slow", 2, *words):
        assert code == 0, output
    assert (tmp_path / "v.mp4").exists()


def test_a_process_that_hangs_in_a_collective_is_ended(tiny_wan, tmp_path):
    words = ["--ckpt_dir", tiny_wan(), "--dit_fsdp", "--save_file", tmp_path / "v.mp4"]
    first, second = run_case("hangs", 2, *words)
    assert (first[0], second[0]) == (1, -signal.SIGKILL)
    assert first[1].splitlines()[-1].startswith("error: process 1 is gone")


@pytest.mark.parametrize(
    ("env", "words", "message"),
    [
        ({"WORLD_SIZE": "two"}, [], "WORLD_SIZE is 'two', not a number"),
        ({"WORLD_SIZE": "2"}, [], "RANK is not set"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, [], "LOCAL_RANK is not set"),
        ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}, [], "MASTER_ADDR and MASTER_PORT not set"),
        ({"WORLD_SIZE": "2", "RANK": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, [], "RANK is 2"),
        ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "0"}, [], "is no port"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, ["--ulysses_size", "3"], "number of processes, 2"),
        ({"WORLD_SIZE": "3", "RANK": "0"}, ["--ulysses_size", "3"], "divide the 8 attention heads"),
        ({"WORLD_SIZE": "8", "RANK": "0"}, ["--ulysses_size", "8", "--frame_num", "9"], "divide the 12 tokens"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, ["--t5_cpu", "--t5_fsdp"], "contradict"),
        ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}, ["--preset", "balanced"], "is for one process"),
        ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}, ["--offload_model", "True"], "leave out offload_model"),
        ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}, ["--cache"], "leave out --cache"),
    ],
)
def test_mistakes_are_one_error(tiny_wan, tmp_path, monkeypatch, call_main, capfd, env, words, message):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    start = ["generate", *SMALL, "--device", "cpu", "--ckpt_dir", tiny_wan()]
    command = [*start, "--save_file", tmp_path / "v.mp4", *words]
    assert call_main(main, *command) == 1
    error = capfd.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_defaults_of_a_preset():
    assert Degrees().resolved("multi-gpu", 8, t5_cpu=False) == Degrees(dit_fsdp=True, t5_fsdp=True, ulysses_size=8)
    assert Degrees().resolved("auto", 8, t5_cpu=True) == Degrees(dit_fsdp=True, ulysses_size=8)
    assert Degrees().resolved("auto", 1, t5_cpu=False) == Degrees()
    assert Degrees(t5_fsdp=True).resolved("auto", 8, t5_cpu=False) == Degrees(t5_fsdp=True)
    with pytest.raises(OptionError) as error:
        Degrees().resolved("fastest", 8, t5_cpu=False)
    assert "for one process" in error.value.reason
    assert error.value.remedy.startswith("use --preset multi-gpu")


def test_what_an_old_library_lacks_is_said():
    with pytest.raises(OptionError, match=r"json has no fully_shard: install torch 2\.6 or later"):
        _of_library(json, "fully_shard", "torch 2.6")
