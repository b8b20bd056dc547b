"""`wan-loader run`: a script does what it does under plain Python."""

import os
import subprocess
import sys

import pytest
from programs import wan_loader_itself

_SCRIPT = """
import atexit, os, pickle, signal, sys, time, warnings

class Mine:
    pass

def again():
    print("exit", type(pickle.loads(pickle.dumps(Mine()))) is Mine, flush=True)

atexit.register(again)
os.chdir("/")
print(os.path.samefile(__file__, sys.argv[1]), sys.argv[0], __name__, __spec__, __cached__, sys.stdout.errors)
import cleaning
import handling
os.kill(os.getpid(), signal.SIGINT)
time.sleep(0.1)
"""
_CLEANING = """
import os, signal, time
try:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(5)
except KeyboardInterrupt:
    print("cleaned", signal.getsignal(signal.SIGINT))
"""
_HANDLING = "import signal\nsignal.signal(signal.SIGINT, lambda *_: print('handled'))"


def both(script, *args):
    """What plain Python makes of a script, and what `run` does."""
    words = [os.path.relpath(script, script.parent), *args]
    return [
        subprocess.run(
            [sys.executable, *before, *words],
            capture_output=True,
            text=True,
            timeout=60,
            cwd=script.parent,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONIOENCODING": "ascii:surrogateescape"},
            check=False,
        )
        for before in ([], ["-m", "wan_loader", "run", "--quiet"])
    ]


def test_a_script_is_the_main_module_and_has_its_own_ctrl_c(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(_SCRIPT)
    (tmp_path / "cleaning.py").write_text(_CLEANING)
    (tmp_path / "handling.py").write_text(_HANDLING)
    plain, ours = both(script, str(script))
    assert plain.stdout.splitlines()[1:] == [
        "cleaned <built-in function default_int_handler>",
        "handled",
        "exit True",
    ], plain.stderr
    assert (ours.returncode, ours.stdout, ours.stderr) == (0, plain.stdout, plain.stderr)


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
@pytest.mark.parametrize("what", ["sys.{}.close()", "sys.{} = None"])
def test_a_script_may_close_its_streams(tmp_path, stream, what):
    script = tmp_path / "script.py"
    script.write_text(f"import sys; print('said'); {what.format(stream)}")
    done = wan_loader_itself("run", script)
    assert (done.returncode, done.stdout) == (0, "said\n")
    assert "Traceback" not in done.stderr


_MODULE = """
import sys, atexit
from . import beside
print(__name__, __package__, __spec__.name, sys.argv[1:], sys.argv[0] == __file__, beside.WORD)
print(sys.modules["__main__"].__dict__ is globals())
atexit.register(lambda: print("at exit", __name__, sys.modules["__main__"].__dict__ is globals()))
if "fail" in sys.argv:
    raise ValueError("as told")
sys.exit(3 if "three" in sys.argv else 0)
"""


@pytest.mark.parametrize("name", ["package", "package.part"])
@pytest.mark.parametrize("args", [["--quiet", "-x", "one"], ["three"], ["fail"]])
def test_a_module_runs_as_python_runs_it(tmp_path, name, args):
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "beside.py").write_text("WORD = 'found'")
    for file in ("__main__.py", "part.py"):
        (package / file).write_text(_MODULE)
    plain, ours = (
        subprocess.run(
            [sys.executable, *before, "-m", name, *args],
            capture_output=True,
            text=True,
            timeout=60,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            check=False,
        )
        for before in ([], ["-m", "wan_loader", "run", "--quiet"])
    )
    assert "found" in plain.stdout
    assert (ours.returncode, ours.stdout) == (plain.returncode, plain.stdout)
    # Python's own traceback begins with the lines of runpy
    assert ours.stderr.splitlines()[-3:] == plain.stderr.splitlines()[-3:]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-m"], "-m lacks the name of a module"),
        (["-m", "no_such_module"], "there is no module 'no_such_module' that can be run"),
        (["-m", "no_such.module"], "there is no module 'no_such.module' that can be run"),
        (["-m", "wan_loader.formats"], "there is no module 'wan_loader.formats' that can be run"),
        (["-m", ""], "there is no module '' that can be run"),
        (["-m", "math"], "there is no module 'math' that can be run"),
    ],
)
def test_modules_that_cannot_be_run(words, message):
    done = wan_loader_itself("run", *words)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr
