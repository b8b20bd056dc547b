"""What goes wrong around a command, and what it says: one line that names the file or the option, no traceback."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from programs import check_error, check_usage, wan_loader_itself
from programs import wan_loader as run
from safetensors.torch import save_file


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"w": torch.randn(64, 64)}, path)
    return path


@pytest.fixture
def closed(tmp_path):
    """A file in a directory that may not be entered, and the prefix under which that holds for root, too."""
    path = tmp_path / "closed" / "model.safetensors"
    path.parent.mkdir()
    save_file({"w": torch.zeros(4)}, path)
    path.parent.chmod(0)
    prefix = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.getuid() == 0 else []
    if prefix and (not shutil.which("setpriv") or subprocess.run([*prefix, "true"], check=False).returncode):
        pytest.skip("root may do everything here")
    yield path, prefix
    path.parent.chmod(0o700)


@pytest.mark.parametrize(
    "words",
    [
        ["inspect"],
        ["estimate"],
        ["doctor"],
        ["run"],
        ["cache", "build"],
        ["load"],
        ["profile"],
        ["warm"],
        ["evict"],
        ["stage", "--to", "."],
        ["bench", "--loader", "ours"],
    ],
    ids=" ".join,
)
def test_a_directory_that_may_not_be_entered(closed, words):
    path, prefix = closed
    done = wan_loader_itself(*words, path, prefix=prefix)
    check_error(done, path, "Permission denied")
    assert "does not exist" not in done.stderr


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("words", [["inspect"], ["inspect", "--json"]], ids=" ".join)
def test_stdout_on_a_full_disk(model, words, unbuffered):
    with open("/dev/full", "w") as full:
        done = wan_loader_itself(*words, model, stdout=full, PYTHONUNBUFFERED=unbuffered)
    check_error(done, "standard output", "No space left")


def test_a_reader_that_left_is_no_news(model):
    read, write = os.pipe()
    os.close(read)
    done = wan_loader_itself("inspect", "--json", model, stdout=write)
    os.close(write)
    assert (done.returncode, done.stderr) == (1, "")


def test_a_script_keeps_the_traceback_of_its_own_errors(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("open('/nowhere/at/all')\n")
    done = run("run", "--quiet", script)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("FileNotFoundError")


# Files that cannot be written after the work


def test_a_profile_is_shown_though_a_file_of_it_cannot_be_written(model, tmp_path):
    too_long = tmp_path / ("x" * 250)
    done = run("profile", model, "--no-ceilings", "-o", too_long, "--html", tmp_path / "run.html")
    assert done.returncode == 1
    assert "phase" in done.stdout
    assert f"error: {too_long} cannot be written" in done.stderr
    assert f"written: {tmp_path / 'run.html'}\n" in done.stderr
    assert (tmp_path / "run.html").exists()


def test_a_bench_is_shown_though_a_file_of_it_cannot_be_written(model, tmp_path):
    too_long = tmp_path / ("x" * 250)
    options = ["--loader", "ours", "--repeat", "1", "--export-json", too_long, "--export-markdown", tmp_path / "b.md"]
    done = run("bench", model, *options)
    assert done.returncode == 1, done.stderr
    assert "ours" in done.stdout
    assert f"error: {too_long} cannot be written" in done.stderr
    assert (tmp_path / "b.md").exists()


# What --help promises


def test_help_of_cache_build_names_its_dtype(model, tmp_path):
    assert "bfloat16" in " ".join(run("cache", "build", "--help").stdout.split())
    assert run("cache", "build", model, "--cache-dir", tmp_path / "cache").returncode == 0
    assert "bfloat16" in run("cache", "list", "--cache-dir", tmp_path / "cache").stdout


# Values that make no sense


@pytest.mark.parametrize(
    ("words", "option", "hints"),
    [
        (["load", "x", "--device", "gpu"], "--device", ["'gpu'", "cuda:N"]),
        (["bench", "x", "--device", "gpu"], "--device", ["'gpu'", "cuda:N"]),
        (["estimate", "x", "--device", "gpu"], "--device", ["'gpu'", "'cpu'"]),
        (["estimate", "x", "--disk", "foo"], "--disk", ["'foo'", "hdd", "nvme-gen4", "150MB/s"]),
        (["estimate", "x", "--disk", "3XB/s"], "--disk", ["'3XB/s'"]),
        (["estimate", "x", "--pcie", "foo"], "--pcie", ["'foo'"]),
        (["warm", "x", "--limit", "100XB"], "--limit", ["'100XB'", "3GB"]),
        (["bench", "x", "--part", "100XB"], "--part", ["'100XB'", "3GB"]),
        (["cache", "build", "x", "--max-size", "10XB"], "--max-size", ["'10XB'", "3GB"]),
        (["cache", "prune", "--max-size", "10XB"], "--max-size", ["'10XB'", "3GB"]),
        (["cache", "prune", "--max-age", "old"], "--max-age", ["'old'", "30d"]),
        (["load", "x", "--cache-dir", "y"], "--cache-dir", ["needs --cache"]),
        (["load", "x", "--io", "fast"], "--io", ["'fast'", "'mapped'"]),
        (["profile", "--"], "", ["name a program after --"]),
    ],
    ids=lambda words: " ".join(words) if isinstance(words, list) else None,
)
def test_a_wrong_value_is_a_usage_error_that_names_the_option(words, option, hints):
    check_usage(run(*words), option, *hints)


# Words


def test_one_of_something_is_no_plural(tmp_path):
    one = tmp_path / "one.safetensors"
    save_file({"w": torch.zeros(4)}, one)
    assert "1 tensor," in run("inspect", one).stdout
    assert "1 tensor," in run("load", one).stdout
    assert "1 tensor," in run("load", one, "--verify").stderr
    cache = ["--cache-dir", tmp_path / "cache"]
    assert run("cache", "build", one, *cache).returncode == 0
    assert run("cache", "verify", *cache).stdout == "1 of 1 entry is sound\n"
    assert run("cache", "clear", "--yes", *cache).stdout.startswith("1 entry removed, ")
    script = tmp_path / "script.py"
    script.write_text("")
    assert "0 loads took" in run("run", script).stderr


def test_stage_says_what_force_replaces_and_remove_takes(tmp_path):
    source, target = tmp_path / "model", tmp_path / "to"
    for directory in (source, target / "model"):
        directory.mkdir(parents=True)
        save_file({"w": torch.zeros(4)}, directory / "model.safetensors")
    (target / "model" / "mine.txt").write_text("kept")
    done = run("stage", source, "--to", target)
    check_error(done, "replaces files of the same names", "--remove")
    assert run("stage", source, "--to", target, "--force").returncode == 0
    done = run("stage", source, "--to", target, "--remove")
    assert "1 file, " in done.stdout
    assert [p.name for p in (target / "model").iterdir()] == ["mine.txt"]


def test_an_unfinished_copy_that_is_removed_is_no_number_of_files(tmp_path):
    source, target = tmp_path / "large.safetensors", tmp_path / "to"
    save_file({"w": torch.zeros(200_000)}, source)
    code = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
    code += "from wan_loader.cli import main; main()"
    subprocess.run([sys.executable, "-c", code, "stage", source, "--to", target], check=False, capture_output=True)
    assert "what was unfinished, " in run("stage", "--remove", "--to", target).stdout


def test_a_bench_of_a_part_says_when_it_is_all(model):
    options = ["--loader", "ours", "--repeat", "1", "--part"]
    note = "--part takes whole files: this is all of model.safetensors, 1 file, 16.5 kB"
    done = run("bench", model, *options, "1kB")
    assert done.returncode == 0, done.stderr
    assert note in done.stderr
    assert note in done.stdout
    assert "--part" not in run("bench", model, *options, "1MB").stdout


def test_stage_makes_one_directory_and_says_so(model, tmp_path):
    check_error(run("stage", model, "--to", tmp_path / "typo" / "deeper"), tmp_path / "typo", "does not exist")
    assert not (tmp_path / "typo").exists()
    done = run("stage", model, "--to", tmp_path / "new")
    assert done.returncode == 0
    assert f"{tmp_path / 'new'} did not exist, and was made" in done.stdout
    assert "was made" not in run("stage", model, "--to", tmp_path / "new").stdout
