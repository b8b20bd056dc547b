"""profile, report, doctor and estimate as a user types them."""

import json
import sys

import pytest
from programs import run

from wan_loader.formats.inventory import checkpoint_paths
from wan_loader.sizes import format_bytes


@pytest.fixture
def cli(tmp_path):
    """Run wan-loader with a cache of its own."""

    def cli(*words, **options):
        environment = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "COLUMNS": "120", **options.pop("env", {})}
        return run("-m", "wan_loader", *words, env=environment, cwd=tmp_path, timeout=110, **options)

    return cli


@pytest.fixture
def weights(tmp_path):
    import torch
    from safetensors.torch import save_file

    path = tmp_path / "model.safetensors"
    save_file({f"w{i}": torch.ones(1 << 20) for i in range(4)}, path)
    return path


def test_a_load_in_every_form(cli, weights, tmp_path):
    files = ["-o", "run.json", "--trace", "run.trace.json", "--html", "run.html"]
    done = cli("profile", weights, "--dtype", "bf16", *files)
    assert done.returncode == 0, done.stderr
    assert "verdict" in done.stdout
    again = cli("report", "run.json")
    assert again.stdout == done.stdout
    assert json.loads(cli("report", "run.json", "--json").stdout) == json.loads((tmp_path / "run.json").read_text())
    assert cli("report", "run.json", "--html", "2.html", "--trace", "2.json").returncode == 0
    assert (tmp_path / "2.html").read_text() == (tmp_path / "run.html").read_text()
    assert (tmp_path / "2.json").read_text() == (tmp_path / "run.trace.json").read_text()
    refused = cli("profile", weights, "--html", "run.html")
    assert refused.returncode == 1
    assert "--force" in refused.stderr


def test_json_has_the_contract(cli, weights):
    document = json.loads(cli("profile", weights, "--json", "--no-ceilings").stdout)
    assert document["command"] == "profile"
    assert document["processes"][0]["spans"]
    assert document["verdict"]["phase"]


def test_a_program(cli, weights, tmp_path):
    (tmp_path / "p.py").write_text("import sys; print(sys.argv[1:]); sys.exit(5)")
    done = cli("profile", "--no-ceilings", "--", sys.executable, "p.py", "--help", "--", "-o", "x")
    assert done.returncode == 5
    assert done.stdout == "['--help', '--', '-o', 'x']\n"
    assert "exit 5" in done.stderr
    assert cli("profile", "--no-ceilings", "--", "p.py").returncode == 5
    (tmp_path / "empty.json").write_text("{}")
    with open(tmp_path / "empty.json") as stdin:
        assert cli("profile", "--no-ceilings", "--", "-m", "json.tool", stdin=stdin).stdout == "{}\n"


def test_a_killed_program(cli, tmp_path):
    (tmp_path / "p.py").write_text("import os; os.kill(os.getpid(), 9)")
    done = cli("profile", "--no-ceilings", "--", "p.py")
    assert done.returncode == 137
    assert "SIGKILL" in done.stderr


@pytest.fixture
def model(tmp_path):
    """A directory with two checkpoints."""
    import torch
    from safetensors.torch import save_file

    for name in ("decoder", "encoder"):
        (tmp_path / "whole" / name).mkdir(parents=True)
        save_file({"w": torch.ones(1 << 18)}, tmp_path / "whole" / name / "model.safetensors")
    return tmp_path / "whole"


def test_a_whole_model(cli, model):
    done = cli("load", model, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert done.stdout.index("decoder") < done.stdout.index("encoder")
    assert "2 checkpoints: 2.1 MB" in done.stdout
    document = json.loads(cli("load", model, "--device", "cpu", "--json", "--verify").stdout)
    assert (document["target"], document["n_tensors"], document["verified_tensors"]) == (str(model), 2, 2)
    assert [part["nbytes_file"] for part in document["parts"]] == [1 << 20] * 2
    assert document["nbytes_file"] == sum(part["nbytes_file"] for part in document["parts"])
    profiled = json.loads(cli("profile", model, "--device", "cpu", "--no-ceilings", "--json").stdout)
    assert (profiled["target"], profiled["nbytes_file"]) == (str(model), 2 << 20)
    assert sum(row["busy_s"] for row in profiled["phases"]) <= profiled["seconds"] * 1.01
    assert [path.split("/")[-1] for path in checkpoint_paths(model)] == ["decoder", "encoder"], "as bench measures"
    part = cli("load", model, "--part", "decoder")
    assert part.returncode == 1


def test_prewarm_of_a_whole_model(model):
    import wan_loader

    with wan_loader.prewarm(model) as warming:
        assert warming.wait(20)
        assert warming.nbytes_read + warming.nbytes_resident >= 2 << 20


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--dtype", "bf16", "--", "true"], "--dtype: it is for a checkpoint"),
        (["--device", "cpu", "--", "true"], "--device: it is for a checkpoint"),
        (["--threads", "2", "--", "true"], "--threads: it is for a checkpoint"),
        (["--until", "x", "model.safetensors"], "--until: it is for a program"),
        (["--for", "2", "model.safetensors"], "--for: it is for a program"),
        (["--stop", "--", "true"], "--stop: it needs --until or --for"),
        (["model.safetensors", "--", "true"], "a checkpoint or a program, not both"),
    ],
)
def test_options_that_would_have_no_effect_are_errors(cli, weights, words, message):
    done = cli("profile", "--no-ceilings", *words)
    assert done.returncode == 2
    assert message in " ".join(done.stderr.replace("│", "").split())


def test_an_output_may_be_called_like_the_program(cli, tmp_path):
    (tmp_path / "p.py").write_text("print(1)")
    assert cli("profile", "--no-ceilings", "-o", "true", "--", "true").returncode == 0
    assert json.loads((tmp_path / "true").read_text())["kind"] == "program"


RUN = {
    "schema_version": 1,
    "command": "generate",
    "target": "model",
    "device": "cuda:0",
    "dtype": "bfloat16",
    "seconds": 20.0,
    "nbytes_file": 5 * 10**9,
    "phases": [{"name": "read", "busy_s": 2.0, "nbytes": 5 * 10**9, "gbps": 2.5}],
    "bottleneck": {"phase": "read", "why": "reading the files set the pace"},
    "warnings": [],
    "pipeline": {
        "time_to_first_step_s": 6.5,
        "stages": [{"name": "encode", "start_s": 1.0, "seconds": 2.0}],
        "waits": [{"name": "transformer", "start_s": 3.0, "seconds": 3.5}],
        "loads": [{"name": "transformer", "start_s": 0.5, "seconds": 6.0, "nbytes": 5 * 10**9}],
        "steps_s": [8.0, 9.5],
    },
}


@pytest.mark.parametrize("width", [80, 100, 120])
def test_report_of_a_whole_run(cli, tmp_path, width):
    (tmp_path / "run.json").write_text(json.dumps(RUN))
    done = cli("report", "run.json", env={"COLUMNS": str(width)})
    assert done.returncode == 0, done.stderr
    for text in ("generate: 20 s, 5 GB of weights to cuda:0 as bfloat16", "first denoising step: 6.5 s", "2 steps"):
        assert text in done.stdout
    rows = [line.split()[:2] for line in done.stdout.splitlines() if line.startswith(("stage", "wait", "load"))]
    assert rows == [["load", "transformer"], ["stage", "encode"], ["wait", "transformer"]]
    assert all(len(line) <= width for line in done.stdout.splitlines())
    assert json.loads(cli("report", "run.json", "--json").stdout) == RUN


def test_a_damaged_report_of_a_run(cli, tmp_path):
    for key in ("stages", "steps_s"):
        (tmp_path / "run.json").write_text(json.dumps({**RUN, "pipeline": {**RUN["pipeline"], key: [None]}}))
        done = cli("report", "run.json")
        assert (done.returncode, "is not a report that --profile-out wrote" in done.stderr) == (1, True)
    (tmp_path / "run.json").write_text(json.dumps(RUN))
    assert cli("report", "run.json", "--html", "x.html").returncode == 2
    assert cli("report", "run.json", "--svg", "x.svg").returncode == 0
    assert "load transformer" in (tmp_path / "x.svg").read_text()


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["profile", "--", "no-such-program"], 1, "no-such-program"),
        (["profile", "--"], 2, "after --"),
        (["profile"], 2, "program after --"),
        (["profile", "nowhere.safetensors"], 1, "nowhere.safetensors"),
        (["profile", "a", "b"], 2, "unexpected"),
        (["report", "nowhere.json"], 1, "nowhere.json"),
        (["estimate", "nowhere"], 1, "nowhere"),
        (["doctor", "nowhere"], 1, "nowhere"),
    ],
)
def test_mistakes_are_one_clear_message(cli, words, code, message):
    done = cli(*words)
    assert done.returncode == code
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_estimate(cli, weights):
    table = cli("estimate", weights).stdout
    assert all(name in table for name in ("hdd", "nvme-gen4", "tmpfs"))
    document = json.loads(
        cli("estimate", weights, "--disk", "150MB/s", "--disk", "hdd", "--pcie", "12GB/s", "--json").stdout
    )
    assert [row["storage"] for row in document["estimates"]] == ["150MB/s", "hdd"]
    assert document["estimates"][0]["read_s"] == pytest.approx(document["nbytes"] / 150e6)
    assert cli("estimate", weights, "--disk", "fast").returncode == 2


def test_estimate_says_what_it_takes_for_granted(cli, weights):
    told = cli("estimate", weights, "--pcie", "12GB/s").stdout
    assert "(PCIe) at 12 GB/s (as asked for)" in told
    assert "casts at 1.5 TB/s (assumed)" in told
    assert "fixed: imports and the start of CUDA before the first byte, 2.5 s (assumed)" in told
    assert "limit: " in told


def test_estimate_of_half_a_model_warns(cli, weights, tmp_path):
    model = tmp_path / "model"
    for expert in ("high_noise_model", "low_noise_model"):
        (model / expert).mkdir(parents=True)
    weights.rename(model / "high_noise_model" / "model.safetensors")
    done = cli("estimate", model, "--json")
    (warning,) = json.loads(done.stdout)["warnings"]
    assert "not complete" in warning
    assert "missing (" in warning
    assert warning in done.stderr


def test_doctor_is_readable_and_true_and_estimates_take_what_it_measured(cli, weights):
    first, again = (cli("doctor", weights, "--device", "cpu").stdout for _ in range(2))
    assert "measured before, the oldest " not in first
    assert "measured before, the oldest " in again
    assert f"1 file, {format_bytes(weights.stat().st_size)}, " in again
    assert "GPU" in again
    assert "not looked at: --device cpu" in again
    for raw in ("nbytes", "resident", "False", "True", "memory stall", "h2d", "\nn "):
        assert raw not in again
    assert again.count("allowed here") == 1
    document = json.loads(cli("doctor", weights, "--json", "--device", "cpu").stdout)
    assert document["ceilings"]["page_cache_gbps"] > 0
    assert document["files"]["nbytes"] == weights.stat().st_size
    measured = json.loads(cli("estimate", weights, "--device", "cpu", "--json").stdout)["rates"]
    assert {rate["origin"] for rate in measured.values()} == {"measured here"}
    nothing = cli("doctor", env={"CUDA_VISIBLE_DEVICES": ""}).stdout
    assert "none given" in nothing
    assert "none found that torch can use" in nothing


def test_an_fp32_file_asked_for_in_bf16_is_advised_about(cli, tmp_path):
    import torch
    from safetensors.torch import save_file

    save_file({"a": torch.randn(50_000_000)}, tmp_path / "fp32.safetensors")
    done = cli(
        "profile", tmp_path / "fp32.safetensors", "--device", "cpu", "--dtype", "bf16", "--no-ceilings", "--json"
    )
    assert done.returncode == 0, done.stderr
    assert "fp32-file" in [found["rule"] for found in json.loads(done.stdout)["advice"]]
