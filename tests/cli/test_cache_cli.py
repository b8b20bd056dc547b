"""`wan-loader cache` and `load --cache` as people use them: as processes."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from entries import flip, left_over
from programs import Program, check_error, check_usage, wan_loader_itself
from programs import run as run_python
from programs import wan_loader as run
from safetensors.torch import load_file, save_file

from wan_loader.cache.store import Store

NO_CUDA = {"CUDA_VISIBLE_DEVICES": ""}


def ok(*arguments, code=0):
    done = run(*arguments)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout


def document(*arguments, code=0):
    """The one JSON document on stdout."""
    parsed = json.loads(ok(*arguments, "--json", code=code))
    assert parsed["schema_version"] == 1
    return parsed


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("ckpt") / "my model.safetensors"
    torch.manual_seed(9)
    save_file({"big": torch.randn(700, 1024), "odd": torch.randn(1023)}, path)
    return path


@pytest.fixture(scope="module")
def built(model, tmp_path_factory):
    """A cache with one entry, as `cache build` made it, and its document; tests copy it."""
    cache = tmp_path_factory.mktemp("built") / "cache"
    done = wan_loader_itself("cache", "build", model, "--cache-dir", cache, "--contents", "--json")
    return cache, json.loads(done.stdout)


@pytest.fixture
def cache(built, tmp_path):
    shutil.copytree(built[0], tmp_path / "cache")
    return tmp_path / "cache"


def entry_file(cache):
    (entry,) = (cache / "entries").iterdir()
    return entry / "model.safetensors"


# build and load


def test_build(built, model):
    cache, said = built
    assert (said["command"], said["state"]) == ("cache build", "built")
    assert said["nbytes_written"] == 2 * (700 * 1024 + 1023)
    for name, tensor in load_file(entry_file(cache)).items():
        assert torch.equal(tensor, load_file(model)[name].bfloat16())


def test_build_again(cache, model):
    said = document("cache", "build", model, "--cache-dir", cache)
    assert (said["state"], said["nbytes_written"]) == ("present", 0)
    out = ok("cache", "build", model, "--dtype", "fp16", "--cache-dir", cache, "--max-size", "100MB")
    assert "written: 1.44 MB" in out
    assert len(list((cache / "entries").iterdir())) == 2


def test_load_reads_what_build_made(cache, model):
    done = run("load", model, "--dtype", "bf16", "--cache", "--cache-dir", cache, "--verify")
    assert re.search(r"cache: read from the entry .*entries/\w{32}", done.stdout)
    assert "every checksum" in done.stderr


def test_load_leaves_an_entry_behind(tmp_path, model):
    cache = tmp_path / "cache"
    done = run("load", model, "--dtype", "fp16", "--cache", "--cache-dir", cache, "--json")
    assert json.loads(done.stdout)["cache"]["state"] == "building"
    assert f"cached: {entry_file(cache).parent}" in done.stderr
    assert not left_over(cache)
    said = document("load", model, "--dtype", "fp16", "--cache", "--cache-dir", cache)
    assert said["cache"]["state"] == "hit"
    assert said["nbytes_file"] == 2 * (700 * 1024 + 1023)
    assert said["target"] == str(model)


def test_the_users_cache_directory(tmp_path, model):
    environment = {"XDG_CACHE_HOME": str(tmp_path / "xdg")}
    assert run("load", model, "--dtype", "bf16", "--cache", **environment).returncode == 0
    assert len(list((tmp_path / "xdg" / "wan-loader" / "converted" / "entries").iterdir())) == 1
    assert "my model.safetensors" in run("cache", "list", **environment).stdout


# list


def test_list(cache, model):
    (entry,) = document("cache", "list", "--cache-dir", cache)["entries"]
    assert set(entry) == {"key", "path", "nbytes", "used", "state", "source", "dtype", "created"}
    assert (entry["state"], entry["source"], entry["dtype"]) == ("complete", str(model), "bfloat16")
    assert entry["nbytes"] > 2 * 700 * 1024
    out = ok("cache", "list", "--cache-dir", cache)
    assert entry["key"][:12] in out
    assert "bfloat16" in out
    assert re.search(r"\d+ (s|min) ago", out)


@pytest.mark.parametrize("command", [["list"], ["verify"], ["prune"], ["clear", "--yes"]])
def test_no_cache_at_all(tmp_path, command):
    ok("cache", *command, "--cache-dir", tmp_path / "none")
    assert not (tmp_path / "none").exists()


# verify

PLACES = {"header": 100, "padding": 4000, "data": 900_000, "end": -1}


def test_verify_a_sound_cache(cache):
    said = document("cache", "verify", "--cache-dir", cache, "--sources")
    assert (said["verified"], said["damaged"]) == (1, {})
    assert "1 of 1 entry is sound" in ok("cache", "verify", "--cache-dir", cache)


@pytest.mark.parametrize("place", PLACES)
def test_verify_finds_a_flipped_bit(cache, place):
    file = entry_file(cache)
    flip(file, PLACES[place] % file.stat().st_size)
    out = ok("cache", "verify", "--cache-dir", cache, code=1)
    assert "damaged" in out
    assert "0 of 1 entry is sound" in out
    assert [p.name for p in (cache / "damaged").iterdir()] == [file.parent.name]
    assert not list((cache / "entries").iterdir())


def test_verify_finds_a_damaged_manifest(cache):
    flip(entry_file(cache).parent / "manifest.json", 50)
    said = document("cache", "verify", "--cache-dir", cache, code=1)
    ((key, problems),) = said["damaged"].items()
    assert "manifest" in problems[0]
    assert (cache / "damaged" / key).exists()


def test_verify_one_by_the_beginning_of_its_name(cache):
    key = entry_file(cache).parent.name
    assert document("cache", "verify", key[:6], "--cache-dir", cache)["verified"] == 1
    check_error(run("cache", "verify", "xyz", "--cache-dir", cache), "no entry begins with 'xyz'")


def test_verify_does_not_count_as_use(cache):
    manifest = entry_file(cache).parent / "manifest.json"
    os.utime(manifest, (1e9, 1e9))
    ok("cache", "verify", "--cache-dir", cache)
    assert manifest.stat().st_mtime == 1e9


def test_a_damaged_entry_is_reported_and_built_again(cache, model):
    flip(entry_file(cache), 900_000)
    done = run("load", model, "--dtype", "bf16", "--cache", "--cache-dir", cache, "--verify", "--json")
    assert done.returncode == 0
    said = json.loads(done.stdout)
    assert said["verified_tensors"] == 2
    assert any("set aside" in w for w in said["warnings"])
    assert done.stderr.count("warning:") == 1
    assert document("cache", "verify", "--cache-dir", cache)["damaged"] == {}


# prune and clear


def test_prune(cache, model):
    ok("cache", "build", model, "--dtype", "fp16", "--cache-dir", cache)
    (old,) = (p for p in (cache / "entries").iterdir() if p.name == entry_of(cache, "bfloat16"))
    os.utime(old / "manifest.json", (1e9, 1e9))
    assert document("cache", "prune", "--cache-dir", cache, "--max-size", "1GB", "--max-age", "20000d")["removed"] == []
    said = document("cache", "prune", "--cache-dir", cache, "--max-age", "1w")
    assert said["removed"] == [old.name]
    assert said["nbytes"] > 1_400_000
    assert "1 entry removed" in ok("cache", "prune", "--cache-dir", cache, "--max-size", "1kB")
    assert not list((cache / "entries").iterdir())


def entry_of(cache, dtype):
    (key,) = (x.key for x in Store(cache).listed() if x.manifest and x.manifest.dtype == dtype)
    return key


def test_a_newer_format_stays_until_clear(cache):
    manifest = entry_file(cache).parent / "manifest.json"
    manifest.chmod(0o600)
    manifest.write_text(manifest.read_text().replace('"format_version": 1', '"format_version": 2'))
    os.utime(manifest, (1e9, 1e9))
    assert "newer format" in ok("cache", "list", "--cache-dir", cache)
    assert document("cache", "verify", "--cache-dir", cache)["verified"] == 0
    done = run("cache", "prune", "--cache-dir", cache, "--max-size", "1kB", "--max-age", "1d")
    assert (done.returncode, done.stdout) == (0, "0 entries removed, 0 B\n")
    assert "newer format" in done.stderr
    assert "cache clear" in done.stderr
    assert manifest.exists()
    assert len(document("cache", "clear", "--cache-dir", cache, "--yes")["removed"]) == 1
    assert not manifest.exists()


def test_clear_asks(cache):
    check_error(run("cache", "clear", "--cache-dir", cache), "--yes")
    assert entry_file(cache).exists()
    said = document("cache", "clear", "--cache-dir", cache, "--yes")
    assert len(said["removed"]) == 1
    assert not list((cache / "entries").iterdir())


def test_what_is_being_read_is_kept(cache):
    with Store(cache).find(entry_file(cache).parent.name):
        assert document("cache", "list", "--cache-dir", cache)["entries"][0]["state"] == "in use"
        assert document("cache", "clear", "--cache-dir", cache, "--yes")["removed"] == []
        assert document("cache", "prune", "--cache-dir", cache, "--max-size", "1kB")["removed"] == []
    assert entry_file(cache).exists()


# mistakes


@pytest.mark.parametrize("size", ["banana", "0", "9" * 400])
def test_sizes_that_do_not_parse(cache, size):
    check_usage(run("cache", "prune", "--cache-dir", cache, "--max-size", size), "--max-size", size[:40])
    assert entry_file(cache).exists()


@pytest.mark.parametrize("age", ["3 fortnights", "0d"])
def test_ages_that_do_not_parse(cache, age):
    check_usage(run("cache", "prune", "--cache-dir", cache, "--max-age", age), "--max-age", repr(age), "30d")
    assert entry_file(cache).exists()


def test_a_wrong_size_makes_no_directory(tmp_path, model):
    check_usage(run("cache", "build", model, "--cache-dir", tmp_path / "c", "--max-size", "x"), "--max-size", "'x'")
    assert not (tmp_path / "c").exists()


def test_too_small_a_budget(tmp_path, model):
    done = run("cache", "build", model, "--cache-dir", tmp_path / "c", "--max-size", "1MB")
    check_error(done, "1.44 MB", "1 MB", "--max-size")


def test_a_dtype_that_is_none(tmp_path, model):
    done = run("cache", "build", model, "--cache-dir", tmp_path / "c", "--dtype", "int8")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_a_missing_source(tmp_path):
    check_error(run("cache", "build", tmp_path / "none.safetensors", "--cache-dir", tmp_path / "c"), "does not exist")


def test_cache_dir_without_cache(tmp_path, model):
    check_usage(run("load", model, "--cache-dir", tmp_path / "c"), "--cache-dir", "needs --cache")


@pytest.mark.parametrize("command", ["list", "verify", "prune", "clear", "build"])
def test_cache_directories_that_are_refused(tmp_path, model, command):
    words = [command, *{"clear": ["--yes"], "build": [model]}.get(command, [])]
    (tmp_path / "mine" / "trash").mkdir(parents=True, mode=0o700)
    (tmp_path / "mine" / "trash" / "precious").touch()
    (tmp_path / "mine").chmod(0o700)
    check_error(run("cache", *words, "--cache-dir", tmp_path / "mine"), "holds other things")
    assert (tmp_path / "mine" / "trash" / "precious").exists()


def test_links_and_files_as_cache_directories(tmp_path, model):
    (tmp_path / "link").symlink_to(tmp_path)
    (tmp_path / "file").touch()
    check_error(run("cache", "list", "--cache-dir", tmp_path / "link"), "is a link")
    check_error(run("cache", "build", model, "--cache-dir", tmp_path / "file"), tmp_path / "file")


def test_an_unusable_cache_is_one_warning(tmp_path, model):
    (tmp_path / "c").touch()
    done = run("load", model, "--dtype", "bf16", "--cache", "--cache-dir", tmp_path / "c", "--json")
    assert done.returncode == 0
    assert json.loads(done.stdout)["cache"]["state"] == "source"
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("warning: the cache cannot be used")


def test_a_build_that_fails_is_one_warning(tmp_path, model):
    """The disk gives no more than a megabyte for a file."""
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20));"
        "from wan_loader.cli import main; main()"
    )
    words = ["load", model, "--dtype", "bf16", "--cache", "--cache-dir", tmp_path / "c", "--json"]
    done = run_python("-c", code, *words)
    assert done.returncode == 0
    assert json.loads(done.stdout)["n_tensors"] == 2
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("warning: not cached: ")
    assert not left_over(tmp_path / "c")


def test_another_process_builds(tmp_path, model):
    from wan_loader.cache.outline import outline_checkpoint
    from wan_loader.formats import open_checkpoint
    from wan_loader.plan.dtype_policy import DtypePolicy

    checkpoint = open_checkpoint(model)
    outline = outline_checkpoint(checkpoint, DtypePolicy("bfloat16"))
    building = Store(tmp_path / "c").begin(outline.key(outline.sources), 10)
    check_error(run("cache", "build", model, "--cache-dir", tmp_path / "c"), "another process is writing")
    building.abandon()


# Ctrl-C


SLOW = """
import os, sys, time
import wan_loader.cache.build as build
write = build._Writer._write_all
def slow(self, part):
    os.write(2, b"writing\\n")  # in one piece: two threads write
    time.sleep(0.3)
    write(self, part)
build._Writer._write_all = slow
if os.environ.get("SLOW_VERIFY"):
    import wan_loader.verify
    def verify(path, tensors, **options):
        os.write(2, b"verifying\\n")
        time.sleep(30)
    wan_loader.verify.verify = verify
from wan_loader.cli import main
main()
"""


@pytest.mark.parametrize(("command", "when"), [("load", "writing"), ("load", "verifying"), ("build", "writing")])
def test_ctrl_c(tmp_path, command, when):
    path, cache = tmp_path / "m.safetensors", tmp_path / "c"
    save_file({f"{i}": torch.randn(300_000) for i in range(40)}, path)
    words = ["load", "--cache", "--dtype", "bf16"] if command == "load" else ["cache", "build"]
    words += ["--verify"] if when == "verifying" else []
    environment = {**os.environ, **NO_CUDA, **({"SLOW_VERIFY": "1"} if when == "verifying" else {})}
    process = Program("-c", SLOW, *words, path, "--cache-dir", cache, env=environment)
    while f"{when}\n" not in process.output()[1]:
        assert process.poll(0.01) is None, process.output()
    process.send_signal(signal.SIGINT)
    start = time.monotonic()
    _, said = process.communicate(timeout=30)
    assert time.monotonic() - start < 5
    assert process.returncode == 130
    assert "Traceback" not in said
    assert not left_over(cache)
    assert not list((cache / "entries").iterdir())


def test_ctrl_c_before_anybody_looks_at_the_build(tmp_path):
    """The signal comes right after the build has begun: the interpreter must not wait for its end."""
    path, cache = tmp_path / "m.safetensors", tmp_path / "c"
    save_file({f"{i}": torch.randn(300_000) for i in range(40)}, path)
    code = SLOW.replace(
        "main()",
        """
import wan_loader.cli.cache as commands
def interrupted(*args, **kwargs):
    raise KeyboardInterrupt
commands.report_build = interrupted
main()
""",
    )
    words = ["cache", "build", str(path), "--cache-dir", str(cache)]
    start = time.monotonic()
    done = run_python("-c", code, *words, env=NO_CUDA)
    assert time.monotonic() - start < 9  # to the end it would take 12 s
    assert done.returncode == 130
    assert not left_over(cache)
    assert not list((cache / "entries").iterdir())


# help


@pytest.mark.parametrize("command", [[], ["build"], ["list"], ["verify"], ["prune"], ["clear"]])
def test_help_without_torch(command):
    code = (
        "import sys; sys.argv[0] = 'wan-loader'\nfrom wan_loader.cli import main\ntry: main()\n"
        "finally: assert 'torch' not in sys.modules"
    )
    words = [sys.executable, "-c", code, "cache", *command, "--help"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    if command:
        assert "Example" in done.stdout
        assert "--cache-dir" in done.stdout
