"""`wan-loader standby keep` and `load --keep`, as commands: output, exit codes, mistakes."""

import json
import subprocess

import pytest
import torch
from programs import check_error, check_usage
from safetensors.torch import save_file

from wan_loader.cli import main


@pytest.fixture
def run(tmp_path, monkeypatch, call_main, capfd):
    """Run the command in this process, with a keeper of the test's own, which ends with it."""
    (tmp_path / "runtime").mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "runtime"))
    monkeypatch.setenv("COLUMNS", "200")

    def run(*words):
        code = call_main(main, *words)
        out, err = capfd.readouterr()
        return subprocess.CompletedProcess(words, code, out, err)

    yield run
    run("standby", "keep", "stop")


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "a model [red].safetensors"
    save_file({"w": torch.randn(100, 100), "norm.w": torch.randn(3)}, path)
    return path


def test_from_keeping_to_dropping(run, model):
    options = ("--device", "cpu", "--dtype", "bf16")
    done = run("standby", "keep", model, *options, "--max-gpu", "1MB")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == f"kept on cpu: {model}"
    assert "already" in run("standby", "keep", "add", model, *options).stdout
    done = run("load", model, *options, "--keep", "--verify")
    assert done.returncode == 0
    assert "transport: kept" in done.stdout
    assert "2 tensors, every bit equal" in done.stderr
    done = run("load", model, "--device", "cpu", "--keep")
    assert "not attached to kept weights: it is kept as bfloat16" in done.stderr
    shown = run("standby", "keep", "status").stdout
    assert str(model) in shown
    assert "at most 1 MB on cpu" in shown
    assert "every checksum is right" in run("standby", "keep", "verify", model, *options).stdout
    done = run("standby", "keep", "drop", model)
    assert done.stdout.startswith("24.6 kB given back: ")
    check_error(run("standby", "keep", "drop", model), "nothing of it is kept")
    assert run("standby", "keep", "status").stdout == "nothing is kept\n"
    assert run("standby", "keep", "stop").stdout == "the keeper has ended\n"
    assert run("standby", "keep", "stop").stdout == "there is no keeper\n"


def test_their_json(run, model):
    words = ("--device", "cpu", "--dtype", "bf16", "--keep-fp32", "norm", "--json")
    kept = json.loads(run("standby", "keep", model, *words).stdout)
    assert (kept["command"], kept["target"], kept["device"], kept["dropped"]) == ("standby keep", str(model), "cpu", [])
    assert kept["load"]["n_tensors"] == 2
    (item,) = json.loads(run("standby", "keep", "status", "--json").stdout)["items"]
    assert item["key"] == kept["key"]
    assert item["dtype"] == "bfloat16, float32 for norm"
    assert json.loads(run("standby", "keep", "verify", model, *words).stdout)["damaged"] == []
    document = json.loads(run("standby", "keep", "drop", kept["key"][:8], "--json").stdout)
    assert [one["key"] for one in document["dropped"]] == [kept["key"]]
    assert json.loads(run("standby", "keep", "drop", "--all", "--json").stdout)["dropped"] == []
    loaded = json.loads(run("load", model, "--device", "cpu", "--keep", "--json").stdout)
    assert loaded["kept"] == {"state": "source", "reason": "it is not kept"}


def test_mistakes(run, model, tmp_path):
    check_usage(run("standby", "keep", model, "--max-gpu", "lots"), "--max-gpu")
    check_usage(run("standby", "keep", "drop"), "--all")
    check_usage(run("standby", "keep", "drop", model, "--all"), "--all")
    check_error(run("standby", "keep", tmp_path / "none"), "does not exist")
    check_error(run("standby", "keep", "verify", model, "--device", "cpu"), "there is no keeper")
    check_error(
        run("standby", "keep", model, "--device", "cpu", "--max-gpu", "1kB"), "do not fit into the 1 kB", "--max-gpu"
    )
    assert run("standby", "keep", "status", "--json").returncode == 0
    assert run("standby", "keep").returncode == 2
    check_usage(run("keep", model), "No such command")
    assert "keep" in run("standby", "--help").stdout
    assert "keep PATH" in run("standby", "keep", "--help").stdout
