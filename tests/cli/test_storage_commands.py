"""`warm`, `evict`, `stage` and `inspect` of a model's directory, as commands: output, exit codes, mistakes, Ctrl-C."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from programs import check_error
from programs import wan_loader as run


@pytest.fixture
def model(tmp_path, evict):
    """A directory on a path of 300 characters, with spaces and more; everything in it is cold."""
    root = tmp_path / ("long name ü [red] " * 7 + "'") / ("x" * 150) / "Wan ü"
    for name, nbytes in {
        "high_noise_model/a.safetensors": 300_000,
        "vae/b.safetensors": 5000,
        "config.json": 2,
    }.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(os.urandom(nbytes))
        evict(path)
    assert len(str(root)) > 300
    return root


def test_warm_and_evict(model):
    done = run("warm", model)
    assert (done.returncode, done.stderr) == (0, "")
    assert "before: 0 B (0%)" in done.stdout
    assert "now:    305 kB (100%)" in done.stdout
    done = run("evict", model)
    assert (done.returncode, done.stderr) == (0, "")
    assert "before: 0 B" not in done.stdout
    assert "now:    0 B" in done.stdout


def test_their_json(model):
    done = run("warm", model, "--json", "--limit", "100kB")
    document = json.loads(done.stdout)
    assert (document["command"], document["target"]) == ("warm", str(model))
    assert document["nbytes"] == document["resident_after"] == document["nbytes_read"] == 100_000
    assert document["complete"]
    assert type(document["seconds"]) is type(document["gbps"]) is float
    document = json.loads(run("evict", model, "--json").stdout)
    assert document["complete"]
    assert document["resident_before"] > 0
    assert [file["resident_after"] for file in document["files"]] == [0, 0, 0]


@pytest.fixture
def unknown(monkeypatch):
    """A kernel that does not tell, and a file system without reads that do not wait."""
    monkeypatch.setattr("wan_loader.system.page_cache.cached_bytes", lambda *_: os.close(-1))
    monkeypatch.setattr("wan_loader.system.page_cache._Tries.is_there", lambda *_: os.close(-1))


@pytest.mark.parametrize(("command", "code"), [("warm", 0), ("evict", 1)])
def test_what_is_unknown_is_said(model, unknown, command, code, capsys, call_main):
    from wan_loader.cli import main

    for flags in ([], ["--json"]):
        assert call_main(main, command, model, *flags) == code
        out, err = capsys.readouterr()
        assert "unknown: the kernel tells only who owns" in err
        if not flags:
            assert re.search("before:.*unknown", out)
    document = json.loads(out)
    assert document["resident_before"] is document["resident_after"] is None
    assert not document["complete"]


def test_evict_of_pages_in_use_says_so_and_exits_with_1(model):
    path = model / "vae/b.safetensors"
    code = (
        "import mmap, sys; f = open(sys.argv[1], 'rb'); m = mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ)\n"
        "sum(m[::4096]); print(flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        other.stdout.readline()
        done = run("evict", model)
        other.communicate("\n")
    assert done.returncode == 1
    assert re.search(r"b\.safetensors: 5 kB stay: mapped by .* \(\d+\)", done.stderr)


def test_stage_says_where_it_is_and_how_to_use_and_remove_it(model, tmp_path):
    target = tmp_path / "fast disk"
    done = run("stage", model, "--to", target)
    assert (done.returncode, done.stderr) == (0, "")
    copy = target / model.name
    assert (copy / "vae/b.safetensors").read_bytes() == (model / "vae/b.safetensors").read_bytes()
    assert str(copy) in done.stdout.splitlines()[0]
    assert "305 kB read back and compared" in done.stdout
    assert f"--remove --to '{target}'" in done.stdout
    document = json.loads(run("stage", model, "--to", target, "--json", "--verify").stdout)
    assert (document["path"], document["nbytes_copied"]) == (str(copy), 0)
    assert document["nbytes_verified"] == document["nbytes"] == 305_002
    other = tmp_path / model.name
    other.mkdir()
    check_error(run("stage", other, "--remove", "--to", target), "was staged from", str(model))
    document = json.loads(run("stage", model, "--remove", "--to", target, "--json").stdout)
    assert document["removed"] == [model.name]
    assert not list(target.iterdir())
    check_error(run("stage", "--remove", "--to", target), "nothing is staged")


@pytest.mark.parametrize("size", ["lots", "0", "-3GB", "3 parsecs"])
def test_a_size_that_does_not_parse(model, size):
    done = run("warm", model, f"--limit={size}")
    assert done.returncode == 2
    assert "--limit" in done.stderr
    assert size in done.stderr


@pytest.mark.parametrize("command", [["warm"], ["evict"], ["stage", "--to", "."]])
def test_what_is_not_there(tmp_path, command):
    check_error(run(*command, tmp_path / "missing"), "missing", "does not exist")
    (tmp_path / "empty").mkdir()
    check_error(run(*command, tmp_path / "empty"), "holds no checkpoint")


def test_stage_needs_a_path_or_remove(tmp_path):
    done = run("stage", "--to", tmp_path)
    assert done.returncode == 2
    assert "PATH" in done.stderr


@pytest.mark.parametrize("command", ["warm", "evict", "stage", "download", "inspect"])
def test_help_has_an_example_and_needs_no_torch(command):
    code = (
        "import sys; from wan_loader.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code\n"
        "sys.exit('torch' in sys.modules or 'huggingface_hub' in sys.modules or 'xxhash' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, command, "-h"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"wan-loader {command} " in done.stdout


@pytest.mark.parametrize("command", ["warm", "evict", "stage"])
def test_they_run_without_torch(model, tmp_path, command):
    code = (
        "import sys; from wan_loader.cli.app import app; app(standalone_mode=False); sys.exit('torch' in sys.modules)"
    )
    options = ["--to", tmp_path / "t"] if command == "stage" else []
    arguments = [sys.executable, "-c", code, command, str(model), *options]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", ["stage", "warm"])
def test_ctrl_c_ends_it_within_a_second_and_the_next_run_goes_on(tmp_path, evict, command):
    """The first block hangs, as on a dead network disk."""
    source, target = tmp_path / "source.safetensors", tmp_path / "t"
    source.write_bytes(os.urandom(200_000))
    evict(source)
    code = (
        "import os, sys, time\n"
        "def hang(*arguments): print('hangs', file=sys.stderr, flush=True); time.sleep(60)\n"
        "from wan_loader.cli import main\n"
        "os.preadv = hang; main()"
    )
    options = ["--to", str(target)] if command == "stage" else []
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = subprocess.Popen(
            [sys.executable, "-c", code, command, str(source), *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    finally:
        signal.signal(signal.SIGINT, before)
    with process:
        assert process.stderr.readline() == "hangs\n"
        start = time.perf_counter()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
        seconds = time.perf_counter() - start
    assert process.returncode == 130
    assert out == ""
    assert "Traceback" not in err
    assert seconds < 1.5
    assert run(command, source, *options).returncode == 0


def test_inspect_of_half_a_model(tmp_path):
    (tmp_path / "high_noise_model").mkdir()
    (tmp_path / "Wan2.1_VAE.pth").write_bytes(b"")
    done = run("inspect", tmp_path)
    assert done.returncode == 1
    for name in ("low_noise_model/", "high_noise_model/config.json", "models_t5_umt5-xxl-enc-bf16.pth"):
        assert name in done.stdout
    absent = ["models_t5_umt5-xxl-enc-bf16.pth", "high_noise_model/config.json"]
    absent += ["high_noise_model/diffusion_pytorch_model.safetensors.index.json", "low_noise_model/"]
    absent += ["google/umt5-xxl/tokenizer.json", "google/umt5-xxl/tokenizer_config.json"]
    missing = f"{', '.join(absent[:-1])} and {absent[-1]} are missing"
    assert f"is not complete: {missing}" in " ".join(done.stderr.split())
    assert "wan-loader download Wan-AI/Wan2.2-T2V-A14B" in done.stderr
