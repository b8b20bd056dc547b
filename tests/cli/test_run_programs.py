"""`wan-loader run -- PROGRAM`: what Python it starts is served, each process counts, and it ends as by itself."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from programs import check_error, check_usage, wan_loader, wan_loader_itself

#: Says whether the fast path waits in a process.
_IS_THERE = "import sys; print(any(type(finder).__name__ == '_Torch' for finder in sys.meta_path))"


def test_ranks_of_torchrun_and_a_sitecustomize_of_the_user(tmp_path):
    pytest.importorskip("torch.distributed")
    (tmp_path / "sitecustomize.py").write_text("import builtins; builtins.custom = 'mine'")
    (tmp_path / "rank.py").write_text(
        "import os, sys, torch, torch.distributed as dist, wan_loader\n"
        "fast = wan_loader.accelerate()\n"
        "fast.tally.served('Model', 1_000_000, 0.5)\n"
        "dist.init_process_group('gloo')\n"
        "ones = torch.ones(1)\n"
        "dist.all_reduce(ones)\n"
        "facts = int(ones), custom, fast.is_installed, hasattr(torch.nn.Module.to, '__wrapped__'), sys.argv[1:]\n"
        "os.write(1, (' '.join(map(str, facts)) + chr(10)).encode())  # at once: both ranks have one stdout\n"
        "dist.destroy_process_group()\n"
    )
    words = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29747"]
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    done = wan_loader_itself("run", "--report", "--", *words, tmp_path / "rank.py", "--report", PYTHONPATH=path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["2 mine True True ['--report']"] * 2
    line = "wan-loader: 2 loads took the fast path: 2 MB in 1 s (2 MB/s) (3 processes with torch)\n"
    assert line in done.stderr
    assert "\n  Model " in done.stderr.partition(line)[2]


def test_accelerate_launch(tmp_path):
    pytest.importorskip("accelerate")
    script = tmp_path / "script.py"
    script.write_text(f"{_IS_THERE}; sys.exit(3)")
    words = ["-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1", "--cpu"]
    done = wan_loader_itself("run", "--", *words, script)
    assert (done.returncode, done.stdout) == (1, "True\n"), done.stderr  # the launcher's own code
    assert done.stderr.endswith("wan-loader: 0 loads took the fast path (1 process with torch)\n")


@pytest.mark.parametrize(
    ("program", "code"),
    [
        ([sys.executable, "-c", "import sys; print('said'); sys.exit(7)"], 7),
        ([sys.executable, "-c", "import os; print('said', flush=True); os.kill(os.getpid(), 15)"], 143),
        (["sh", "-c", "echo said; exit 5"], 5),
    ],
)
def test_a_program_ends_as_by_itself(program, code):
    done = wan_loader_itself("run", "--", *program)
    assert (done.returncode, done.stdout) == (code, "said\n")
    assert done.stderr == "wan-loader: 0 loads took the fast path (0 processes with torch)\n"
    assert wan_loader_itself("run", "--quiet", "--", *program).stderr == ""


def test_pythons_that_ignore_the_environment_stay_plain():
    answers = [
        wan_loader_itself("run", "--", sys.executable, *o, "-c", _IS_THERE).stdout for o in ((), ("-I",), ("-S",))
    ]
    assert answers == ["True\n", "False\n", "False\n"]
    assert (
        wan_loader_itself("run", "--", sys.executable, "-c", _IS_THERE, WAN_LOADER_ACCELERATE="0").stdout == "False\n"
    )


def test_children_of_children_are_served_and_nothing_stays(tmp_path):
    code = "import sys, os; print(any(type(f).__name__ == '_Torch' for f in sys.meta_path), os.environ['PYTHONPATH'])"
    outer = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {code!r}])"
    served, path = wan_loader_itself("run", "--", sys.executable, "-c", outer, TMPDIR=str(tmp_path)).stdout.split()
    assert served == "True"
    assert path.startswith(str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_a_program_that_is_not_there(tmp_path):
    check_error(wan_loader("run", "--", "no-such-launcher", "x.py"), "'no-such-launcher' is not there", code=127)
    (tmp_path / "foreign").write_bytes(b"\x7fELF and no more")
    (tmp_path / "foreign").chmod(0o755)
    check_error(wan_loader("run", "--", tmp_path / "foreign"), "foreign cannot be started: Exec format", code=127)
    check_usage(wan_loader("run", "--"), "Missing argument")
    check_usage(wan_loader("run"), "Missing argument")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_reach_the_program(number):
    """Ctrl-C comes to both from the terminal, others to the one that was started."""
    code = "import time\ntry:\n    print('ready', flush=True); time.sleep(30)\nfinally:\n    print('cleaned')"
    process = subprocess.Popen(
        [sys.executable, "-m", "wan_loader", "run", "--", sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    with process:
        assert process.stdout.readline() == "ready\n"
        start = time.monotonic()
        if number == signal.SIGINT:
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)
        said, errors = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert said == ("cleaned\n" if number == signal.SIGINT else "")
    assert errors.count("Traceback") == (number == signal.SIGINT)
    assert errors.endswith("wan-loader: 0 loads took the fast path (0 processes with torch)\n")
    assert time.monotonic() - start < 5


def test_help_says_what_runs():
    done = wan_loader("run", "--help")
    assert done.returncode == 0
    for word in ("--report", "--quiet", "-m MODULE", "-- torchrun", "WAN_LOADER_ACCELERATE=0", "standby start"):
        assert word in done.stdout


def test_a_script_that_may_be_executed_is_executed(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("#!/bin/sh\necho of the shell\n")
    script.chmod(0o755)
    assert wan_loader("run", "--", script).stdout == "of the shell\n"
    shutil.copy(script, tmp_path / "plain.py")
    (tmp_path / "plain.py").write_text("print('of Python')")
    (tmp_path / "plain.py").chmod(0o644)
    assert wan_loader("run", "--", tmp_path / "plain.py").stdout == "of Python\n"
