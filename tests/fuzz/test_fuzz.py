"""A few thousand inputs of the differential fuzz; `scripts/fuzz` runs as many as one likes."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from differential import FAILURES, Tally, judge, run
from inputs import KINDS, make

SEED = 15


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_accepted_is_equal_to_the_reference(kind, tmp_path):
    tally = Tally()
    run(kind, SEED, range(400), tmp_path, tally)
    assert not tally.failures
    assert tally.outcomes["both accept"] > 40, "the inputs are damaged too much to tell anything"
    assert tally.outcomes["both refuse"] > 40, "the inputs are not damaged enough"


@pytest.mark.parametrize("kind", KINDS)
def test_an_input_is_told_by_its_number(kind):
    assert make(kind, SEED, 7) == make(kind, SEED, 7)
    assert make(kind, SEED, 7) != make(kind, SEED, 8) or make(kind, SEED, 8) != make(kind, SEED, 9)


def test_wrong_bits_and_foreign_errors_are_failures():
    import torch

    right, wrong = {"w": torch.ones(2)}, {"w": torch.zeros(2)}
    assert judge(right, "", right)[0] == "both accept"
    assert judge(wrong, "", right)[0] == "different" in FAILURES
    assert judge({"w": torch.ones(2, 1)}, "", right)[0] == "different"
    assert judge({}, "", right)[0] == "different"
    assert judge(KeyError("x"), "", right)[0] == "foreign" in FAILURES
    assert judge("refused", "", right)[0] == "only ours refuses"
    assert judge(right, "", "refused")[0] == "only reference refuses"
