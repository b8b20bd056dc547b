"""`wan-loader profile` under torchrun: a session of each process, and a report that puts them side by side."""

import dataclasses
import json
import os

import pytest

torch = pytest.importorskip("torch")

from programs import DISTRIBUTED, Program, run  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from wan_loader.errors import SessionError  # noqa: E402
from wan_loader.profiler.analysis.ranks import compare_ranks  # noqa: E402
from wan_loader.profiler.analysis.session import read_session  # noqa: E402

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "COLUMNS": "150"}


def torchrun(*words, cwd, python):
    """How two processes of a command end that torchrun starts as `python`."""
    env = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", *words]
    program = Program(*command, env=env | ENVIRONMENT | {"PYTHON_EXEC": python}, cwd=cwd, modules=DISTRIBUTED)
    return program.wait(100), *program.output()


def report(*words, cwd):
    return run("-m", "wan_loader", "report", *words, env=ENVIRONMENT, cwd=cwd)


@pytest.fixture(scope="module")
def profiled(tmp_path_factory, python_that_forks):
    """A directory with the sessions of two processes, and how the run ended."""
    here = tmp_path_factory.mktemp("profiled")
    save_file({f"w{i}": torch.full((1 << 18,), float(i)) for i in range(6)}, here / "model.safetensors")
    words = ["wan_loader", "profile", "model.safetensors", "--device", "cpu", "--no-ceilings", "-o", "run.json"]
    return here, torchrun(*words, cwd=here, python=str(python_that_forks(DISTRIBUTED)))


def test_a_session_of_each_process(profiled):
    here, (code, out, err) = profiled
    assert code == 0, err
    assert out.count("verdict") == 1
    reports = [read_session(here / f"run.rank{rank}.json").report for rank in range(2)]
    assert sum(r.settings["nbytes_read"] for r in reports) == 6 << 20
    assert all("shard" in {phase.name for phase in r.phases} for r in reports)


def test_report_of_all(profiled):
    here, _ = profiled
    done = report("run.rank1.json", "run.rank0.json", cwd=here)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "model.safetensors: 2 of 2 processes"
    assert [line.split()[0] for line in lines[2:4]] == ["0", "1"]
    assert lines[-1].startswith("6.29 MB read in all")
    document = json.loads(report("run.rank0.json", "run.rank1.json", "--json", cwd=here).stdout)
    assert [p["nbytes_read"] for p in document["processes"]] == [3 << 20] * 2
    twice = report("run.rank0.json", "run.rank0.json", cwd=here)
    assert (twice.returncode, "not sessions of one" in twice.stderr) == (1, True)


def test_the_slow_one_is_named(profiled):
    here, _ = profiled
    sessions = [read_session(here / f"run.rank{rank}.json") for rank in range(2)]

    def slowed(session, seconds):
        phases = [p if p.name != "read" else dataclasses.replace(p, busy_s=seconds) for p in session.report.phases]
        report = dataclasses.replace(session.report, phases=tuple(phases), seconds=seconds + 1)
        return dataclasses.replace(session, report=report)

    slow = compare_ranks([slowed(sessions[0], 2.0), slowed(sessions[1], 9.0)])
    assert "process 1 reads for 9.00 s, 7.00 s longer than process 0" in slow.sentence
    assert "even" in compare_ranks([slowed(sessions[0], 2.0), slowed(sessions[1], 2.1)]).sentence
    alone = dataclasses.replace(sessions[0].report, settings={})
    with pytest.raises(SessionError, match="one process"):
        compare_ranks([dataclasses.replace(sessions[0], report=alone)])


def test_load_together(profiled, ranks):
    here, _ = profiled
    ended = ranks("worker_cli.py", 2, "load", here / "model.safetensors", "--device", "cpu", "--verify", "--json")
    assert [process.code for process in ended] == [0, 0], ended
    assert ended[1].stdout == ""
    document = json.loads(ended[0].stdout)
    assert document["verified_tensors"] == 6
    assert document["settings"]["nbytes_read"] == document["settings"]["nbytes_received"] == 3 << 20


def test_a_process_without_the_file_ends_all(ranks):
    for process in ranks("worker_cli.py", 2, "profile", "missing", "--device", "cpu"):
        assert process.code == 1
        assert "missing does not exist" in process.output
