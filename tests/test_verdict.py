"""Verdicts over made-up spans."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wan_loader.events import Span
from wan_loader.phases import LOAD_PHASES
from wan_loader.profiler.analysis.remedies import parts_of
from wan_loader.spans import Mark
from wan_loader.verdict import Evidence, ideal_seconds, judge, judge_load

S = 1_000_000_000
GB = 1_000_000_000
CEILINGS = {
    "disk_gbps": 2.0,
    "page_cache_gbps": 20.0,
    "copy_gbps": 5.0,
    "cast_cpu_gbps": 5.0,
    "cast_gpu_gbps": 1000.0,
    "h2d_pinned_gbps": 50.0,
    "register_gbps": 40.0,
    "import_torch_s": 1.0,
}


def mark(name, start, end, nbytes=0, track="MainThread", label=""):
    return Mark(name, int(start * S), int(end * S), int(nbytes), track, label)


def evidence(spans, seconds, **changes):
    fields = {
        "kind": "load",
        "seconds": seconds,
        "spans": spans,
        "start_ns": 0,
        "end_ns": int(seconds * S),
        "device": "cuda:0",
        "ceilings": CEILINGS,
        "cold_bytes": 0,
        "nbytes_file": 20 * GB,
    }
    return Evidence(**{**fields, **changes})


def test_cold_load_at_the_disks_rate_is_healthy():
    spans = [mark("read", 0, 10.2, 20 * GB, "reader 0"), mark("h2d", 0.1, 10.3, 20 * GB, "cuda:0 copy")]
    verdict = judge(evidence(spans, 10.4, cold_bytes=20 * GB))
    assert (verdict.kind, verdict.phase) == ("limit", "read")
    assert verdict.ceiling_gbps == pytest.approx(2.0)
    assert verdict.reached_gbps == pytest.approx(1.96, rel=0.01)


def test_the_same_load_warm_is_slow():
    spans = [mark("read", 0, 10.2, 20 * GB, "reader 0"), mark("h2d", 0.1, 10.3, 20 * GB, "cuda:0 copy")]
    verdict = judge(evidence(spans, 10.4))
    assert (verdict.kind, verdict.phase) == ("slow", "read")
    assert verdict.lost_s == pytest.approx(9.3, abs=0.2)


def test_partly_cold_is_compared_with_both_ceilings():
    spans = [mark("read", 0, 5, 20 * GB, "reader 0")]
    assert ideal_seconds(evidence(spans, 5, cold_bytes=10 * GB), "read") == pytest.approx(5 + 0.5)


def test_a_warm_load_at_the_rate_of_registration():
    spans = [mark("register", 0, 0.52, 20 * GB), mark("h2d", 0.02, 0.54, 20 * GB, "cuda:0 copy")]
    verdict = judge(evidence(spans, 0.55))
    assert verdict.kind == "limit"


def test_without_ceilings_nothing_is_claimed():
    verdict = judge(evidence([mark("read", 0, 10, 20 * GB)], 10, ceilings={}))
    assert (verdict.kind, verdict.phase) == ("unknown", "read")
    assert verdict.ceiling_gbps is None


def test_stages_that_take_turns_for_want_of_slots():
    spans = []
    for i in range(10):
        spans += [mark("read", i, i + 0.5, 2 * GB, "reader 0"), mark("h2d", i + 0.5, i + 1, 2 * GB, "cuda:0 copy")]
        spans += [mark("wait", i + 0.5, i + 1, 0, "reader 0")]
    slow = {**CEILINGS, "page_cache_gbps": 4.1, "h2d_pinned_gbps": 4.1}
    verdict = judge(evidence(spans, 10, ceilings=slow))
    assert (verdict.kind, verdict.phase) == ("slow", "wait")
    assert verdict.lost_s == pytest.approx(4.5, abs=0.6)


def test_waiting_behind_a_busy_copy_is_no_fault_of_slots():
    spans = [mark("h2d", 0, 10, 20 * GB, "cuda:0 copy"), mark("wait", 1, 9.5, 0, "reader 0"), mark("read", 0, 0.4, GB)]
    assert judge(evidence(spans, 10)).phase == "h2d"


def test_gaps_in_our_own_load_are_a_fault_and_a_programs_own_work_is_not():
    spans = [mark("read", 0, 1, 20 * GB)]
    assert judge(evidence(spans, 10)).phase == "other"
    assert judge(evidence(spans, 10)).kind == "slow"
    assert judge(evidence(spans, 10, kind="program")).kind == "limit"


@given(
    st.lists(st.tuples(st.sampled_from(LOAD_PHASES), st.integers(0, 3000), st.integers(0, 900), st.integers(0, 2))),
    st.integers(0, 4),
)
def test_a_load_is_judged_as_its_profile_is_without_a_measured_machine(rows, seconds):
    spans = [Span(name, S + at * S // 1000, S + (at + ms) * S // 1000, n * GB, "reader 0") for name, at, ms, n in rows]
    marks = [Mark(s.name, s.start_ns - S, s.end_ns - S, s.nbytes, s.track) for s in spans]
    if spans:
        zero = min(s.start_ns for s in marks)
        found = evidence(marks, seconds, start_ns=zero, end_ns=zero + seconds * S, ceilings={}, cold_bytes=GB)
        assert judge_load(spans, seconds, "cuda:0") == judge(found)
    else:
        assert judge_load(spans, seconds, "cuda:0").phase == "other"


def test_nothing_recorded():
    assert judge(evidence([], 1, kind="program")).phase == "other"
    assert judge(evidence([], 0, kind="program")).kind == "limit"


def test_what_a_program_does_after_its_start_hides_nothing():
    spans = [mark("import", 0, 1, label="torch"), mark("random_init", 1, 6, GB, label="uniform_")]
    verdict = judge(evidence(spans, 300, kind="program"))
    assert (verdict.kind, verdict.phase) == ("slow", "random_init")


def test_many_spans_are_judged_at_once():
    """14,000 spans, as the load of one expert leaves them: 0.02 s; each rule for itself took 0.3 s and more."""
    spans = []
    for i in range(3_500):
        start, track = i * 0.002, i % 8
        spans += [
            mark("read", start, start + 0.012, 16 << 20, f"reader {track}", "model.safetensors"),
            mark("wait", start + 0.012, start + 0.016, 0, f"reader {track}"),
            mark("h2d", start + 0.012, start + 0.013, 16 << 20, "cuda:0 copy", "pinned host to cuda"),
            mark("cast", start + 0.013, start + 0.0132, 16 << 20, "cuda:0 cast", "float32 to bfloat16"),
        ]
    seconds = []
    for _ in range(3):
        found = evidence(spans, 7.1, dtype="bf16", fp32_bytes=20 * GB, limits={"memory_available_bytes": 100 * GB})
        start_s = time.process_time()
        assert judge(found).phase == "read"
        assert parts_of(found)
        seconds.append(time.process_time() - start_s)
    assert min(seconds) < 0.15
