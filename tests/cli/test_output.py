"""What is printed: names of others as escapes, streams of any kind."""

import json
import os
import struct
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from wan_loader.cli.app import main

ODD = "\x1b[31m\x07\x9b\u202e\u2028\n[red]"
SHOWN = "\\x1b[31m\\x07\\x9b\\u202e\\u2028\\n[red]"


@pytest.fixture
def run(monkeypatch, call_main, capfd):
    """Exit code, stdout and stderr of a command in this process."""

    def run_it(*words):
        monkeypatch.setenv("COLUMNS", "300")
        return call_main(main, *words), *capfd.readouterr()

    return run_it


@pytest.fixture
def odd_file(tmp_path):
    path = tmp_path / f"{ODD}.safetensors"
    save_file({f"{ODD}.weight": torch.ones(2), "größe": torch.ones(3)}, path)
    return path


def test_names_of_tensors_and_files(run, odd_file):
    code, out, err = run("inspect", odd_file, "--tensors")
    assert (code, err) == (0, "")
    assert f"{SHOWN}.safetensors\n" in out
    assert f"\n{SHOWN}.weight  float32" in out
    assert "\ngröße" in out


def test_json_is_ascii_and_the_very_name(run, odd_file):
    code, out, _ = run("inspect", odd_file, "--tensors", "--json")
    assert code == 0
    assert out.isascii()
    assert {t["name"] for t in json.loads(out)["tensors"]} == {f"{ODD}.weight", "größe"}


@pytest.mark.parametrize("name", [ODD, "\udcff"], ids=ascii)
@pytest.mark.parametrize("command", ["inspect", "load", "warm", "evict", "report"])
def test_errors_are_one_line(run, tmp_path, command, name):
    code, out, err = run(command, tmp_path / name / "x.safetensors")
    shown = SHOWN if name == ODD else "\\udcff"
    assert (code, out) == (1, "")
    assert err.startswith("error: ")
    assert shown in err
    assert err.count("\n") == 1


def test_errors_about_names_within(run, tmp_path):
    header = json.dumps({ODD: {"dtype": ODD, "shape": [1], "data_offsets": [0, 4]}}).encode()
    (tmp_path / "m.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    code, _, err = run("inspect", tmp_path / "m.safetensors", "-v")
    assert code == 1
    assert "Traceback" in err  # -v: with its lines
    assert "\x1b" not in err
    assert "\u202e" not in err


def test_mistakes_on_the_command_line(run):
    code, out, err = run("load", "x", "--dtype", ODD)
    assert (code, out) == (2, "")
    assert "\x1b" not in err
    assert "\\x1b[31m" in err


def test_errors_that_nobody_thought_of(run, monkeypatch, odd_file):
    import wan_loader.formats

    def fail(path, **options):
        raise RuntimeError(ODD)

    monkeypatch.setattr(wan_loader.formats, "open_checkpoint", fail)
    code, _, err = run("inspect", odd_file)
    assert code == 1
    assert err.splitlines()[0] == "Traceback (most recent call last):"
    assert "\\x1b[31m" in err
    assert "\x1b" not in err


def test_messages_with_lines_of_their_own_keep_them(capsys):
    from wan_loader.cli import exit_codes
    from wan_loader.errors import KeyMismatchError

    def app(**_):
        raise KeyMismatchError("missing:\n  a\x1b")

    assert exit_codes._run(app) == 1
    assert capsys.readouterr().err == "error: missing:\n  a\\x1b\n"


@pytest.mark.parametrize("streams", [">&-", "<&- >&- 2>&-", "> /dev/full"])
def test_streams_that_are_closed_or_full(odd_file, streams):
    """Closed is as good as /dev/null; results that cannot be written are an error."""
    command = ["bash", "-c", f'exec "$@" {streams}', "x", sys.executable, "-m", "wan_loader", "inspect", odd_file]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "LC_ALL": "C"}
    done = subprocess.run(command, capture_output=True, env=environment, check=False)
    full = "full" in streams
    assert done.returncode == (1 if full else 0)
    assert (b"cannot be written: No space" in done.stderr) == full
    assert b"Traceback" not in done.stderr
