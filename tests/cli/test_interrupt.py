"""Ctrl-C: what ends at once, what cleans up first, and what is ended in any case."""

import os
import signal
import subprocess
import sys
import time

import pytest

# A command of our own kind: `ready` says where it is, and then it does what is asked for.
_COMMAND = """
import os, sys, time
from wan_loader.cli import begin_program
begin_program()
import typer
from wan_loader.cli.interrupt import unhurried
from wan_loader.cli.exit_codes import run_program

def ready():
    os.write(1, b"ready\\n")

def stubborn(seconds=20):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            ready()
            time.sleep(seconds)
        except KeyboardInterrupt:
            pass

app = typer.Typer(pretty_exceptions_enable=False)

@app.command()
def work():
{body}

run_program(app)
"""


def interrupted(body, tmp_path, *, ignored=False):
    """Exit code, stderr and seconds of a command that gets SIGINT once it is ready."""
    code = _COMMAND.replace("{body}", "\n".join("    " + line for line in body.splitlines()))
    before = signal.signal(signal.SIGINT, signal.SIG_IGN if ignored else signal.default_int_handler)
    try:
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])},
        )
    finally:
        signal.signal(signal.SIGINT, before)
    with process:
        assert process.stdout.readline() == b"ready\n", process.stderr.read()
        start = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=30)
        return process.returncode, said.decode(), time.monotonic() - start


def test_a_command_cleans_up_and_ends(tmp_path):
    code, said, seconds = interrupted(
        "try:\n    ready(); time.sleep(20)\nfinally:\n    os.write(2, b'cleaned\\n')", tmp_path
    )
    assert (code, said) == (130, "cleaned\ninterrupted\n")
    assert seconds < 1


def test_what_does_not_end_is_ended(tmp_path):
    """Somebody swallows KeyboardInterrupt, or does not come back from C."""
    code, said, seconds = interrupted("stubborn()", tmp_path)
    assert (code, said) == (130, "")
    assert seconds < 1


def test_the_import_of_a_library_ends_at_once(tmp_path):
    """It swallows KeyboardInterrupt, and so would be half imported: the signal has its default action."""
    (tmp_path / "library").mkdir()
    (tmp_path / "library" / "__init__.py").write_text("import library.part")
    (tmp_path / "library" / "part.py").write_text("from __main__ import stubborn; stubborn()")
    code, said, seconds = interrupted("import library", tmp_path)
    assert (code, said) == (-signal.SIGINT, "")
    assert seconds < 1


def test_the_import_of_a_library_while_there_is_something_to_remove(tmp_path):
    (tmp_path / "library.py").write_text("from __main__ import ready, time; ready(); time.sleep(20)")
    body = "with unhurried():\n    try:\n        import library\n    finally:\n        os.write(2, b'cleaned\\n')"
    code, said, _ = interrupted(body, tmp_path)
    assert (code, said) == (130, "cleaned\ninterrupted\n")


def test_after_imports_a_command_cleans_up_again(tmp_path):
    (tmp_path / "library.py").write_text("import importlib.util; assert __loader__ is __spec__.loader; x = 1")
    body = "import library\nassert library.__loader__.get_source('library')\ntry:\n    ready(); time.sleep(20)\n"
    code, said, _ = interrupted(body + "finally:\n    os.write(2, b'cleaned\\n')", tmp_path)
    assert (code, said) == (130, "cleaned\ninterrupted\n")


def test_results_are_shown_in_peace(tmp_path):
    code, said, seconds = interrupted("with unhurried():\n    stubborn(0.9)\nos.write(2, b'shown\\n')", tmp_path)
    assert (code, said) == (0, "shown\n")
    assert seconds > 0.8


def test_what_is_ignored_stays_ignored(tmp_path):
    """As in a script's background: `wan-loader ... &`, or under nohup."""
    code, said, _ = interrupted("ready(); time.sleep(0.3); os.write(2, b'done\\n')", tmp_path, ignored=True)
    assert (code, said) == (0, "done\n")


def test_the_question_of_a_prompt_is_not_answered_by_it(tmp_path):
    """typer makes "aborted", which is 1, of Ctrl-C there."""
    code, said, _ = interrupted(
        "ready()\ntry:\n    time.sleep(20)\nexcept KeyboardInterrupt:\n    raise typer.Abort()", tmp_path
    )
    assert (code, said) == (130, "interrupted\n")


@pytest.mark.parametrize("program", ["wan_loader", "wan_pipeline"])
def test_programs_begin_with_the_default_action(program):
    code = f"""
import runpy, signal, sys
import wan_loader.cli.exit_codes as exit_codes
def run(app):
    print(signal.getsignal(signal.SIGINT).name)
    sys.exit(0)
exit_codes.run_program = run
sys.argv[1:] = ["--help"]
signal.signal(signal.SIGINT, signal.default_int_handler)
runpy.run_module("{program}", run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "SIG_DFL\n"


def test_main_called_by_others_leaves_signals_alone(monkeypatch, capsys):
    from wan_loader.cli import main

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(sys, "argv", ["wan-loader", "--version"])
    with pytest.raises(SystemExit):
        main()
    assert signal.getsignal(signal.SIGINT) is before
    assert capsys.readouterr().out.startswith("wan-loader ")


def test_what_python_makes_of_an_interrupt_while_a_class_is_made_is_no_error(tmp_path):
    body = (
        "class Slow:\n"
        "    def __set_name__(self, owner, name):\n"
        "        ready()\n"
        "        time.sleep(20)\n"
        "class Made:\n"
        "    slow = Slow()"
    )
    code, said, seconds = interrupted(body, tmp_path)
    assert (code, said) == (130, "interrupted\n")
    assert seconds < 1
