"""Some thousand inputs of the differential fuzz, through its command: torch may crash, and the fuzz may not."""

import json
import runpy
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from differential import FAILURES, judge
from inputs import KINDS, make
from programs import forking

SCRIPT = Path(__file__).parents[2] / "scripts" / "fuzz"
COUNT, SEED = 300, 15


@pytest.mark.timeout(400)
def test_what_is_accepted_is_equal_to_the_reference(tmp_path, monkeypatch, capsys):
    out = tmp_path / "fuzz.json"
    command = [str(SCRIPT), "--count", str(COUNT), "--seed", str(SEED), "--json", str(out)]
    monkeypatch.setattr(sys, "argv", command)
    main = runpy.run_path(str(SCRIPT))["main"]
    monkeypatch.setitem(main.__globals__, "subprocess", forking())
    failed = main()
    done = capsys.readouterr()
    assert not failed, done.out + done.err
    kinds = json.loads(out.read_text())["kinds"]
    assert kinds.keys() == set(KINDS)
    for kind, result in kinds.items():
        assert kind in done.out
        assert result["inputs"] == COUNT
        assert not result["failures"]
        if kind == "gguf" and find_spec("gguf") is None:
            continue
        assert result["outcomes"]["both accept"] > COUNT // 20, "the inputs are damaged too much to tell anything"
        assert result["outcomes"]["both refuse"] > COUNT // 20, "the inputs are not damaged enough"


@pytest.mark.parametrize("kind", KINDS)
def test_an_input_is_told_by_its_number(kind):
    inputs = [make(kind, SEED, number) for number in range(20)]
    assert inputs == [make(kind, SEED, number) for number in range(20)]
    assert any(one != inputs[0] for one in inputs)


def test_wrong_bits_and_foreign_errors_are_failures():
    right, wrong = {"w": torch.ones(2)}, {"w": torch.zeros(2)}
    assert judge(right, "", right)[0] == "both accept"
    assert judge(wrong, "", right)[0] == "different"
    assert judge({"w": torch.ones(2, 1)}, "", right)[0] == "different"
    assert judge({}, "", right)[0] == "different"
    assert judge(KeyError("x"), "", right)[0] == "foreign"
    assert judge(right, "took 3 s", right)[0] == "greedy"
    assert {"different", "foreign", "greedy"} < set(FAILURES)
    assert judge("refused", "", right)[0] == "only ours refuses"
    assert judge(right, "", "refused")[0] == "only reference refuses"
