"""A program in a fork of the stand-by server is what it is when it is started directly."""

import concurrent.futures
import os
import resource
import signal
import subprocess
import time

import pytest
from standbys import wait_until_gone, waiting

from wan_loader.standby.world import FIRST_OWN

#: Says whether it is a fork, by what is there without having been imported.
_WHERE = "import sys; where = 'forked' if 'wan_loader.standby.server' in sys.modules else 'imported'\n"

_WORLD = """
import gc, multiprocessing.process, os, resource, signal, sys, threading
places = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
fds = sorted((place, os.readlink(place).partition("[")[0]) for place in places if os.path.exists(place))
def stream(s):
    return s and (s.name, s.mode, s.encoding, s.errors, s.line_buffering, s.write_through, s.isatty(), s.seekable(),
                  s.fileno(), type(s.buffer).__name__, s.newlines)
skip = ("PWD", "OLDPWD", "SHLVL", "_")
for fact in (
    sys.argv, sys.executable, sys.orig_argv[-2:], os.getcwd(),
    sorted((k, v) for k, v in os.environ.items() if k not in skip),
    stream(sys.stdin), stream(sys.stdout), stream(sys.stderr), sys.stdin and sys.stdin.read(), oct(os.umask(0)),
    [resource.getrlimit(getattr(resource, n)) for n in sorted(dir(resource)) if n.startswith("RLIMIT")],
    os.sched_getaffinity(0), os.getpriority(os.PRIO_PROCESS, 0), sys.path, sys.flags, sys.warnoptions, fds,
    [(n, signal.getsignal(n)) for n in sorted(signal.valid_signals())], signal.pthread_sigmask(signal.SIG_BLOCK, ()),
    gc.isenabled(), gc.get_threshold(), __name__, __file__, __builtins__, sorted(globals()),
    threading.enumerate()[0].name, threading.enumerate()[0].native_id == os.getpid(),
    multiprocessing.process.ORIGINAL_DIR,
    sys.getswitchinterval(), len(os.listdir("/proc/self/task")), os.getpgrp() == os.getpid() or "no matter",
):
    print(fact)
"""


def different(ours, plain):
    """Lines that differ, without what is listed as different."""
    lines = zip(ours.splitlines(), plain.splitlines(), strict=True)
    return [pair for pair in list(lines)[:-1] if pair[0] != pair[1]]


@pytest.mark.parametrize("unbuffered", [False, True])
def test_its_world(standby, script, tmp_path, unbuffered):
    path = script(_WORLD)
    (tmp_path / "in").write_text("line\nother\r\nend")

    def limited():
        os.umask(0o027)
        os.nice(3)
        os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_NOFILE, (100, 600))
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])

    read, write = os.pipe()
    os.set_inheritable(read, True)
    env = {"FOO": "b\udcffr", "OMP_NUM_THREADS": "3", "PYTHONUNBUFFERED": "1" if unbuffered else ""}
    with open(tmp_path / "in") as file:
        answers = []
        for words in ([path, "a", ""], ["--no-standby", path, "a", ""]):
            file.seek(0)
            options = {"stdin": file, "cwd": tmp_path, "preexec_fn": limited, "pass_fds": [read], "env": env}
            answers.append(standby.run(*words, **options))
    os.close(read)
    os.close(write)
    ours, plain = answers
    assert (ours.stderr, plain.stderr) == ("", "")
    assert different(ours.stdout, plain.stdout) == []
    assert ours.stdout.splitlines()[-1] == "True"  # a group of its own, for signals of the terminal


def test_it_is_a_fork_and_says_so(standby, script):
    path = script(f"{_WHERE}import os; print(where, os.getppid() == os.getpid())")
    done = standby.run(path, said=True)
    assert done.stdout == "forked False\n"
    assert done.stderr == "wan-loader: 0 loads took the fast path: torch was not imported\n"
    ours, plain = standby.both(path)
    assert (ours.stdout.split()[0], plain.stdout.split()[0]) == ("forked", "imported")
    assert standby.run(path, env={"WAN_LOADER_STANDBY": "0"}).stdout.startswith("imported")


_ENDS = {
    "an error": "def f():\n    1 / 0\nprint('said')\nf()",
    "a mistake": "print('a'",
    "a code": "import sys; sys.exit(3)",
    "a large code": "import sys; sys.exit(259)",
    "a text": "import sys; sys.exit('that is it')",
    "none": "raise SystemExit",
    "at once": "import os; print('lost'); os._exit(4)",
    "a signal": "import os; os.kill(os.getpid(), 15)",
    "killed": "import os; os.kill(os.getpid(), 9)",
    "nobody reads": "import os, signal; signal.signal(13, signal.SIG_DFL); os.kill(os.getpid(), 13)",
    "Ctrl-C": "import atexit, os; atexit.register(print, 'at exit')\ntry:\n    os.kill(os.getpid(), 2)\n"
    "finally:\n    print('cleaned')",
    "a kind of Ctrl-C": "class Stop(KeyboardInterrupt): pass\nraise Stop",
    "a hook": "import sys; sys.excepthook = lambda kind, error, tb: print('mine', kind, tb.tb_lineno)\n1 / 0",
    "a hook that fails": "import sys\ndef hook(*_): raise KeyboardInterrupt\nsys.excepthook = hook\n1 / 0",
    "a fork": "import os, sys; pid = os.fork(); pid and os.wait(); print('end'); sys.exit(2)",
    "a thread": "import threading, time\nthreading.Thread(target=lambda: (time.sleep(0.05), print('late'))).start()",
    "a file left open": "import sys; f = open(sys.argv[0] + '.out', 'w'); f.write('kept')\nclass A:\n"
    "    def __del__(self): print('deleted')\na = A(); a.a = a",
    "output that cannot be written": "import os, sys; sys.stdout = open('/dev/full', 'w'); print('x')",
    "a closed stream": "import sys; print('said'); sys.stdout.close()",
}


@pytest.mark.parametrize("end", _ENDS)
def test_it_ends_as_directly(standby, script, end):
    path = script(_ENDS[end])
    ours, plain = standby.both(path)
    assert (ours.returncode, ours.stdout) == (plain.returncode, plain.stdout)
    assert ours.stderr.splitlines()[-1:] == plain.stderr.splitlines()[-1:]
    if end == "a file left open":
        assert (path.parent / "program.py.out").read_text() == "kept"
    if end != "output that cannot be written":  # who tells of it calls it by another name
        assert ours.stderr == plain.stderr


def test_a_module_and_a_script_that_is_not_there(standby, script, tmp_path):
    script(f"{_WHERE}print(where, sys.argv[1:], __name__)", "part.py")
    ours, plain = standby.both("-m", "part", "x", cwd=tmp_path)
    assert (ours.stdout, plain.stdout) == ("forked ['x'] __main__\n", "imported ['x'] __main__\n")
    ours, plain = standby.both(tmp_path / "none.py")
    assert (ours.returncode, ours.stdout, ours.stderr) == (plain.returncode, plain.stdout, plain.stderr)
    assert (ours.returncode, "is no script" in ours.stderr) == (1, True)


def test_a_directory_that_is_gone(standby, tmp_path):
    def go():
        (tmp_path / "gone").mkdir()
        os.chdir(tmp_path / "gone")
        (tmp_path / "gone").rmdir()

    done = standby.run("-m", "this", preexec_fn=go)
    assert (done.stdout[:18], done.stderr) == ("The Zen of Python,", "")
    assert "none.py is no script" in standby.run("none.py", preexec_fn=go).stderr


def test_all_descriptors_that_can_be_passed(standby, script):
    def fill():
        for fd in range(3, FIRST_OWN):
            os.dup2(2, fd)

    path = script(f"{_WHERE}import os; print(where, len(os.listdir('/proc/self/fd')) > {FIRST_OWN})")
    done = standby.run(path, said=True, preexec_fn=fill, close_fds=False)
    assert done.stdout == "forked True\n", done.stderr


def test_its_time_zone(standby, script):
    path = script("import time; print(time.localtime(0).tm_hour)")
    assert standby.run(path, env={"TZ": "UTC-5"}).stdout == "5\n"


def test_random_numbers_differ(standby, script):
    path = script("import random; print(random.random())")
    assert len({standby.run(path).stdout for _ in range(3)}) == 3


@pytest.mark.parametrize("closed", [[0], [1], [2], [0, 1, 2]])
def test_streams_that_are_closed(standby, script, tmp_path, closed):
    path = script(
        "import os, sys; streams = sys.stdin, sys.stdout, sys.stderr\n"
        "file = open(sys.argv[1], 'w'); print([s and s.fileno() for s in streams], file.fileno(), file=file)"
    )
    texts = []
    for words in ([], ["--no-standby"]):
        standby.run(*words, path, tmp_path / "out", preexec_fn=lambda: [os.close(fd) for fd in closed])
        texts.append((tmp_path / "out").read_text())
    assert texts[0] == texts[1]


def test_a_pipe_is_the_programs_alone(standby, script):
    """Who reads it sees its end when the program closes it, and who writes to it a reader that has left."""
    path = script("import os, sys; os.close(1); os.close(0); sys.stderr.write('x'); sys.stderr.flush()\n"
                  "import time; time.sleep(30)")  # fmt: skip
    process = standby.popen(path, stdin=subprocess.PIPE)
    try:
        assert process.stdout.read() == ""
        assert process.stderr.read(1) == "x"
        with pytest.raises(BrokenPipeError):
            os.write(process.stdin.fileno(), b"x")
    finally:
        process.kill()
        process.stdin.close()
        process.stdin = None
        process.communicate()


def test_fifty_at_once(standby, script):
    path = script(f"{_WHERE}import os, time; time.sleep(0.2); print(where, os.getpid(), sys.argv[1]); sys.exit(7)")
    processes = [standby.popen(path, i) for i in range(50)]
    said = [(process.communicate(timeout=60)[0].split(), process.returncode) for process in processes]
    assert {code for _, code in said} == {7}
    assert {words[0] for words, _ in said} == {"forked"}
    assert [words[2] for words, _ in said] == [str(i) for i in range(50)]
    assert len({words[1] for words, _ in said}) == 50


def test_a_client_that_is_killed_takes_its_program_with_it(standby, script):
    process, program, watcher = waiting(standby, script, 60)
    process.kill()
    wait_until_gone(program)
    wait_until_gone(watcher)
    process.communicate()


def test_a_program_whose_watcher_is_killed(standby, script):
    process, program, watcher = waiting(standby, script, 60)
    os.kill(watcher, signal.SIGKILL)
    wait_until_gone(program)
    process.communicate(timeout=10)
    assert process.returncode == -signal.SIGKILL


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGQUIT])
def test_signals_reach_it(standby, script, number):
    process, program, _ = waiting(standby, script, 60)
    process.send_signal(number)
    process.communicate(timeout=10)
    assert process.returncode == -number
    wait_until_gone(program)


def test_signals_that_it_handles(standby, script):
    path = script(
        "import os, signal\n"
        "for n in (signal.SIGINT, signal.SIGTERM, signal.SIGWINCH, signal.SIGCONT, signal.SIGRTMIN):\n"
        "    signal.signal(n, lambda n, _: print(int(n), flush=True))\n"
        "print('ready', flush=True)\n"
        "for _ in range(5): signal.pause()\n"
    )
    process = standby.popen(path)
    assert process.stdout.readline() == "ready\n"
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGWINCH, signal.SIGCONT, signal.SIGRTMIN):
        process.send_signal(number)
        assert process.stdout.readline() == f"{int(number)}\n"
    process.communicate(timeout=10)
    assert process.returncode == 0


def test_signals_before_it_has_begun(standby, script):
    """None is lost, whenever it comes."""
    path = script("import time; time.sleep(60)")
    processes = [standby.popen(path) for _ in range(4)]
    for i, process in enumerate(processes):
        time.sleep(0.02 * i)
        process.terminate()
    with concurrent.futures.ThreadPoolExecutor() as threads:
        list(threads.map(lambda process: process.communicate(timeout=30), processes))
    assert {process.returncode for process in processes} == {-signal.SIGTERM}
