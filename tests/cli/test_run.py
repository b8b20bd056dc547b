"""`wan-loader run`: a script does what it does under plain Python."""

import os
import subprocess
import sys

import pytest
from programs import check_error, wan_loader, wan_loader_itself

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

#: The order in which output comes depends on it.
_BUFFERED = {**os.environ, "PYTHONUNBUFFERED": ""}


def both(script, *args, stderr=subprocess.PIPE):
    """What plain Python makes of a script, and what `run` does."""
    words = [os.path.relpath(script, script.parent), *args]
    return [
        subprocess.run(
            [sys.executable, *before, *words],
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            timeout=60,
            cwd=script.parent,
            env={**_BUFFERED, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONIOENCODING": "ascii:surrogateescape"},
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


@pytest.mark.parametrize("flags", [[], ["-P"]])
@pytest.mark.parametrize("words", [["script.py"], ["-m", "script"], ["-m", "beside.script"]])
def test_the_world_of_a_program_is_that_of_plain_python(tmp_path, flags, words):
    script = "import sys\nprint(sys.path, __builtins__, sorted(globals()), sys.argv, sys.flags)\n"
    (tmp_path / "script.py").write_text(script)
    (tmp_path / "beside").mkdir()
    (tmp_path / "beside" / "script.py").write_text(script)
    here = {"cwd": tmp_path, "env": {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}}
    plain, ours = (
        subprocess.run([sys.executable, *flags, *before, *words], stdout=subprocess.PIPE, text=True, check=True, **here)
        for before in ([], ["-m", "wan_loader", "run", "--quiet"])
    )
    assert ours.stdout == plain.stdout


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


_ENDS = {
    "an error": "def f():\n    1 / 0\nprint('said')\ntry:\n    f()\nexcept ValueError:\n    pass",
    "an error in handling one": "try:\n    1 / 0\nexcept ZeroDivisionError:\n    raise ValueError('next')",
    "an error without a frame": "print('a'",
    "a code": "import sys; sys.exit(3)",
    "a text": "import sys; sys.exit('that is it')",
    "none": "raise SystemExit",
    "at once": "import os; os._exit(4)",
    "a signal": "import os; os.kill(os.getpid(), 15)",
    "Ctrl-C": "import atexit, os; atexit.register(print, 'at exit')\ntry:\n    os.kill(os.getpid(), 2)\n"
    "finally:\n    print('cleaned')",
    "a hook": "import sys; sys.excepthook = lambda kind, error, tb: print('mine', kind, tb.tb_lineno)\n1 / 0",
    "neither": "class Odd(BaseException): pass\nraise Odd('odd')",
    "a fork": "import os, sys; pid = os.fork(); pid and os.wait(); sys.exit(2)",
}


@pytest.mark.parametrize("end", _ENDS)
def test_a_script_ends_as_under_plain_python(tmp_path, end):
    script = tmp_path / "script.py"
    script.write_text(_ENDS[end])
    for stderr in (subprocess.PIPE, subprocess.STDOUT):
        plain, ours = both(script, stderr=stderr)
        assert (ours.returncode, ours.stdout, ours.stderr) == (plain.returncode, plain.stdout, plain.stderr)


def test_what_was_done_is_said_once_and_last(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import atexit, os, sys; atexit.register(print, 'last', file=sys.stderr)\nos.fork() and os.wait()"
    )
    done = wan_loader_itself("run", script)
    assert done.stderr == "last\nlast\nwan-loader: 0 loads took the fast path: torch was not imported\n"
    done = wan_loader_itself("run", script, WAN_LOADER_ACCELERATE="0")
    assert done.stderr == "last\nlast\nwan-loader: the fast path is off: WAN_LOADER_ACCELERATE=0\n"
    assert wan_loader_itself("run", "--quiet", script).stderr == "last\nlast\n"


def test_what_was_done_is_said_after_what_the_program_printed(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("print('said')")
    words = [sys.executable, "-m", "wan_loader", "run", script]
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True, env=_BUFFERED)
    assert done.stdout == "said\nwan-loader: 0 loads took the fast path: torch was not imported\n"


def test_a_report_is_a_table(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import torch, wan_loader; fast = wan_loader.accelerate(); print(fast.is_installed)\n"
        "fast.tally.served('Model', 5_000_000_000, 0.5); fast.tally.leave('was written to', 7)"
    )
    line = "wan-loader: 1 load took the fast path: 5 GB in 0.5 s (10 GB/s); left to the original: 7 B was written to"
    done = wan_loader("run", script)
    assert (done.stdout, done.stderr.splitlines()) == ("True\n", [line])
    done = wan_loader("run", "--report", script)
    assert done.stderr.splitlines()[0] == line
    assert "\n  Model " in done.stderr


def test_a_program_does_not_wait_for_what_it_does_not_need(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import sys; sys.stdout.write(' '.join(sys.modules))")
    loaded = wan_loader_itself("run", script).stdout.split()
    assert not {"typer", "rich", "torch", "json", "pathlib", "subprocess", "wan_loader.api"} & set(loaded)


def test_a_script_that_cannot_be_read(tmp_path):
    check_error(wan_loader("run", tmp_path), f"{tmp_path} is no script")
    check_error(wan_loader("run", "--report", "none.py"), "none.py is no script")
    check_error(wan_loader("run", tmp_path / "none" / "x.py"), "x.py is no script")
    (tmp_path / "loop.py").symlink_to("loop.py")
    check_error(wan_loader("run", tmp_path / "loop.py"), "loop.py cannot be read: Too many levels")
