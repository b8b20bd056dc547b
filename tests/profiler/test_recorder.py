"""The recorder inside programs, with a clock that the test turns."""

import importlib
import json
import os

import pytest

from wan_loader.profiler.agent.recorder import AgentRecorder


class Clock:
    def __init__(self):
        self.now = 1_000_000_000

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def recorder(tmp_path, clock, monkeypatch):
    monkeypatch.setattr(os, "register_at_fork", lambda **_: None)
    recorder = AgentRecorder(str(tmp_path), {"argv": ["x"]}, clock=clock)
    recorder.directory = tmp_path
    return recorder


def lines(recorder):
    (path,) = recorder.directory.glob("*.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def rows(recorder):
    recorder.stop("exit")
    return [(r[0], r[1] - 10**9, r[2] - 10**9, r[3], r[5]) for line in lines(recorder) for r in line.get("spans", [])]


def turn(clock, microseconds):
    clock.now += microseconds * 1000


def test_the_innermost_span_gets_the_time(recorder, clock):
    recorder.begin("construct", "Net")
    turn(clock, 100)
    recorder.begin("random_init", "uniform_")
    turn(clock, 300)
    recorder.end(7)
    turn(clock, 50)
    recorder.end()
    assert rows(recorder) == [
        ("construct", 0, 100_000, 0, "Net"),
        ("random_init", 100_000, 400_000, 7, "uniform_"),
        ("construct", 400_000, 450_000, 0, "Net"),
    ]


def test_equal_neighbours_become_one(recorder, clock):
    for _ in range(1000):
        recorder.begin("random_init", "uniform_")
        turn(clock, 10)
        recorder.end(1)
        turn(clock, 1)
    assert rows(recorder) == [("random_init", 0, 10_999_000, 1000, "uniform_")]


def test_a_dropped_span_leaves_its_time_to_the_outer_one(recorder, clock):
    recorder.begin("assign", "load_state_dict")
    recorder.begin("h2d", "to")
    turn(clock, 10)
    recorder.drop()
    turn(clock, 5)
    recorder.end()
    assert rows(recorder) == [("assign", 0, 15_000, 0, "load_state_dict")]


def test_kind_known_at_the_end(recorder, clock):
    recorder.begin("h2d", "to")
    turn(clock, 10)
    recorder.end(64, ("cast", "float32 to bfloat16"))
    assert rows(recorder) == [("cast", 0, 10_000, 64, "float32 to bfloat16")]


def test_page_faults_are_split_off(recorder, clock, monkeypatch):
    before = (0, 0, 0)
    monkeypatch.setattr(recorder, "counters", lambda: (5_000_000, 0, 4_000_000))
    recorder.begin("cast", "x")
    turn(clock, 10_000)
    recorder.end(64, None, before)
    assert rows(recorder) == [
        ("read", 0, 6_000_000, 5_000_000, "page faults in x"),
        ("cast", 6_000_000, 10_000_000, 64, "x"),
    ]


def test_without_fetched_bytes_nothing_is_split_off(recorder, clock, monkeypatch):
    monkeypatch.setattr(recorder, "counters", lambda: (0, 0, 0))
    turn(clock, 5_000_000)
    recorder.begin("cast", "x")
    turn(clock, 10)
    recorder.end(64, None, (0, 0, 0))
    assert [r[0] for r in rows(recorder)] == ["cast"]


def test_what_was_done_is_on_disk_while_the_program_runs(recorder, clock):
    recorder.begin("import", "torch")
    turn(clock, 200_000)
    recorder.begin("import", "numpy")
    found = lines(recorder)
    assert found[-1]["spans"][0][:3] == ["import", 10**9, 10**9 + 200_000_000]
    assert [entry[2] for entry in found[-1]["open"]] == ["torch", "numpy"]


def test_nothing_is_recorded_after_the_end(recorder, clock):
    undone = []
    recorder.undo.append(lambda: undone.append(1))
    recorder.undo.append(lambda: 1 / 0)
    recorder.stop("until")
    recorder.stop("exit")
    assert undone == [1]
    assert [line["end"]["why"] for line in lines(recorder) if "end" in line] == ["until"]


def test_a_deadline_ends_the_recording(tmp_path, clock, monkeypatch):
    monkeypatch.setattr(os, "register_at_fork", lambda **_: None)
    recorder = AgentRecorder(str(tmp_path), {}, deadline_ns=clock.now + 10, clock=clock)
    turn(clock, 200_000)
    recorder.begin("read", "x")
    assert not recorder.on


def test_a_vanished_directory_is_no_error(tmp_path, clock, monkeypatch):
    monkeypatch.setattr(os, "register_at_fork", lambda **_: None)
    assert not AgentRecorder(str(tmp_path / "gone"), {}, clock=clock).on


def test_imports_nothing_but_the_standard_library():
    import ast
    import sys
    from pathlib import Path

    package = Path(importlib.import_module("wan_loader.profiler.agent").__file__).parent
    for path in package.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert all(a.name.split(".")[0] in sys.stdlib_module_names for a in node.names), path
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                assert node.module.split(".")[0] in sys.stdlib_module_names, path


def test_waiting_is_believed_as_far_as_bytes_fetched_ahead_account_for_it(recorder, clock, monkeypatch):
    monkeypatch.setattr(recorder, "io", lambda: (10_000_000, 0))
    monkeypatch.setattr("time.thread_time_ns", lambda: 0)
    recorder._read_bytes = 0
    before = recorder.counters()
    assert recorder._faults(before, 80_000_000, 1 << 20) == (50_000_000, 0)
    assert recorder._faults(before, 80_000_000, 1 << 20) == (0, 0)
