"""What remedies leave: alone, together, and in which order they are named."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_verdict import evidence, mark

from wan_loader.profiler.analysis.remedies import Part, Remedy, parts_of, remaining_s, saved_s, worth_following
from wan_loader.profiler.analysis.session import Advice

READ, CAST, IMPORT = Part("read", "torch.load"), Part("cast", "float32 to bfloat16 on the CPU"), Part("import", "torch")
PARTS = {READ: 4.0, CAST: 2.0, IMPORT: 3.0, Part("other"): 1.0}


def remedy(rule, leaves, adds_s=0.0, command=""):
    adds = {Part("other", rule): adds_s}
    return Remedy(advice=Advice(rule, rule, "", 0.0, command=command), leaves=leaves, adds=adds)


def test_each_moment_belongs_to_one_part():
    spans = [
        mark("import", 0, 2, label="torch"),
        mark("import", 2, 3, label="numpy"),
        mark("read", 3, 7, 10, label="torch.load"),
        mark("cast", 6, 8, 10, label="float32 to bfloat16 on the CPU"),
        mark("other", 8, 9, label="Net.from_pretrained"),
    ]
    parts = parts_of(evidence(spans, 12, kind="program"))
    assert sum(parts.values()) == pytest.approx(12)
    assert parts[IMPORT] == pytest.approx(2)
    assert parts[READ] == pytest.approx(4), "while both were at work, the busier one sets the pace"
    assert parts[CAST] == pytest.approx(1)
    assert parts[Part("other", "Net.from_pretrained")] == pytest.approx(1)
    assert parts[Part("other")] == pytest.approx(3)


def test_two_that_save_the_same_seconds_save_them_once():
    half, whole = remedy("half", {READ: 2.0}), remedy("whole", {READ: 0.5, CAST: 1.0})
    assert saved_s(PARTS, [half]) == pytest.approx(2)
    assert saved_s(PARTS, [whole]) == pytest.approx(4.5)
    assert saved_s(PARTS, [half, whole]) == pytest.approx(4.5)


def test_the_largest_comes_first_and_each_says_what_it_saves_beside_those_before():
    found = worth_following(
        PARTS,
        [
            remedy("copy", {READ: 2.0, CAST: 0.0}),
            remedy("stand-by", {IMPORT: 0.0}, adds_s=0.5),
            remedy("run", {READ: 0.0, CAST: 0.8}),
        ],
        0.1,
    )
    assert [a.rule for a in found] == ["run", "stand-by", "copy"]
    assert [a.gain_s for a in found] == pytest.approx([5.2, 2.5, 4.0])
    assert [a.beside_s for a in found] == pytest.approx([5.2, 2.5, 0.8])


def test_what_one_adds_another_may_leave_out():
    ours = Part("import", "wan_loader")
    load = Remedy(advice=Advice("load", "", "", 0.0), leaves={READ: 1.0}, adds={ours: 0.5})
    again = Remedy(advice=Advice("again", "", "", 0.0), leaves={CAST: 0.0}, adds={ours: 0.5})
    ready = Remedy(advice=Advice("ready", "", "", 0.0), leaves={IMPORT: 0.0, ours: 0.0})
    assert saved_s(PARTS, [load]) == pytest.approx(2.5)
    assert saved_s(PARTS, [load, again]) == pytest.approx(4.5), "it is brought once"
    assert saved_s(PARTS, [load, again, ready]) == pytest.approx(8)


def test_what_saves_nothing_beside_others_is_not_mentioned():
    same = [remedy(name, {READ: 1.0}) for name in "ab"]
    assert [a.rule for a in worth_following(PARTS, same, 0.1)] == ["a"]


def test_what_cannot_be_typed_together_is_not_advised_together():
    rows = [
        remedy("run", {READ: 0.0}, command="wan-loader run a.py"),
        remedy("ranks", {IMPORT: 0.0}, command="wan-loader run --nproc 2 a.py"),
        remedy("keep", {CAST: 0.0}, command="wan-loader run --keep a.py"),
    ]
    assert [a.rule for a in worth_following(PARTS, rows, 0.1)] == ["run", "keep"]


def test_no_more_than_five():
    parts = {Part("import", str(i)): 1.0 for i in range(9)}
    assert len(worth_following(parts, [remedy(p.label, {p: 0.0}) for p in parts], 0.1)) == 5


_SOME = st.dictionaries(st.sampled_from(list(PARTS)), st.floats(0, 5))


@given(st.lists(st.tuples(_SOME, st.floats(0, 1)), max_size=6))
def test_together_is_never_more_than_the_sum_nor_than_there_was(rows):
    remedies = [remedy(str(i), leaves, adds_s) for i, (leaves, adds_s) in enumerate(rows)]
    alone = [saved_s(PARTS, [r]) for r in remedies]
    assert saved_s(PARTS, remedies) <= sum(alone) + 1e-9
    assert remaining_s(PARTS, remedies) >= 0
    found = worth_following(PARTS, remedies, 0.0)
    chosen = [r for r in remedies if r.advice.rule in {a.rule for a in found}]
    assert sum(a.beside_s for a in found) == pytest.approx(saved_s(PARTS, chosen))
