"""What waits for torch in other programs: it stands alone, here beside a torch and a wan_loader that are made up."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from wan_loader.fastpath.launch import waiting


@pytest.fixture
def place(tmp_path):
    """A directory to import from: `waiting`, a torch, and a wan_loader that says when it is installed."""
    shutil.copy(waiting.__file__, tmp_path / "waiting.py")
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("from torch import part; print('torch')")
    (tmp_path / "torch" / "part.py").write_text("")
    (tmp_path / "wan_loader.py").write_text(
        "from contextlib import nullcontext as paused_gc\ndef install(): print('installed')"
    )
    return tmp_path


def run(place, code, *, begin="waiting.begin()", **environ):
    """What Python says to a program that waits, and what it says without: words of stdout, and all of stderr."""
    done = subprocess.run(
        [sys.executable, "-c", f"import waiting; {begin}\n{code}"],
        capture_output=True,
        text=True,
        check=False,
        cwd=place,
        env={**os.environ, "PYTHONPATH": str(place), **environ},
    )
    return done.stdout.split(), done.stderr


def test_it_is_installed_once_torch_has_been_imported(place):
    assert run(place, "import torch; print('on'); import torch.part") == (["torch", "installed", "on"], "")
    assert run(place, "import json, sys; print('wan_loader' in sys.modules)") == (["False"], "")


def test_it_is_installed_at_once_where_torch_is_there(place):
    assert run(place, "print('on')", begin="import torch; waiting.begin()") == (["torch", "installed", "on"], "")


def test_torch_is_imported_as_without_it(place):
    code = """
import importlib, sys
from importlib.machinery import SourceFileLoader
found = importlib.util.find_spec("torch")
print(type(found.loader) is SourceFileLoader, "torch" in sys.modules)
import torch
print(type(torch.__loader__) is SourceFileLoader, torch.__spec__.loader is torch.__loader__)
print(*vars(torch.__loader__))
importlib.reload(torch)
print(len([f for f in sys.meta_path if type(f).__module__ == "waiting"]))
"""
    code = "import importlib.util\n" + code
    words, said = run(place, code)
    assert said == ""
    assert " ".join(words) == "True False torch installed True True name path torch 0"


def test_two_of_them_do_no_harm(place):
    words, said = run(place, "import torch", begin="waiting.begin(); waiting.begin()")
    assert (words, said) == (["torch", "installed", "installed"], "")


def test_the_environment_turns_it_off(place):
    assert run(place, "import torch", WAN_LOADER_ACCELERATE="0") == (["torch"], "")


def test_an_import_that_fails_looks_as_without_it(place):
    (place / "torch" / "part.py").write_text("1 / 0")
    for code in ("import torch", "import torch.part", "from torch import part"):
        assert run(place, code) == run(place, code, begin="pass")
    assert "ZeroDivisionError" in run(place, "import torch")[1]


@pytest.mark.parametrize("source", ["1 / 0", "", "raise ImportError"])
def test_what_cannot_be_installed_leaves_the_program_as_it_is(place, source):
    (place / "wan_loader.py").write_text(source)
    assert run(place, "import torch; print('on')") == (["torch", "on"], "")
    (place / "tallies").mkdir()
    run(place, "import torch", begin=f"waiting.begin({str(place / 'tallies')!r})")
    (left,) = (json.loads(path.read_text())["left"] for path in (place / "tallies").iterdir())
    assert [reason.startswith(f"everything in {sys.executable}: ") for reason in left] == [True]
