"""The command as a process: output, JSON contract, exit codes, one clear line for every mistake."""

import json
import os
import re
import resource
import signal
import struct
import subprocess
import sys
import time

import psutil
import pytest
import torch
from loader_cases import storable
from programs import Program, check_error, check_usage, wan_loader_itself
from programs import wan_loader as run
from safetensors.torch import save_file

PHASES = {
    "import",
    "cuda_init",
    "header",
    "init",
    "register",
    "read",
    "wait",
    "h2d",
    "cast",
    "assign",
    "shard",
    "other",
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Small checkpoints; tests must not change them."""
    root = tmp_path_factory.mktemp("files")
    base = torch.arange(3000, dtype=torch.float32).view(50, 60)
    odd = {
        "w": base,
        "bf16": torch.randn(33).bfloat16(),
        "fp16": torch.randn(7).half(),
        "fp8": torch.randn(5).to(torch.float8_e4m3fn),
        "int": torch.arange(9),
        "bool": torch.tensor([True, False, True]),
        "complex": torch.tensor([1 + 2j]),
        "nan": torch.tensor([float("nan"), float("inf"), -0.0, 1e-42]),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 4),
    }
    odd = storable(odd)
    save_file(odd, root / "model.safetensors")
    torch.save({**odd, "tied": base, "column": base[:, 3], "transposed": base.t()}, root / "model.pth")
    torch.save({"w": base, "b": torch.ones(4)}, root / "legacy.pth", _use_new_zipfile_serialization=False)
    (root / "bad.safetensors").write_bytes(struct.pack("<Q", 2**63) + b"{}")
    (root / "cut.safetensors").write_bytes((root / "model.safetensors").read_bytes()[:-1])
    (root / "empty").mkdir()
    return root


# Help


def test_help_lists_the_commands():
    done = wan_loader_itself("--help")
    assert done.returncode == 0
    assert done.stderr == ""
    for command in ("inspect", "load", "profile", "synth"):
        assert command in done.stdout


@pytest.mark.parametrize("arguments", [["--help"], ["load", "-h"], ["profile", "--help"]])
def test_help_of_commands_answers_without_torch(arguments):
    code = (
        "import sys; from wan_loader.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code\n"
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout


def test_help_answers_quickly():
    """As far as that depends upon us, and not upon who else uses the machine."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    wan_loader_itself("--help")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert 0 < after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1


def test_options_of_the_contract_are_there():
    """Asked in a wide terminal, so that nothing is wrapped or cut."""
    text = run("load", "--help").stdout
    for option in ("--device", "--dtype", "--io", "--threads", "--verify", "--json"):
        assert option in text
    text = run("profile", "--help").stdout
    for option in ("--device", "--dtype", "--io", "--threads", "--json", "-o", "--force"):
        assert option in text


def test_version():
    import wan_loader

    done = run("--version")
    assert (done.returncode, done.stdout) == (0, f"wan-loader {wan_loader.__version__}\n")


# inspect


def test_inspect_prints_what_there_is(files):
    done = run("inspect", files / "model.safetensors")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    for word in ("model.safetensors", "10 tensors", "bfloat16", "float8_e4m3fn"):
        assert word in done.stdout


def test_inspect_json(files):
    done = run("inspect", files / "model.safetensors", "--json", "--tensors")
    assert (done.returncode, done.stderr) == (0, "")
    document = json.loads(done.stdout)
    assert document["schema_version"] == 1
    assert document["command"] == "inspect"
    assert document["target"] == str(files / "model.safetensors")
    assert document["format"] == "safetensors"
    assert document["n_tensors"] == len(document["tensors"]) == 10
    assert document["nbytes_file"] == (files / "model.safetensors").stat().st_size
    assert document["nbytes"] == sum(d["nbytes"] for d in document["dtypes"])
    assert {"name": "scalar", "dtype": "float32", "shape": [], "nbytes": 4} in document["tensors"]
    (file,) = document["files"]
    assert file["resident"] >= 0
    assert document["warnings"] == []


def test_inspect_does_not_import_torch(files):
    code = (
        "import sys; from wan_loader.cli.app import app; app(standalone_mode=False); sys.exit('torch' in sys.modules)"
    )
    for name in ("model.safetensors", "model.pth"):
        command = [sys.executable, "-c", code, "inspect", str(files / name)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "names",
    [
        {"directory": "a", "file": "m.safetensors", "tensor": "[bold]x[/y]"},
        {"directory": "a", "file": "[red]m.safetensors", "tensor": "x"},
        {"directory": "a[", "file": "b]m.safetensors", "tensor": "x"},
    ],
    ids=["tensor", "file", "directory"],
)
def test_inspect_names_that_look_like_markup(tmp_path, names):
    """Names come from strangers; they are text, not styles."""
    path = tmp_path / names["directory"] / names["file"]
    path.parent.mkdir()
    save_file({names["tensor"]: torch.ones(2)}, path)
    done = run("inspect", path, "--tensors")
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert f"{names['directory']}/{names['file']}" in done.stdout.replace("\n", "")
    assert names["tensor"] in done.stdout


def test_inspect_names_that_would_steer_the_terminal(tmp_path):
    save_file({"a\x1b]0;title\x07b\x1b[2J": torch.ones(2)}, tmp_path / "model.safetensors")
    done = run("inspect", tmp_path, "--tensors")
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout
    assert "\x07" not in done.stdout


# load and profile


def check_document(document, command, path):
    """The contract of `--json`: integers for bytes, seconds as floats."""
    assert document["schema_version"] == 1
    assert document["command"] == command
    assert document["target"] == str(path)
    assert isinstance(document["device"], str)
    assert document["dtype"] is None or isinstance(document["dtype"], str)
    for key in ("seconds", "gbps"):
        assert type(document[key]) is float
    for key in ("nbytes_file", "nbytes_device", "n_tensors"):
        assert type(document[key]) is int
    io = document["io"]
    assert isinstance(io["mode"], str)
    assert isinstance(io["reason"], str)
    for key in ("resident_before", "nbytes_mapped", "nbytes_direct", "nbytes_buffered"):
        assert type(io[key]) is int
        assert io[key] >= 0
    assert document["phases"]
    assert {p["name"] for p in document["phases"]} <= PHASES
    for phase in document["phases"]:
        assert type(phase["busy_s"]) is float
        assert type(phase["nbytes"]) is int
        assert type(phase["gbps"]) is float
        assert 0 <= phase["busy_s"] <= document["seconds"]
    bottleneck = document["bottleneck"]
    assert bottleneck["phase"] in PHASES
    assert isinstance(bottleneck["why"], str)
    assert isinstance(bottleneck["advice"], list)
    for key in ("ceiling_gbps", "reached"):
        assert bottleneck[key] is None or type(bottleneck[key]) is float
    for key in ("host_peak_bytes", "pinned_bytes", "device_peak_bytes"):
        assert type(document["memory"][key]) is int
    assert isinstance(document["machine"], dict)
    assert isinstance(document["settings"], dict)
    assert all(isinstance(warning, str) for warning in document["warnings"])


def test_load_prints_a_table(files):
    done = wan_loader_itself("load", files / "model.safetensors")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    for word in ("model.safetensors", "10 tensors", "phase", "import", "overlap", "cpu"):
        assert word in done.stdout


@pytest.mark.parametrize("io", ["auto", "direct", "buffered"])
def test_load_json(files, io):
    path = files / "model.safetensors"
    done = run("load", path, "--device", "cpu", "--json", "--io", io, "--threads", 2)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    check_document(document, "load", path)
    assert document["device"] == "cpu"
    assert document["dtype"] is None
    assert document["n_tensors"] == 10
    nbytes = sum(document["io"][f"nbytes_{way}"] for way in ("mapped", "direct", "buffered"))
    assert nbytes >= document["nbytes_file"] == document["nbytes_device"]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("model.safetensors", None), ("model.safetensors", "bf16"), ("model.pth", None), ("model.pth", "fp16")],
)
def test_load_verify(files, name, dtype):
    options = ["--dtype", dtype] if dtype else []
    done = run("load", files / name, "--device", "cpu", "--verify", "--json", *options)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    check_document(document, "load", files / name)
    assert document["verified_tensors"] == document["n_tensors"] == (10 if name == "model.safetensors" else 13)
    assert document["dtype"] == {None: None, "bf16": "bfloat16", "fp16": "float16"}[dtype]


def test_load_a_legacy_pickle_with_verify_warns_on_stderr(files):
    done = run("load", files / "legacy.pth", "--device", "cpu", "--verify", "--json", "--dtype", "bf16")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    check_document(document, "load", files / "legacy.pth")
    assert document["verified_tensors"] == 2
    assert "legacy" in document["warnings"][0]
    assert "legacy" in done.stderr


def test_profile_json_and_output_file(files, tmp_path):
    path, output = files / "model.safetensors", tmp_path / "run.json"
    done = run("profile", path, "--device", "cpu", "--dtype", "bf16", "--json", "-o", output)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    check_document(document, "profile", path)
    assert document["dtype"] == "bfloat16"
    assert json.loads(output.read_text()) == document
    assert [p.name for p in tmp_path.iterdir()] == ["run.json"]


def test_profile_overwrites_only_with_force(files, tmp_path):
    output = tmp_path / "run.json"
    output.write_text("precious")
    start = time.perf_counter()
    done = run("profile", files / "model.safetensors", "--device", "cpu", "-o", output)
    check_error(done, output, "--force")
    assert output.read_text() == "precious"
    assert time.perf_counter() - start < 5
    done = run("profile", files / "model.safetensors", "--device", "cpu", "-o", output, "--force")
    assert done.returncode == 0, done.stderr
    check_document(json.loads(output.read_text()), "profile", files / "model.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["run.json"]


@pytest.mark.parametrize("output", ["no/such/directory/run.json", "."])
def test_profile_output_that_cannot_be_written(files, tmp_path, output):
    done = run("profile", files / "model.safetensors", "--device", "cpu", "-o", tmp_path / output, "--force")
    check_error(done, tmp_path)


# Mistakes


@pytest.mark.parametrize("name", ["bad.safetensors", "cut.safetensors", "missing.safetensors", "empty"])
@pytest.mark.parametrize("command", ["inspect", "load"])
def test_bad_input_is_one_line(files, command, name):
    check_error(run(command, files / name, "--json"), files / name)


def test_an_evil_pickle_is_one_line(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'executed'}",)

    torch.save({"w": Evil()}, tmp_path / "evil.pth")
    check_error(run("load", tmp_path / "evil.pth", "--device", "cpu"), "evil.pth")
    assert not (tmp_path / "executed").exists()


def test_a_name_with_line_breaks_is_still_one_line(tmp_path):
    header = json.dumps({"a\nerror: b": {"dtype": "F7", "shape": [1], "data_offsets": [0, 4]}}).encode()
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    check_error(run("inspect", tmp_path / "x.safetensors"), "F7")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": "a\nb"}}))
    check_error(run("inspect", tmp_path / "model.safetensors.index.json"), "plain file name")


def test_verbose_shows_the_traceback(files):
    done = run("inspect", files / "bad.safetensors", "-v")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ")


def test_a_device_that_does_not_exist(files):
    done = run("load", files / "model.safetensors", "--device", "cuda:7")
    check_error(done, "cuda:7")


def test_a_device_or_dtype_that_is_none(files):
    for option, value in (("--device", "banana"), ("--dtype", "int8")):
        done = run("load", files / "model.safetensors", option, value)
        assert done.returncode in (1, 2), done.stderr
        assert value in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["load"], "PATH"),
        (["nonsense"], "nonsense"),
        (["load", "x", "--nonsense"], "--nonsense"),
        (["load", "x", "--io", "teleport"], "teleport"),
        (["load", "x", "--threads", "0"], "--threads"),
        (["load", "x", "--threads", "65"], "--threads"),
        (["load", "x", "--threads", "many"], "--threads"),
        (["load", "x", "y"], "y"),
    ],
)
def test_usage_errors(arguments, word):
    check_usage(run(*arguments), word)


# Ctrl-C


@pytest.fixture
def large_file(tmp_path):
    """3 GB that take no disk."""
    path = tmp_path / "large.safetensors"
    n_tensors, nbytes = 24, 125_000_000
    header = json.dumps(
        {
            f"w{i}": {"dtype": "F32", "shape": [nbytes // 4], "data_offsets": [i * nbytes, (i + 1) * nbytes]}
            for i in range(n_tensors)
        }
    ).encode()
    with path.open("wb") as f:
        f.write(struct.pack("<Q", len(header)) + header)
        f.truncate(8 + len(header) + n_tensors * nbytes)
    yield path
    path.unlink()


@pytest.mark.parametrize("options", [["--io", "buffered"], ["--io", "buffered", "--dtype", "bf16", "--threads", "1"]])
def test_ctrl_c_ends_a_load(large_file, options):
    with Program("-m", "wan_loader", "load", large_file, "--device", "cpu", "--json", *options) as process:
        observed = psutil.Process(process.pid)
        deadline = time.perf_counter() + 30
        while observed.io_counters().read_chars < 400_000_000:
            assert process.poll() is None, process.output()
            assert time.perf_counter() < deadline
            time.sleep(0.005)
        interrupted = time.perf_counter()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
        seconds = time.perf_counter() - interrupted
    assert process.returncode == 130, err
    assert out == ""
    assert "Traceback" not in err
    assert not re.search(r"Exception|Error", err)
    assert seconds < 1.5
