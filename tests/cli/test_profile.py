"""profile, report, doctor and estimate as a user types them."""

import json
import sys

import pytest
from programs import run

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
    assert cli("doctor", "--device", "cpu").returncode == 0
    measured = json.loads(cli("estimate", weights, "--device", "cpu", "--json").stdout)["rates"]
    assert {rate["origin"] for rate in measured.values()} == {"measured here"}


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


def test_doctor(cli, weights):
    document = json.loads(cli("doctor", weights, "--json", "--device", "cpu").stdout)
    assert document["ceilings"]["page_cache_gbps"] > 0
    assert document["files"]["nbytes"] == weights.stat().st_size
    assert "doctor" in cli("--help").stdout


def test_doctor_is_readable_and_true(cli, weights):
    first, again = (cli("doctor", weights, "--device", "cpu").stdout for _ in range(2))
    assert "measured before, the oldest " not in first
    assert "measured before, the oldest " in again
    assert f"1 file, {format_bytes(weights.stat().st_size)}, " in again
    assert "GPU" in again
    assert "not looked at: --device cpu" in again
    for raw in ("nbytes", "resident", "False", "True", "memory stall", "h2d", "\nn "):
        assert raw not in again
    assert again.count("allowed here") == 1
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
