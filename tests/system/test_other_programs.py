"""Programs that are to be started: what their command line becomes, and what they find in front of PYTHONPATH."""

import subprocess
import sys

import pytest

from wan_loader.errors import OptionError
from wan_loader.system.programs import command_line, environment, furnish


def test_module_and_missing_program():
    assert command_line(["-m", "json.tool"], "run") == [sys.executable, "-m", "json.tool"]
    assert command_line(["true"], "run") == ["true"]
    with pytest.raises(OptionError, match="no-such-program"):
        command_line(["no-such-program-here"], "run")
    with pytest.raises(OptionError) as error:
        command_line([], "run")
    assert error.value.reason == "no program"
    assert "after --" in error.value.remedy


@pytest.fixture
def home(tmp_path):
    """A directory whose sitecustomize says that it was there."""
    (tmp_path / "source.py").write_text("WORD = 'here'")
    (tmp_path / "home").mkdir()
    furnish(tmp_path / "home", tmp_path / "source.py", "_copied", "import _copied; sys.word = _copied.WORD")
    return tmp_path / "home"


def run(home, code, *options):
    done = subprocess.run(
        [sys.executable, *options, "-c", code], capture_output=True, text=True, check=False, env=environment(home)
    )
    return done.stdout.strip() + done.stderr


def test_a_start_in_each_python(home):
    code = f"import sys; print(getattr(sys, 'word', 'plain'), {str(home)!r} in sys.path)"
    assert run(home, code) == "here False"
    assert run(home, code, "-I") == "plain False"
    assert run(home, code, "-S") == "plain True"


def test_a_start_that_fails_is_passed_over(home):
    (home / "_copied.py").write_text("1 / 0")
    assert run(home, "print('on')") == "on"


def test_the_sitecustomize_of_others_runs_too(home, tmp_path, monkeypatch):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "sitecustomize.py").write_text("import sys; sys.other = __name__")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "theirs"))
    code = "import sitecustomize, sys; print(sys.word, sys.other, sitecustomize.__file__)"
    assert run(home, code) == f"here sitecustomize {tmp_path / 'theirs' / 'sitecustomize.py'}"
    (tmp_path / "theirs" / "sitecustomize.py").write_text("import not_there")
    assert "not_there" in run(home, "print('on')")
