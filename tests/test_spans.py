"""Arithmetic over spans, with times that were made up: exact and instant."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wan_loader.events import Span
from wan_loader.profiler.render.bars import timeline_bar
from wan_loader.sizes import format_bytes, format_seconds
from wan_loader.spans import (
    Mark,
    attribute,
    by_label,
    in_flight,
    overlap_ns,
    summarize,
    throughput,
    union,
)

S = 1_000_000_000


def mark(name, start, end, nbytes=0, track="a", label=""):
    return Mark(name, int(start * S), int(end * S), nbytes, track, label)


def test_union_and_overlap():
    spans = [mark("read", 3, 4), mark("read", 0, 1), mark("read", 1, 2), mark("read", 0.5, 1.5), mark("read", 5, 5)]
    assert union(spans) == [(0, 2 * S), (3 * S, 4 * S)]
    assert overlap_ns([(0, 10), (20, 30)], [(5, 25)]) == 10
    assert overlap_ns([], [(5, 25)]) == 0


def test_phases_keep_the_order_and_know_foreign_ones():
    found = summarize([mark("h2d", 0, 1, 5), mark("random_init", 0, 2), mark("import", 0, 1), mark("h2d", 0.5, 2, 5)])
    assert [(p.name, p.busy_s, p.nbytes) for p in found] == [
        ("import", 1.0, 0),
        ("random_init", 2.0, 0),
        ("h2d", 2.0, 10),
    ]


def test_attribution_adds_up_and_goes_to_the_busiest():
    spans = [mark("read", 1, 5, track="r"), mark("h2d", 2, 3), mark("h2d", 5, 6), mark("wait", 0.5, 7)]
    paced = attribute(spans, 0, 8 * S)
    assert paced == {"read": 4.0, "h2d": 1.0, "wait": 1.5, "other": 1.5}
    assert sum(paced.values()) == 8.0


def test_attribution_clips():
    assert attribute([mark("read", 0, 10)], 2 * S, 3 * S) == {"read": 1.0}
    assert attribute([], 0, S) == {"other": 1.0}
    assert attribute([Span("read", 5, 5)], 0, 10) == {"other": 1e-8}


@given(
    st.lists(
        st.tuples(st.sampled_from(["read", "h2d", "cast", "wait", "other"]), st.integers(0, 30), st.integers(0, 9))
    ),
    st.integers(0, 10),
    st.integers(10, 40),
)
def test_attribution_moment_by_moment(rows, start_ns, end_ns):
    spans = [Span(name, at, at + length) for name, at, length in rows]
    busy = {p.name: p.busy_s for p in summarize(spans)}
    order = sorted(busy, key=lambda name: (name == "other", name == "wait", -busy[name]))
    paced = dict.fromkeys([*order, "other"], 0)
    for moment in range(start_ns, end_ns):
        at_work = {s.name for s in spans if s.start_ns <= moment < s.end_ns}
        paced[next((name for name in order if name in at_work), "other")] += 1
    assert attribute(spans, start_ns, end_ns) == {name: ns / 1e9 for name, ns in paced.items() if ns}


def test_by_label():
    spans = [mark("import", 0, 1, label="a"), mark("import", 1, 4, label="b"), mark("import", 5, 6, label="")]
    assert by_label(spans, "import") == [("b", 3.0, 0), ("a", 1.0, 0)]


def test_throughput_spreads_bytes_evenly():
    values = throughput([mark("read", 0, 2, 4_000), mark("read", 3, 3, 1_000)], 4 * S, buckets=4)
    assert values == pytest.approx([2000, 2000, 0, 1000])
    assert sum(throughput([mark("read", 0.33, 2.71, 999)], 3 * S, 7)) * 3 / 7 == pytest.approx(999)


def test_bytes_in_flight():
    spans = [mark("read", 0, 1, 10), mark("read", 1, 2, 10), mark("h2d", 1, 3, 20)]
    assert in_flight(spans) == [(S, 10), (2 * S, 20), (3 * S, 0)]


def test_timeline_bar():
    assert timeline_bar([mark("read", 0, 1), mark("read", 2, 2.5)], 0, 4 * S, 4) == "█ ▄ "
    assert timeline_bar([], 0, 0, 3) == "   "


def test_numbers_for_people():
    assert [format_bytes(n) for n in (0, 999, 28_580_000_000, 126e9, 1.2e12)] == [
        "0 B",
        "999 B",
        "28.6 GB",
        "126 GB",
        "1.2 TB",
    ]
    assert [format_seconds(s) for s in (0.0032, 0.71, 84.1, 840)] == ["3.2 ms", "0.71 s", "84.1 s", "840 s"]
