"""What a program waits for is told by the kernel, and the verdict says it."""

import os
import socket
import subprocess
import sys
import time

import pytest

from wan_loader.profiler.analysis.session import Process
from wan_loader.profiler.analysis.story import subject_of, turns_of
from wan_loader.profiler.analysis.waiting import unseen_waits
from wan_loader.profiler.blocked import FOR_PROCESS, LOCK, NETWORK, SLEEP, STORAGE, blocked_by
from wan_loader.profiler.program import Recording
from wan_loader.profiler.watch import Counters, SeenProcess
from wan_loader.spans import Mark
from wan_loader.verdict import Evidence, judge

S = 1_000_000_000

WAITS = {
    SLEEP: "time.sleep(60)",
    LOCK: "import threading; lock = threading.Lock(); lock.acquire(); lock.acquire()",
    f"{LOCK}, while another thread waits: {SLEEP}": "import threading; lock = threading.Lock(); lock.acquire()\n"
    "threading.Thread(target=time.sleep, args=(60,), daemon=True).start(); lock.acquire()",
    FOR_PROCESS: "os.waitpid(os.fork() or time.sleep(60), 0)",
    "pipes or events": "os.read(os.pipe()[0], 1)",
    NETWORK: "socket.create_connection(('127.0.0.1', PORT)).recv(1)",
    f"{NETWORK} ": "s = socket.create_connection(('127.0.0.1', PORT)); select.select([s], [], [])",
}


@pytest.mark.skipif(not os.path.exists("/proc/self/wchan"), reason="the kernel does not tell")
@pytest.mark.parametrize("reason", WAITS)
def test_the_kernel_tells_what_a_process_waits_for(reason):
    with socket.create_server(("127.0.0.1", 0)) as server:
        source = WAITS[reason].replace("PORT", str(server.getsockname()[1]))
        process = subprocess.Popen([sys.executable, "-S", "-c", f"import os, select, socket, time\n{source}"])
        try:
            deadline = time.monotonic() + 20
            while blocked_by(process.pid) != reason.strip() and time.monotonic() < deadline:
                time.sleep(0.02)
            assert blocked_by(process.pid) == reason.strip()
        finally:
            process.kill()
            process.wait()
    assert blocked_by(process.pid) == ""


def seen_at(*looks):
    """A process that was looked at in these moments: (seconds, processor time, what it waited for)."""
    counters = [Counters(int(at * S), 0, 0, 0, int(cpu * S), False, reason) for at, cpu, reason in looks]
    return SeenProcess(7, 1, 0, ("python",), None, counters)


def waits_of(seen, *spans, reads=False):
    recording = Recording(argv=("x",), pid=7, start_ns=0, end_ns=10 * S, returncode=0, logs=(), seen=(seen,))
    found = unseen_waits(spans, seen, recording, reads=reads)
    return [(s.name, s.label, round(s.start_ns / S, 3), round(s.end_ns / S, 3)) for s in found]


class TestUnseenWaits:
    def test_times_without_a_processor_are_waits(self):
        seen = seen_at((1, 1, ""), (2, 1, SLEEP), (3, 1, SLEEP), (4, 2, ""), (5, 2, NETWORK), (6, 2.01, ""))
        assert waits_of(seen) == [("wait", SLEEP, 1, 3), ("wait", NETWORK, 4, 6)]

    def test_who_computes_does_not_wait_whatever_it_was_seen_in(self):
        assert waits_of(seen_at((1, 0, ""), (2, 0.5, SLEEP), (3, 1, ""), (4, 1, ""))) == []

    def test_who_was_seen_just_as_it_went_on_waited_as_before(self):
        assert waits_of(seen_at((1, 0, NETWORK), (2, 0.01, ""), (3, 0.02, NETWORK))) == [("wait", NETWORK, 1, 3)]

    def test_what_is_recorded_stays(self):
        """A frame around others is no record of what happens in it."""
        seen = seen_at((1, 0, ""), (4, 0, SLEEP), (5, 1, ""))
        read = Mark("read", 2 * S, 3 * S, 0, "MainThread", "open().read")
        frame = Mark("other", 0, 5 * S, 0, "MainThread", "from_pretrained")
        assert waits_of(seen, read, frame) == [("wait", SLEEP, 1, 2), ("wait", SLEEP, 3, 4)]

    def test_waiting_for_storage_is_reading_where_weights_are_read(self):
        seen = seen_at((1, 0, ""), (4, 0, STORAGE), (5, 1, ""))
        assert waits_of(seen, reads=True) == [("read", STORAGE, 1, 4)]
        assert waits_of(seen) == [("wait", STORAGE, 1, 4)]


def test_a_program_that_sleeps_is_told_so(profiled):
    session = profiled("import time\ntime.sleep(1.2)")
    assert session.verdict.phase == "wait"
    assert "sleeping took" in session.verdict.why
    assert not session.verdict.why.startswith("healthy")


def test_the_worker_that_sleeps_has_the_turn_and_not_who_waits_for_it(profiled):
    source = (
        "import multiprocessing as mp, time\nwith mp.get_context('fork').Pool(1) as pool: pool.map(time.sleep, [1.2])"
    )
    session = profiled(source)
    assert session.processes[session.subject].role == "worker"
    assert "sleeping took" in session.verdict.why


def process(pid, *spans, **fields):
    marks = tuple(Mark(name, int(a * S), int(b * S), 0, "kernel", label) for name, a, b, label in spans)
    return Process(title="p", name=f"p{pid}", pid=pid, start_ns=0, end_ns=10 * S, spans=marks, **fields)


@pytest.mark.parametrize(("reason", "paced_by"), [(SLEEP, 2), (NETWORK, 2), (FOR_PROCESS, 1), (LOCK, 1)])
def test_who_waits_for_the_outside_sets_the_pace_before_who_may_wait_for_others(reason, paced_by):
    processes = [process(1, ("wait", 0, 10, LOCK)), process(2, ("wait", 0, 10, reason), parent=1)]
    turns = turns_of(processes, 10 * S)
    assert processes[subject_of(processes, turns)].pid == paced_by


def test_a_launcher_that_sleeps_between_two_looks_does_not_set_the_pace():
    processes = [process(1, ("wait", 0, 10, SLEEP), role="launcher"), process(2, ("wait", 0, 10, LOCK), parent=1)]
    assert [t.process for t in turns_of(processes, 10 * S)] == [1]


def test_many_short_processes_of_a_name_count_together():
    parent = process(1, ("cast", 0, 2, ""))
    short = [process(2 + i, ("read", 2 + i, 3 + i, ""), parent=1) for i in range(8)]
    short = [
        Process(title="dd", name="dd", pid=p.pid, start_ns=p.spans[0].start_ns, end_ns=p.spans[0].end_ns, spans=p.spans)
        for p in short
    ]
    from wan_loader.profiler.analysis.story import pace_sentence

    turns = turns_of([parent, *short], 10 * S)
    subject = subject_of([parent, *short], turns)
    assert subject > 0
    told = pace_sentence([parent, *short], turns, subject)
    assert told.startswith("8 times dd set it for 8 s and p1 for 2 s")


class TestVerdict:
    def judged(self, *spans, seconds=10.0, ceilings=None):
        marks = [Mark(name, int(a * S), int(b * S), 0, "t", label) for name, a, b, label in spans]
        evidence = Evidence(
            kind="program",
            seconds=seconds,
            spans=marks,
            start_ns=0,
            end_ns=int(seconds * S),
            device="cpu",
            ceilings=ceilings or {},
        )
        return judge(evidence)

    def test_waiting_is_not_healthy(self):
        verdict = self.judged(("wait", 0, 8, NETWORK), ("import", 8, 10, "torch"))
        assert (verdict.kind, verdict.phase) == ("unknown", "wait")
        assert verdict.why == "waiting set the pace for 8.00 s of 10.00 s (80%): the network took 8.00 s"

    def test_a_smaller_loss_does_not_hide_it(self):
        verdict = self.judged(("wait", 0, 6, NETWORK), ("random_init", 6, 8, "normal_"))
        assert verdict.phase == "wait"

    def test_a_service_that_waits_after_its_start_is_judged_by_the_start(self):
        verdict = self.judged(("random_init", 0, 2, "normal_"), ("wait", 2, 60, NETWORK), seconds=60.0)
        assert (verdict.kind, verdict.phase) == ("slow", "random_init")
