"""All processes of a program: who set the pace, who waited, how each ended, and what each read, whoever it was."""

import itertools
import json
import os
import sys
from dataclasses import replace

import pytest

from wan_loader.profiler.analysis.assemble import Environment, program_session
from wan_loader.profiler.analysis.merge import merge
from wan_loader.profiler.analysis.outside import COUNTED, unseen_reads
from wan_loader.profiler.analysis.roles import HELPER, LAUNCHER, WORKER, name_of, role_of
from wan_loader.profiler.analysis.session import Process, Turn, path_spans
from wan_loader.profiler.analysis.story import launchers_of, pace_sentence, subject_of, turns_of, waits_of
from wan_loader.profiler.analysis.weight_files import files_of
from wan_loader.profiler.logs import read_logs
from wan_loader.profiler.program import Recording, run_program
from wan_loader.profiler.watch import Counters, SeenProcess
from wan_loader.spans import Mark

S = 1_000_000_000
MB = 1 << 20


def process(pid, start, end, *spans, **fields):
    """A process with spans (phase, from, to) in seconds."""
    marks = tuple(Mark(name, int(a * S), int(b * S), 0, "MainThread", name) for name, a, b in spans)
    fields = {"title": f"p{pid}", "name": f"p{pid}", **fields}
    return Process(pid=pid, start_ns=int(start * S), end_ns=int(end * S), spans=marks, **fields)


def story(processes):
    """(turns as (pid, from, to), pid of the subject)."""
    end_ns = max(p.end_ns for p in processes)
    turns = turns_of(processes, end_ns)
    assert turns[0].start_ns == 0
    assert turns[-1].end_ns == end_ns
    assert all(a.end_ns == b.start_ns for a, b in itertools.pairwise(turns))
    told = [(processes[t.process].pid, t.start_ns / S, t.end_ns / S) for t in turns]
    return told, processes[subject_of(processes, turns)].pid


class TestStory:
    def test_one_process_has_it_all(self):
        assert story([process(1, 0, 5, ("read", 1, 2))]) == ([(1, 0, 5)], 1)

    def test_a_parent_that_waits_gives_the_turn_to_its_child(self):
        parent = process(1, 0, 9, ("import", 0, 2), ("wait", 2, 8))
        child = process(2, 2, 8, ("read", 3, 7), parent=1)
        assert story([parent, child]) == ([(1, 0, 2), (2, 2, 8), (1, 8, 9)], 2)

    def test_the_slowest_rank_sets_the_pace_and_the_other_waits_in_a_collective(self):
        launcher = process(1, 0, 10, ("import", 0, 1), role=LAUNCHER)
        fast = process(2, 1, 10, ("read", 1, 3), ("shard", 3, 9), rank=0, parent=1)
        slow = process(3, 1, 10, ("read", 1, 9), ("shard", 9, 9.01), rank=1, parent=1)
        processes = [launcher, fast, slow]
        turns = turns_of(processes, 10 * S)
        assert processes[subject_of(processes, turns)] is slow
        assert launchers_of(processes) == {0}
        waits = {w.process: w for w in waits_of(processes, turns)}
        assert waits[1].together
        assert 6.9 < waits[1].seconds < 7.1
        told = pace_sentence(processes, turns, 2)
        assert told.startswith("rank 1: p3 set it for 9 s")
        assert "rank 0: p2 waited 7 s" in told
        assert "(in collectives)" in told

    def test_a_launcher_is_not_the_subject_though_it_took_longer(self):
        launcher = process(1, 0, 10, ("import", 0, 8), role=LAUNCHER)
        script = process(2, 8, 10, ("read", 8, 9), parent=1)
        assert story([launcher, script])[1] == 2
        alone = [process(1, 0, 10, ("import", 0, 8), role=LAUNCHER)]
        assert story(alone)[1] == 1

    def test_who_computes_is_at_work_though_nothing_was_recorded(self):
        parent = process(1, 0, 6, busy=((0, 2 * S), (4 * S, 6 * S)))
        worker = process(2, 0, 6, ("read", 2.5, 3), parent=1)
        assert [t[0] for t in story([parent, worker])[0]][:2] == [1, 2]

    def test_the_spans_of_the_story_add_up(self):
        processes = [process(1, 0, 4, ("read", 0, 3)), process(2, 0, 4, ("cast", 1, 4))]
        processes = [processes[0], processes[1]]
        spans = path_spans(processes, [Turn(0, 0, 2 * S), Turn(1, 2 * S, 4 * S)])
        assert [(s.name, s.start_ns / S, s.end_ns / S) for s in spans] == [("read", 0, 2), ("cast", 2, 4)]
        assert [s.track for s in spans] == ["1 MainThread", "2 MainThread"]


@pytest.mark.parametrize(
    ("argv", "role", "name"),
    [
        ("python /venv/bin/torchrun --nproc_per_node 2 s.py", LAUNCHER, "torchrun"),
        ("torchrun s.py", LAUNCHER, "torchrun"),
        ("python -m torch.distributed.run s.py", LAUNCHER, "-m torch.distributed.run"),
        ("/venv/bin/python3.11 /venv/bin/accelerate launch --cpu s.py", LAUNCHER, "accelerate launch"),
        ("bash run.sh", LAUNCHER, "bash run.sh"),
        ("/bin/sh ./deep/run.sh launch", LAUNCHER, "sh run.sh"),
        ("bash -c torchrun", LAUNCHER, "bash"),
        ("python -u /deep/down/s.py --flag", "", "s.py"),
        ("python -X faulthandler s.py", "", "s.py"),
        ("python -m json.tool", "", "-m json.tool"),
        ("./generate --fast", "", "generate"),
    ],
)
def test_roles(argv, role, name):
    assert (role_of(argv.split()), name_of(argv.split())) == (role, name)


def test_roles_of_what_multiprocessing_starts():
    spawned = ["python", "-c", "from multiprocessing.spawn import spawn_main; spawn_main()", "--multiprocessing-fork"]
    tracker = ["python", "-c", "from multiprocessing.resource_tracker import main;main(4)"]
    server = ["python", "-B", "-c", "from multiprocessing.forkserver import main; main()"]
    assert [role_of(argv) for argv in (spawned, tracker, server)] == [WORKER, HELPER, HELPER]
    assert role_of(server, forked=True) == role_of(["python", "s.py"], forked=True) == WORKER
    assert name_of(spawned) == ""


FAMILY = """
import multiprocessing as mp, os, signal, subprocess, sys, time
weights = sys.argv[1]
def returns():
    open(weights, "rb").read()
    time.sleep(0.3)
def killed():
    open(weights, "rb").read()
    time.sleep(0.2)
    os.kill(os.getpid(), signal.SIGKILL)
def leaves():
    os.read(os.open(weights, os.O_RDONLY), 1 << 30)
    os._exit(3)
if __name__ == "__main__":
    for work in (returns, killed, leaves):
        worker = mp.get_context("fork").Process(target=work)
        worker.start()
        worker.join()
    worker = mp.get_context("spawn").Process(target=returns)
    worker.start()
    worker.join()
    subprocess.run([sys.executable, "-c", "import sys, time; open(sys.argv[1], 'rb').read(); sys.exit(4)", weights])
    subprocess.run(["sh", "-c", f"exec 3<{weights}; cat <&3 >/dev/null; sleep 0.4; exit 5"])
"""


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """The processes of a program with six children."""
    here = tmp_path_factory.mktemp("family")
    (here / "m.gguf").write_bytes(bytes(48 * MB))
    (here / "program.py").write_text(FAMILY)
    recording = run_program([sys.executable, str(here / "program.py"), str(here / "m.gguf")])
    return recording, merge(recording), str(here / "m.gguf")


class TestFamily:
    def test_each_ended_as_it_did(self, family):
        _, processes, _ = family
        children = [p for p in processes if p.parent == processes[0].pid and p.role != HELPER]
        assert [p.ended for p in children] == ["exit 0", "killed by SIGKILL", "exit 3", "exit 0", "exit 4", "exit 5"]
        assert processes[0].ended == "exit 0"

    def test_all_are_on_one_clock(self, family):
        recording, processes, _ = family
        root = processes[0]
        assert (root.start_ns, root.end_ns) == (0, recording.end_ns - recording.start_ns)
        children = [p for p in processes if p.parent == root.pid and p.role == WORKER]
        assert len(children) == 4
        for before, after in itertools.pairwise(children):
            assert before.start_ns < before.end_ns <= after.start_ns + 200_000_000

    def test_what_each_read_is_seen(self, family):
        _, processes, weights = family
        assert list(files_of(processes)) == [weights]
        readers = [p for p in processes if sum(s.nbytes for s in p.spans if s.name == "read") >= 40 * MB]
        killed = [p for p in readers if p.ended == "killed by SIGKILL"]
        assert killed, "what a killed process had done is kept"
        assert {p.ended for p in readers} >= {"exit 0", "exit 3", "exit 4", "killed by SIGKILL"}
        for reader in readers:
            assert sum(s.nbytes for s in reader.spans if s.name == "read") < 60 * MB, "counted once"

    def test_what_runs_no_python_is_counted_from_outside(self, family):
        recording, processes, weights = family
        (shell,) = [p for p in processes if p.name == "sh"]
        assert shell.facts["unseen"]
        assert weights in shell.facts["files"]
        # cat is seen by itself, or in the counters of the shell that has waited for it
        outside = [p for p in processes if p.facts.get("unseen")]
        assert 40 * MB <= sum(p.facts.get("counted_bytes", 0) for p in outside) <= 60 * MB
        notes = program_session(recording, processes, Environment()).notes
        assert any("sh" in note and "counted from outside" in note for note in notes)
        assert any("killed by SIGKILL" in note for note in notes)

    def test_the_report_is_about_the_whole_program(self, family, tmp_path):
        recording, processes, _ = family
        session = program_session(recording, processes, Environment())
        assert session.report.seconds == pytest.approx((recording.end_ns - recording.start_ns) / 1e9)
        assert session.report.nbytes_file == 48 * MB
        assert sum(session.paced_s(i) for i in range(len(processes))) == pytest.approx(session.report.seconds)
        assert "program.py" in session.verdict.why
        from wan_loader.profiler.analysis.session import read_session

        (tmp_path / "run.json").write_text(json.dumps(session.to_json()))
        again = read_session(tmp_path / "run.json")
        assert again.to_json() == session.to_json()
        assert again.spans == session.spans


READERS = """
import os, sys, time
import numpy
weights, way = sys.argv[1:]
if way == "array":
    numpy.fromfile(weights, dtype="uint8")
elif way == "memmap":
    int(numpy.memmap(weights, mode="r")[::4096].sum())
elif way == "pread":
    fd = os.open(weights, os.O_RDONLY)
    os.pread(fd, 1 << 30, 0)
    time.sleep(0.25)
elif way == "readinto":
    open(weights, "rb").readinto(bytearray(os.path.getsize(weights)))
"""


@pytest.mark.parametrize("way", ["array", "memmap", "pread", "readinto"])
def test_no_weight_file_goes_unseen(tmp_path, way):
    weights = tmp_path / ("model.whatever" if way == "pread" else "model.safetensors")
    weights.write_bytes(bytes(40 * MB))
    script = tmp_path / "program.py"
    script.write_text(READERS)
    processes = merge(run_program([sys.executable, str(script), str(weights), way]))
    assert files_of(processes)[str(weights)].nbytes == 40 * MB
    nbytes = sum(s.nbytes for s in processes[0].spans if s.name == "read")
    if way != "memmap":  # of a file in the page cache: nothing is fetched, and nothing is called
        assert 36 * MB <= nbytes <= 50 * MB


class TestUntrustedLogs:
    def test_what_is_no_plain_file_is_left_out(self, tmp_path):
        (tmp_path / "secret.json").write_text('{"begin": {"pid": 1}}')
        (tmp_path / "1-1.jsonl").symlink_to(tmp_path / "secret.json")
        os.mkfifo(tmp_path / "2-2.jsonl")
        (tmp_path / "3-3.jsonl").write_bytes(b'{"begin": {"pid": 3}}\nnonsense\n[1]\n{"end": ')
        (tmp_path / "4-4.jsonl").mkdir()
        assert read_logs(tmp_path) == ((), (), ({"begin": {"pid": 3}},), ())

    @pytest.mark.parametrize("value", [None, "x", -1, 1 << 80, [], {}, True, 1.5])
    def test_fields_of_another_form_are_left_out(self, value):
        begin = {"pid": 7, "ppid": value, "at": value, "started": value, "rank": value, "argv": value, "env": value}
        rows = {"spans": [["read", value, 5, 1, "t", "l"], value], "open": [value], "at": value}
        lines = ({"begin": begin}, rows, {"file": ["/a", {"nbytes": value}]}, {"child": [value] * 3})
        lines += ({"end": {"at": value, "why": value, "facts": value}},)
        recording = Recording(argv=("x",), pid=5, start_ns=0, end_ns=S, returncode=0, logs=(lines,))
        program_session(recording, merge(recording), Environment()).to_json()


def counted(*points):
    """A process whose counters were (seconds, bytes through calls) with a weight file open."""
    counters = [Counters(int(at * S), 0, 0, nbytes, 0, True) for at, nbytes in points]
    return SeenProcess(7, 1, 0, ("python",), None, counters)


def test_recorded_reads_are_not_counted_again():
    """The kernel counts a call at its end: the bytes come in another window than most of the span."""
    seen = counted((0.1, 0), (0.2, 0), (0.3, 0), (0.4, 100 * MB), (0.5, 100 * MB), (0.6, 130 * MB))
    recording = Recording(argv=("x",), pid=7, start_ns=0, end_ns=S, returncode=0, logs=(), seen=(seen,))
    read = Mark("read", S // 20, int(0.35 * S), 100 * MB, "MainThread", "open().read")
    (found,) = unseen_reads([read], seen, recording)
    assert (found.nbytes, found.label) == (30 * MB, COUNTED)
    assert found.start_ns >= S // 2


def test_what_is_fetched_for_a_recorded_call_is_not_counted_with_the_call():
    """Storage is counted while the call goes on, the call when it is over."""
    seen = counted((0.1, 0), (0.2, 0), (0.3, 0), (0.4, 100 * MB), (0.5, 100 * MB))
    fetched = (0, 40 * MB, 90 * MB, 100 * MB, 100 * MB)
    seen.counters[:] = [replace(c, read_bytes=nbytes) for c, nbytes in zip(seen.counters, fetched, strict=True)]
    recording = Recording(argv=("x",), pid=7, start_ns=0, end_ns=S, returncode=0, logs=(), seen=(seen,))
    read = Mark("read", S // 8, int(0.35 * S), 100 * MB, "MainThread", "open().read")
    assert not list(unseen_reads([read], seen, recording))


def test_counters_of_children_that_were_waited_for_are_taken_out():
    seen = counted((0.1, 0), (0.2, 0), (0.3, 200 * MB))
    child = SeenProcess(8, 7, 0, ("cat",), int(0.25 * S), [Counters(int(0.25 * S), 0, 0, 200 * MB)])
    recording = Recording(argv=("x",), pid=7, start_ns=0, end_ns=S, returncode=0, logs=(), seen=(seen, child))
    assert not list(unseen_reads([], seen, recording))


@pytest.mark.parametrize("with_weights", [True, False])
def test_reads_of_children_that_were_too_short_to_be_seen_are_known_by_their_siblings(with_weights):
    """The kernel adds the bytes of a child to whoever has waited for it; of pipes and sockets nothing is known."""
    counters = [Counters(int(at * S), 0, 0, nbytes) for at, nbytes in ((0.1, 0), (0.2, 0), (0.3, 300 * MB))]
    shell = SeenProcess(7, 1, 0, ("sh",), None, counters)
    child = SeenProcess(8, 7, 0, ("dd",), int(0.25 * S), [Counters(int(0.25 * S), 0, 0, 100 * MB)])
    if with_weights:
        child.files["/w.safetensors"] = 100 * MB
    recording = Recording(argv=("x",), pid=7, start_ns=0, end_ns=S, returncode=0, logs=(), seen=(shell, child))
    nbytes = sum(s.nbytes for s in unseen_reads([], shell, recording))
    assert nbytes == (200 * MB if with_weights else 0)


def test_a_copy_of_a_module_and_blocks_of_a_gguf_file_are_recorded(profiled):
    gguf = pytest.importorskip("gguf")
    session = profiled("""
import copy, gguf, numpy, torch
copy.deepcopy(torch.zeros(1 << 20))
gguf.dequantize(numpy.zeros((64, 34 * 64), dtype="uint8"), gguf.GGMLQuantizationType.Q8_0)
""")
    spans = session.processes[0].spans
    assert [s.nbytes for s in spans if s.name == "h2d" and s.label == "copy in host memory"] == [4 << 20]
    assert [s.label for s in spans if s.name == "cast"] == ["gguf.dequantize"]
    assert not any(s.label == "resource" for s in spans), "what the recording itself imports is no part of the program"
    assert gguf.dequantize.__module__ == "gguf.quants"
