"""A rate above its ceiling is what can be had; a machine that is busy is noticed."""

import pytest
from test_session import S, make_report

from wan_loader.profiler.analysis.assemble import Environment, load_session
from wan_loader.profiler.probe.busy import busy_note
from wan_loader.spans import Mark

GB = 1_000_000_000


def session(ceilings, *spans):
    marks = [Mark(name, int(a * S), int(b * S), nbytes, "MainThread") for name, a, b, nbytes in spans]
    return load_session(make_report(2.0, GB), marks, Environment(ceilings=ceilings))


def test_a_rate_above_its_ceiling_replaces_it():
    found = session({"disk_gbps": 0.5, "copy_gbps": 2.0}, ("read", 0, 1, GB), ("h2d", 1, 2, GB))
    assert found.ceilings["disk_gbps"] == pytest.approx(1.0)
    assert found.ceilings["copy_gbps"] == pytest.approx(4.0), "which the mixture of reading was compared with, too"
    assert any("read reached 1.00 GB/s, more than the 0.50 GB/s" in note for note in found.notes)
    assert found.verdict.ceiling_gbps is None or found.verdict.reached_gbps <= found.verdict.ceiling_gbps * 1.001


def test_a_rate_below_its_ceiling_does_not():
    ceilings = {"disk_gbps": 1.5, "copy_gbps": 2.0}
    found = session(ceilings, ("read", 0, 1, GB), ("h2d", 1, 2, GB))
    assert (found.ceilings, [n for n in found.notes if "reached" in n]) == (ceilings, [])


def test_next_to_nothing_has_no_rate():
    found = session({"disk_gbps": 0.5}, ("read", 0, 0.001, 1 << 20))
    assert found.ceilings == {"disk_gbps": 0.5}


def test_a_busy_machine_is_noticed(tmp_path):
    pressure, load = tmp_path / "cpu", tmp_path / "loadavg"
    pressure.write_text("some avg10=60.05 avg60=1.00 avg300=1.0 total=5\nfull avg10=0.00 avg60=0.00 total=0\n")
    assert "60 % of the time" in busy_note(pressure, load)
    pressure.write_text("some avg10=3.00 avg60=90.00 avg300=1.0 total=5\n")
    load.write_text("900.0 1 1 1/2 3")
    assert busy_note(pressure, load) == ""
    pressure.unlink()
    assert "900.0 processes wanted" in busy_note(pressure, load)
    load.write_text("0.01 1 1 1/2 3")
    assert busy_note(pressure, load) == ""
