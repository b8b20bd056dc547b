"""Spans: exact with a clock of our own."""

import threading

import pytest

from wan_loader.events import Recorder, Span, busy_ns, clock_ns, span
from wan_loader.phases import ALL_PHASES, LOAD_PHASES, PHASE_TABLE, known_phase
from wan_loader.spans import summarize


def ticks(*values):
    return iter(values).__next__


def test_a_span_is_recorded_when_it_ends():
    recorder = Recorder()
    with span(recorder, "read", 100, clock=ticks(5, 12)):
        assert recorder.spans == []
    assert recorder.spans == [Span("read", 5, 12, 100, threading.current_thread().name)]


def test_a_span_is_recorded_when_its_body_raises():
    recorder = Recorder()
    with pytest.raises(KeyboardInterrupt), span(recorder, "read", clock=ticks(1, 2)):
        raise KeyboardInterrupt
    assert [(s.start_ns, s.end_ns) for s in recorder.spans] == [(1, 2)]


def test_without_an_observer_the_clock_is_not_read():
    with span(None, "read", clock=lambda: pytest.fail("the clock was read")):
        pass


def test_spans_are_kept_in_the_order_in_which_they_ended():
    recorder = Recorder()
    with span(recorder, "other", clock=ticks(0, 30)):
        with span(recorder, "read", clock=ticks(1, 10)):
            pass
        with span(recorder, "h2d", clock=ticks(11, 20)):
            pass
    assert [s.name for s in recorder.spans] == ["read", "h2d", "other"]


def test_spans_of_threads_carry_their_names():
    recorder = Recorder()

    def work():
        for _ in range(200):
            with span(recorder, "read", 1):
                pass

    threads = [threading.Thread(target=work, name=f"reader {i}") for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(recorder.spans) == 800
    assert {s.track for s in recorder.spans} == {f"reader {i}" for i in range(4)}


@pytest.mark.parametrize(
    ("intervals", "busy"),
    [
        ([], 0),
        ([(3, 3)], 0),
        ([(0, 10)], 10),
        ([(0, 10), (10, 20)], 20),
        ([(0, 10), (5, 15)], 15),
        ([(5, 15), (0, 10)], 15),
        ([(0, 100), (10, 20), (30, 40)], 100),
        ([(0, 10), (20, 30), (25, 26), (29, 40)], 30),
        ([(7, 9), (7, 9)], 2),
    ],
)
def test_busy_time_is_the_union(intervals, busy):
    assert busy_ns(Span("read", a, b) for a, b in intervals) == busy


def test_busy_time_property():
    hypothesis = pytest.importorskip("hypothesis")
    from hypothesis import strategies as st

    interval = st.tuples(st.integers(0, 60), st.integers(0, 20)).map(lambda p: (p[0], p[0] + p[1]))

    @hypothesis.given(st.lists(interval, max_size=12))
    def check(intervals):
        covered = {t for a, b in intervals for t in range(a, b)}
        assert busy_ns(Span("read", a, b) for a, b in intervals) == len(covered)

    check()


def test_phases_are_summed_in_their_order():
    spans = [
        Span("h2d", 5, 10, 7, "a"),
        Span("read", 0, 4_000_000_000, 3_000_000_000, "a"),
        Span("read", 2_000_000_000, 6_000_000_000, 3_000_000_000, "b"),
    ]
    phases = summarize(spans)
    assert [p.name for p in phases] == ["read", "h2d"]
    assert (phases[0].busy_s, phases[0].nbytes, phases[0].gbps) == (6.0, 6_000_000_000, 1.0)


def test_phase_names_are_the_contract_s():
    names = ("import", "cuda_init", "header", "init", "register", "read", "wait", "h2d", "cast", "assign", "shard")
    assert set(LOAD_PHASES) == {*names, "other"}


def test_one_table_says_all_of_each_phase():
    assert len(set(ALL_PHASES)) == len(PHASE_TABLE)
    assert set(ALL_PHASES) - set(LOAD_PHASES) == {"construct", "random_init"}
    assert len({kind.colour for kind in PHASE_TABLE}) == len(PHASE_TABLE)
    assert all(kind.meaning and not (kind.has_rate and kind.allowance_s) for kind in PHASE_TABLE)
    assert known_phase("read") == "read"
    assert known_phase("decrypt") == "other"


def test_the_clock_goes_forward():
    assert clock_ns() <= clock_ns()
