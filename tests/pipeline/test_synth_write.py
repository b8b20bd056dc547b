"""Writing synthetic checkpoints: refusals, failures, memory, progress, and the command line."""

from __future__ import annotations

import errno
import itertools
import shutil
import subprocess
import sys
import threading

import pytest
from programs import PIPELINE, run

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from wan_loader.errors import OptionError, OutputError
from wan_loader.sizes import format_bytes
from wan_pipeline.commands.app import main
from wan_pipeline.synth import synth
from wan_pipeline.synth.fill import Pool

# --- writing


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layout": "torch"}, "--layout torch: it must be one of native, diffusers"),
        ({"size": "huge"}, "--size huge: it must"),
        ({"task": "i2v"}, "--task i2v: it must"),
        ({"dtype": "int4"}, "--dtype int4: it must"),
        ({"blocks": 0}, "--blocks 0: t2v-A14B in size tiny has 1 to 4"),
        ({"blocks": 41, "size": "full"}, "has 1 to 40"),
        ({"components": ["transformer"]}, "t2v-A14B has no transformer"),
        ({"components": []}, "no component is wanted"),
        ({"seed": -1}, "--seed -1: it must"),
    ],
)
def test_settings_that_make_no_sense(tmp_path, options, message):
    with pytest.raises(OptionError, match=message):
        synth(tmp_path / "ckpt", **options)
    assert not (tmp_path / "ckpt").exists()


def test_a_full_directory_is_refused_or_added_to(tmp_path):
    (tmp_path / "mine").write_text("keep")
    with pytest.raises(OutputError) as error:
        synth(tmp_path, components=["vae"])
    assert error.value.path == str(tmp_path)
    assert error.value.reason == "is not empty"
    assert "--force" in error.value.remedy
    report = synth(tmp_path, components=["vae"], force=True)
    assert (tmp_path / "mine").read_text() == "keep"
    assert {*tmp_path.rglob("*")} >= {*report.files}
    assert report.nbytes == sum(file.stat().st_size for file in report.files)
    with pytest.raises(OutputError) as error:
        synth(tmp_path / "mine", force=True)
    assert error.value.path == str(tmp_path / "mine")
    assert error.value.reason == "is not a directory"


def test_too_little_space(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1_000_000))
    with pytest.raises(OutputError, match=r"needs \d\.\d\d MB, and .* has 1 MB free"):
        synth(tmp_path / "ckpt")
    assert not (tmp_path / "ckpt").exists()


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_leaves_nothing(tmp_path, monkeypatch, error):
    whole = Pool.data

    def failing(self, tensor):
        yield from whole(self, tensor)
        if tensor.name.startswith("blocks.2"):
            raise error

    monkeypatch.setattr(Pool, "data", failing)
    expected = OutputError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected):
        synth(tmp_path / "ckpt")
    assert not (tmp_path / "ckpt").exists()
    assert not [t for t in threading.enumerate() if t.name.startswith(("synth", "crc"))]


def test_progress_ends_at_the_total(tmp_path):
    calls = []
    report = synth(tmp_path / "ckpt", progress=lambda *call: calls.append((*call, threading.current_thread())))
    assert calls[-1][:2] == (report.nbytes, report.nbytes)
    assert {call[2] for call in calls} == {threading.current_thread()}
    assert [call[0] for call in calls] == sorted(call[0] for call in calls)


def test_memory_is_bounded(tmp_path):
    code = f"""
import resource
from wan_pipeline.synth import plan_synth, synth
options = dict(size="full", task="ti2v-5B", components=["transformer"], blocks=1, dtype="bf16")
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
plan_synth(**options)
before = peak()
report = synth({str(tmp_path / "big")!r}, **options)
print(report.nbytes, peak() - before)
"""
    done = run("-c", code, modules=PIPELINE)
    assert done.returncode == 0, done.stderr
    nbytes, grown = map(int, done.stdout.split())
    assert nbytes > 500_000_000
    assert grown < 160 << 20


# --- the command line


def test_cli(tmp_path, call_main, capsys):
    target = tmp_path / "ckpt"
    arguments = ["synth", str(target), "--layout", "diffusers", "--component", "vae", "--component", "high_noise"]
    assert call_main(main, *arguments, "--blocks", "1", "--dtype", "bf16", "--seed", "3") == 0
    files = [file for file in target.rglob("*") if file.is_file()]
    nbytes = sum(file.stat().st_size for file in files)
    assert capsys.readouterr() == (f"{target}: {len(files)} files, {format_bytes(nbytes)}\n", "")
    assert call_main(main, *arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {target} is not empty")
    assert error.count("\n") == 1
    assert call_main(main, *arguments, "--force") == 0
    assert call_main(main, *arguments, "--size", "huge") == 2


def test_cli_starts_light():
    code = "import sys, wan_pipeline.commands.app; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "diffusers", "transformers", "numpy", "rich.progress"} & set(modules)


@pytest.mark.parametrize(("flag", "start"), [("--version", "wan-pipeline "), ("-h", "Usage: "), ("--help", "Usage: ")])
def test_version_and_help(call_main, capsys, flag, start):
    assert call_main(main, flag) == 0
    assert capsys.readouterr().out.lstrip().startswith(start.rstrip())


def test_wan_loader_synth_is_called_by_its_name():
    program = "import sys; sys.argv[0] = 'wan-loader'; from wan_loader.cli import main; main()"
    for words, code in (("-h", 0), ("--bogus", 2)):
        done = subprocess.run(
            [sys.executable, "-c", program, "synth", "dir", words], capture_output=True, text=True, check=False
        )
        assert done.returncode == code
        assert "Usage: wan-loader synth " in done.stdout + done.stderr


def test_help_of_generate_is_clean(call_main, capsys):
    assert call_main(main, "generate", "-h") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if "--profile_out" in line]
    example = next(i for i, line in enumerate(lines) if "torchrun" in line)
    words = " ".join(itertools.takewhile(str.strip, lines[example:])).split()
    assert words[-4:] == ["TEXT", "--dit_fsdp", "--ulysses_size", "8"]


def test_what_the_system_refuses_is_one_line(tmp_path, call_main, capsys):
    file = tmp_path / "file"
    file.write_text("")
    assert call_main(main, "synth", file / "x") == 1
    assert capsys.readouterr().err == f"error: {file / 'x'}: Not a directory\n"
