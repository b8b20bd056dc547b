"""`wan-loader enable` and `disable`, in an environment of its own."""

import os
import subprocess
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
_IS_THERE = "import sys; print(any(type(finder).__name__ == '_Torch' for finder in sys.meta_path))"


@pytest.fixture
def place(tmp_path):
    """Site-packages of an environment in which wan-loader, and what it needs, are installed."""
    venv.create(tmp_path, symlinks=True)
    (place,) = tmp_path.glob("lib/python*/site-packages")
    (place / "installed.pth").write_text(f"{ROOT}\n{sysconfig.get_path('purelib')}\n")
    return place


def python(place, *words, **environ):
    """Run the environment's Python as a service would: nothing of ours in its environment or working directory."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [place.parents[2] / "bin" / "python", *words],
        capture_output=True,
        text=True,
        check=False,
        cwd=place,
        env=inherited | environ,
    )


def test_enable_and_disable(place):
    before = sorted(place.iterdir())
    file = place / "wan_loader_enabled.pth"
    assert python(place, "-c", _IS_THERE).stdout == "False\n"
    for _ in range(2):
        done = python(place, "-m", "wan_loader", "enable")
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[0] == f"written: {file}"
    assert sorted(place.iterdir()) == sorted([*before, file])
    assert python(place, "-c", _IS_THERE).stdout == "True\n"
    assert python(place, "-c", _IS_THERE, WAN_LOADER_ACCELERATE="0").stdout == "False\n"
    done = python(place, "-m", "wan_loader", "disable")
    assert (done.returncode, done.stdout) == (0, f"removed: {file}\n")
    assert sorted(place.iterdir()) == before
    assert python(place, "-c", _IS_THERE).stdout == "False\n"
    done = python(place, "-m", "wan_loader", "disable")
    assert (done.returncode, done.stdout) == (0, f"nothing to remove: {file} is not there\n")


def test_what_is_left_behind_breaks_nothing(place):
    """The package is removed, and the file is not."""
    python(place, "-m", "wan_loader", "enable")
    (place / "installed.pth").unlink()
    (place / "torch.py").write_text("print('torch')")
    for options in ([], ["-W", "error"], ["-I"]):
        done = python(place, *options, "-c", "import torch; print('on')")
        assert (done.returncode, done.stdout, done.stderr) == (0, "torch\non\n", "")


def test_an_environment_without_the_package(place):
    (place / "installed.pth").unlink()
    path = os.pathsep.join([str(ROOT), sysconfig.get_path("purelib")])
    done = python(place, "-m", "wan_loader", "enable", PYTHONPATH=path)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {place.parents[2]} has no wan-loader of its own")
    assert not list(place.glob("*.pth"))


def test_what_cannot_be_written_or_is_not_ours(place, monkeypatch, unprivileged):
    from wan_loader.errors import OutputError
    from wan_loader.fastpath.launch import enable

    file = place / "wan_loader_enabled.pth"
    monkeypatch.setattr(enable, "enabled_file", lambda: file)
    file.write_text("/somewhere/else\n")
    with pytest.raises(OutputError, match=r"wan_loader_enabled\.pth is not what .*: look at it"):
        enable.disable()
    file.write_bytes(b"\xff")
    with pytest.raises(OutputError, match="is not what"):
        enable.disable()
    assert file.read_bytes() == b"\xff"
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(OutputError, match="may write to: run this as the environment's owner"):
        enable.enable()
