"""What a tally tells, and that tallies of several processes add up."""

import json

from wan_loader.fastpath.tally import Tally


def make_tally():
    tally = Tally()
    tally.served("WanTransformer3DModel", 28_000_000_000, 0.7)
    tally.served("WanTransformer3DModel", 28_000_000_000, 0.7)
    tally.served("UMT5EncoderModel", 11_000_000_000, 0.3)
    tally.saved("casts on the CPU", 406, 14_000_000_000)
    tally.leave("was written to", 1_000_000)
    tally.leave("a torch mode is active")
    return tally


def test_summary_is_one_line():
    assert make_tally().summary() == (
        "3 loads took the fast path: 67 GB in 1.7 s (39.4 GB/s); spared 406 casts on the CPU; "
        "left to the original: 1 MB was written to, a torch mode is active"
    )


def test_a_tally_of_nothing_says_so():
    assert Tally().summary() == "0 loads took the fast path"
    assert Tally().report() == "nothing was fetched, spared or left"


def test_report_has_a_line_for_each():
    report = make_tally().report().splitlines()
    assert [line.split()[0] for line in report[1:3]] == ["WanTransformer3DModel", "UMT5EncoderModel"]
    assert "  406 casts on the CPU, 14 GB" in report
    assert "  a torch mode is active" in report


def test_processes_add_up():
    total = Tally()
    for _ in range(2):
        total.add(json.loads(json.dumps(make_tally().as_dict())))
    assert total.total.n_plans == 6
    assert total.components["UMT5EncoderModel"].nbytes == 22_000_000_000
    assert total.spared["casts on the CPU"] == 812
    assert total.left["was written to"] == 2_000_000
