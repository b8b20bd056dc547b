"""The real command with real processes: what it measures, what peers may do to it, what it leaves behind."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from programs import TORCH

from wan_loader.bench import sample
from wan_loader.bench.child import ask
from wan_loader.bench.contract import Loader, LoadTask, Outcome
from wan_loader.bench.loaders import LOADERS

LOADERS_AS_THEY_ARE = dict(LOADERS)

FAKES = {
    "fastsafetensors": """
        import ctypes
        def fastsafe_open(*args, **kwargs):
            ctypes.string_at(0)
        """,
    "runai_model_streamer": """
        import torch
        class SafetensorsStreamer:
            def __enter__(self):
                return self
            def __exit__(self, *args):
                return None
            def stream_files(self, paths, device):
                from safetensors.torch import load_file
                self.tensors = load_file(paths[0])
            def get_tensors(self):
                self.tensors["w3"][5, 5] += 1
                return self.tensors.items()
        """,
    "flashpack": """
        import pathlib, subprocess
        def pack_to_file(tensors, path, dtype):
            child = subprocess.Popen(["sleep", "1000"])
            pathlib.Path(path).write_text(str(child.pid))
            child.wait()
        """,
}
PACKAGES = {"runai_model_streamer": "runai-model-streamer"}


@pytest.fixture
def fakes(tmp_path):
    """A directory for PYTHONPATH with peers that crash, return wrong tensors, or hang."""
    home = tmp_path / "fakes"
    home.mkdir()
    for module, source in FAKES.items():
        (home / f"{module}.py").write_text(textwrap.dedent(source))
        info = home / f"{module}-9.9.dist-info"
        info.mkdir()
        name = PACKAGES.get(module, module)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 9.9\n")
    return home


def results_of(case):
    return {r["loader"]: r for r in case["results"]}


def test_a_bench_measures_and_compares(checkpoint, command, tmp_path):
    """The processes that it starts begin as those of a user do."""
    markdown, picture, saved = (tmp_path / name for name in ("b.md", "b.svg", "b.json"))
    exports = ("--export-json", saved, "--export-markdown", markdown, "--export-picture", picture)
    options = ("--cache", "cold", "--repeat", 1, "--dtype", "bf16", "--json")
    words = ("--loader", "ours,safetensors,safetensors-cuda", *options, *exports)
    done = command("bench", checkpoint, *words, PYTHON_EXEC=sys.executable)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document == json.loads(saved.read_text())
    assert document["schema_version"] == 1
    assert document["device"] == "cpu"
    assert any("no GPU" in w for w in document["warnings"])
    (case,) = document["cases"]
    results = results_of(case)
    assert results["safetensors-cuda"]["status"] == "not applicable"
    for name in ("ours", "safetensors"):
        assert results[name]["status"] == "ok", results[name]
        assert results[name]["compared_tensors"] == 12
        (one,) = results[name]["samples"]
        assert 0 < one["call_seconds"] <= one["seconds"]
        assert one["resident_before"] is not None
    assert results["ours"]["samples"][0]["phases"]["touch"]
    assert "ours" in markdown.read_text()
    assert "</svg>" in picture.read_text()
    assert command("bench", checkpoint, "--export-json", saved).returncode == 1, "overwrites nothing"


@pytest.mark.gpu
def test_a_bench_on_the_gpu(checkpoint, command):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    options = ("--device", "cuda", "--cache", "warm", "--cache", "cold", "--repeat", 1, "--dtype", "bf16", "--json")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
    loaders = "ours,safetensors,safetensors-cuda,torch"
    done = command("bench", checkpoint, "--loader", loaders, *options, CUDA_VISIBLE_DEVICES=visible)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["device"] == "cuda:0"
    for case in document["cases"]:
        assert case["ceilings"]["h2d_pinned_gbps"] > 0
        for result in case["results"]:
            assert result["status"] == "ok", result
            assert result["compared_tensors"] == 12
            assert result["summary"]["device_peak_bytes"] >= case["nbytes"] // 2


def test_bad_peers_are_reported_and_do_not_end_the_bench(checkpoint, command, fakes):
    options = ("--repeat", 2, "--loader", "fastsafetensors,runai,torch,instanttensor", "--json")
    done = command("bench", checkpoint, *options, PYTHONPATH=f"{fakes}:{os.environ.get('PYTHONPATH', '')}")
    assert done.returncode == 0, done.stderr
    results = results_of(json.loads(done.stdout)["cases"][0])
    assert results["fastsafetensors"]["status"] == "crashed"
    assert "SIGSEGV" in results["fastsafetensors"]["reason"]
    assert len(results["fastsafetensors"]["samples"]) == 1, "what failed is not run again"
    assert results["runai"]["status"] == "wrong"
    assert "'w3'" in results["runai"]["reason"]
    assert results["runai"]["summary"] is None, "wrong tensors have no time"
    assert results["instanttensor"]["status"] in ("not installed", "not applicable")
    assert results["torch"]["summary"]["n"] == 2


def test_a_peer_that_hangs_is_ended_with_all_its_children(checkpoint, fakes, monkeypatch, tmp_path):
    monkeypatch.setenv("PYTHONPATH", str(fakes), prepend=os.pathsep)
    files = (str(checkpoint / "model.safetensors"),)
    task = asdict(
        LoadTask(files=files, format="safetensors", file_dtype="float32", device="cpu", packed=str(tmp_path / "pid"))
    )
    answer = ask({"kind": "convert", "loader": "flashpack", "task": task}, time_limit_s=8)
    assert answer["status"] == "hung"
    assert "--time-limit" in answer["reason"]
    pid = int((tmp_path / "pid").read_text())
    for _ in range(100):
        if not Path(f"/proc/{pid}/cmdline").exists() or not Path(f"/proc/{pid}/cmdline").read_bytes():
            return
        time.sleep(0.05)
    pytest.fail(f"its child {pid} still runs")


def test_no_room_is_reported_and_the_rest_goes_on(checkpoint, monkeypatch, tmp_path, python_that_forks):
    monkeypatch.setattr(sys, "executable", str(python_that_forks(TORCH)))
    from wan_loader.bench import storage
    from wan_loader.bench.document import to_document
    from wan_loader.bench.loaders import LOADERS
    from wan_loader.bench.runner import LoaderSetup, Settings, run_cases
    from wan_loader.bench.storage import Place

    here, small = tmp_path / "big", tmp_path / "small"
    here.mkdir()
    small.mkdir()
    usage = storage.shutil.disk_usage
    full = usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda path: full if path == small else usage(path))
    settings = Settings(
        paths=[str(checkpoint)],
        entries=[LoaderSetup("ours", LOADERS["ours"])],
        places=[Place("small", small), Place("big", here)],
        caches=["as-is"],
        device="cpu",
        repeat=1,
    )
    cases = []
    run_cases(settings, lambda line: None, cases)
    assert "no room" in cases[0].failure
    assert cases[1].results[0].status == "ok"
    assert list(here.iterdir()) == []
    document = to_document(settings, cases, argv=[], machine={}, created="")
    assert any("no room" in w for w in document["warnings"])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_bench_cleans_up_and_keeps_what_it_has(checkpoint, tmp_path, python_that_forks, number):
    place, out = tmp_path / "place", tmp_path / "out.json"
    place.mkdir()
    words = ["bench", checkpoint, "--loader", "ours", "--repeat", "1000", "--storage", f"disk={place}"]
    with subprocess.Popen(
        [python_that_forks(TORCH), "-m", "wan_loader", *map(str, words), "--export-json", out],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHON_EXEC": str(python_that_forks(TORCH))},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored where the tests run in background
    ) as child:
        for line in child.stderr:
            if "1/1000" in line:
                break
        assert len(list(place.iterdir())) == 1, "a copy is being measured"
        child.send_signal(number)
        rest = child.stderr.read()
        table = child.stdout.read()
        assert child.wait(30) == 130, rest
    assert "interrupted: this is what was measured until then" in rest
    assert " equal" in table
    assert list(place.iterdir()) == []
    (case,) = json.loads(out.read_text())["cases"]
    assert 1 <= case["results"][0]["summary"]["n"] < 1000


def test_a_bench_that_is_interrupted_before_its_first_sample_writes_nothing(
    checkpoint, tmp_path, monkeypatch, call_main, python_that_forks
):
    from wan_loader.bench import runner
    from wan_loader.cli.app import main

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "ask", interrupt)
    monkeypatch.setattr(sys, "executable", str(python_that_forks(TORCH)))
    assert call_main(main, "bench", checkpoint, "--export-json", tmp_path / "o.json") == 130
    assert not (tmp_path / "o.json").exists()


def test_simulated_storage_sets_the_pace(checkpoint, command):
    options = ("--loader", "ours,torch", "--storage", "slow=simulated:1MB/s", "--repeat", 1, "--json")
    done = command("bench", checkpoint, *options)
    assert done.returncode == 0, done.stderr
    (case,) = json.loads(done.stdout)["cases"]
    assert case["storage"]["label"] == "slow (simulated)"
    results = results_of(case)
    assert results["ours"]["summary"]["median_s"] > 0.8 * case["nbytes"] / 1e6
    assert results["torch"]["status"] == "not applicable"


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--loader", "nonsense"], "unknown loader 'nonsense'"),
        (["--storage", "x"], "NAME=DIR"),
        (["--storage", "x=/does/not/exist"], "no directory"),
        (["--storage", "x=simulated:fast"], "no rate"),
        (["--storage", "x=simulated:0"], "--storage 'x=simulated:0': '0' must be more than 0"),
        (["--part", "lots"], "not understood"),
        (["--time-limit", "inf"], "--time-limit"),
    ],
)
def test_mistakes_are_usage_errors(checkpoint, command, words, text):
    done = command("bench", checkpoint, *words)
    assert done.returncode == 2
    assert done.stdout == ""
    assert text in " ".join(done.stderr.replace("│", " ").split())


def test_a_component_class_is_imported_before_the_clock(checkpoint, monkeypatch):
    events = []
    loader = Loader(
        "diffusers",
        (),
        (),
        "",
        load=lambda task: (events.append("load"), Outcome({}))[1],
        prepare=lambda task: events.append("prepare"),
    )
    monkeypatch.setitem(sample.LOADERS, "diffusers", loader)
    monkeypatch.setattr(sample, "_busy_seconds", lambda: (events.append("clock"), (0.0, 0.0))[1])
    task = {"files": [str(checkpoint / "model.safetensors")], "format": "safetensors", "file_dtype": "float32"}
    sample.take_sample({"loader": "diffusers", "task": {**task, "device": "cpu"}})
    assert events == ["prepare", "clock", "load", "clock"]
    assert LOADERS_AS_THEY_ARE["diffusers"].prepare is not None


def test_two_exports_to_one_file_are_refused(checkpoint, command, tmp_path):
    done = command("bench", checkpoint, "--export-json", tmp_path / "b", "--export-markdown", f"{tmp_path}/./b")
    assert done.returncode == 1
    assert "a name of its own" in done.stderr
    assert not (tmp_path / "b").exists()


def test_a_missing_checkpoint_is_an_error(command, tmp_path):
    done = command("bench", tmp_path / "none")
    assert done.returncode == 1
    assert "does not exist" in done.stderr
