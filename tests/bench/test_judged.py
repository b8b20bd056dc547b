"""The benchmark that judges what `profile` says: it finds each lie, and its programs run."""

import contextlib
import importlib
import json

import pytest
from programs import ROOT, TORCH

TRUE = {
    "seconds": 2.0,
    "subject": 1,
    "verdict": {"phase": "read", "why": "reading; rank 0 waited"},
    "notes": ["counted from outside"],
    "processes": [
        {"name": "sh", "rank": None, "role": "launcher", "ended": "exit 0", "facts": {}},
        {"name": "w.py", "rank": 1, "role": "worker", "ended": "exit 7", "facts": {"files": {"/tmp/w.gguf": {}}}},
    ],
}


@pytest.fixture
def judged(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("judged")


@pytest.fixture
def truth(judged):
    return judged.Program(
        because="it reads",
        phase="read",
        process="rank 1: w.py",
        worker=True,
        says="rank 0 waited",
        file="w.gguf",
        ended="exit 7",
        note="from outside",
    )


def test_the_truth_is_right(judged, truth):
    assert judged.judge(truth, TRUE, 2.05) == []


@pytest.mark.parametrize(
    ("lie", "found"),
    [
        ({"seconds": 2.2}, "off"),
        ({"subject": 0}, "process sh"),
        ({"verdict": {"phase": "cast", "why": "rank 0 waited"}}, "phase cast"),
        ({"verdict": {"phase": "read", "why": "reading"}}, "does not name"),
        ({"notes": []}, "no note"),
        ({"processes": [{}, TRUE["processes"][1] | {"role": ""}]}, "role program"),
        ({"processes": [{}, TRUE["processes"][1] | {"ended": "exit 0"}]}, "ended"),
        ({"processes": [{}, TRUE["processes"][1] | {"facts": {}}]}, "files []"),
    ],
)
def test_each_lie_is_found(judged, truth, lie, found):
    assert found in "; ".join(judged.judge(truth, TRUE | lie, 2.0))


def test_there_are_enough_programs_of_each_kind(judged):
    families = importlib.import_module("judged_programs")._FAMILIES
    assert len(judged.PROGRAMS) >= 25
    assert len(families) >= 10


def test_programs_run_and_are_judged(judged, monkeypatch, tmp_path, benchmark_main, capfd):
    programs = importlib.import_module("judged_programs")
    monkeypatch.setattr(programs, "_TENSORS", 1)
    monkeypatch.setattr(programs, "_COLD_TENSORS", 1)
    monkeypatch.setenv("PYTHONPATH", "")
    output = tmp_path / "judged.json"
    with contextlib.suppress(SystemExit):  # the machine may be so busy that a total is off
        benchmark_main("judged", "--only", "sleep", "--only", "shell_sleep", "--output", output, modules=TORCH)
    rows = json.loads(output.read_text())["programs"]
    assert [row["said"] for row in rows] == ["wait, program.py", "wait, sleep"]
    assert "sleeping took" in rows[0]["why"]
    assert "of 2 judged rightly; 1 of several processes" in capfd.readouterr().out
