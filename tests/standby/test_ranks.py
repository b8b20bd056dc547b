"""`wan-loader run --nproc N`: N processes of one group, from one import."""

import signal

import pytest
from programs import check_usage
from standbys import wait_until_gone

_RANK = """
import os, sys, time
names = "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "OMP_NUM_THREADS"
where = "forked" if "wan_loader.standby.server" in sys.modules else "imported"
words = *(os.environ[name] for name in names), where, os.environ["MASTER_PORT"].isdecimal(), os.getpid(), *sys.argv[1:]
os.write(1, (" ".join(map(str, words)) + chr(10)).encode())
if sys.argv[1:] == [os.environ["RANK"]]:
    sys.exit(4)
time.sleep(60 if sys.argv[1:] else 0)
"""


@pytest.mark.parametrize("words", [["--nproc", "2"], ["--nproc=2"]])
def test_all_are_forks(standby, script, words):
    done = standby.run(*words, script(_RANK), env={"OMP_NUM_THREADS": ""})
    lines = sorted(line.split() for line in done.stdout.splitlines())
    assert [line[:-1] for line in lines] == [
        [rank, rank, "2", "2", "127.0.0.1", "forked", "True"] for rank in ("0", "1")
    ], done.stderr


def test_the_first_speaks_alone(standby, script):
    done = standby.run("--nproc", "2", script("import os; os.write(1, b'said\\n')"), said=True)
    assert (done.stdout, done.stderr.count("wan-loader: 0 loads")) == ("said\nsaid\n", 1)


@pytest.mark.parametrize("words", [[], ["--no-standby"]])
def test_one_that_fails_ends_the_others(standby, script, words):
    done = standby.run("--nproc", "2", *words, script(_RANK), "1")
    assert done.returncode == 4
    assert {line.split()[6] for line in done.stdout.splitlines()} <= {"imported" if words else "forked"}


def test_signals_reach_all(standby, script):
    process = standby.popen("--nproc", "2", script(_RANK), "both")
    programs = [int(process.stdout.readline().split()[8]) for _ in range(2)]
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    assert process.returncode == 128 + signal.SIGTERM
    for program in programs:
        wait_until_gone(program)


def test_a_server_is_started_for_them(own, script, tmp_path):
    server = own(tmp_path / "packages")
    about = tmp_path / "packages" / "wan_loader-0.dist-info"
    about.mkdir(parents=True)
    # none of the tree's own modules, which take long
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: wan-loader\nVersion: 0\n")
    done = server.run("--nproc", "2", script(_RANK))
    assert {line.split()[6] for line in done.stdout.splitlines()} == {"forked"}, done.stderr
    assert server.pid() is not None


@pytest.mark.parametrize("words", [["--nproc", "0", "x.py"], ["--nproc", "x", "x.py"], ["--nproc", "2", "--", "ls"]])
def test_numbers_that_are_none(standby, words):
    check_usage(standby.command("run", *words, check=False), "--nproc")
