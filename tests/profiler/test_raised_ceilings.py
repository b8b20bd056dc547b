"""A rate above its ceiling is what can be had; a machine that is busy is noticed."""

import os

import pytest
from test_session import S, make_report

from wan_loader.console import PlainConsole
from wan_loader.profiler.analysis.assemble import Environment, load_session
from wan_loader.profiler.probe.busy import ProcessorTimes, busy_note, crowding, others_note, processor_times
from wan_loader.profiler.render.terminal import print_session
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
    details = found.to_json()["ceiling_details"]["disk_gbps"]
    assert details == {"origin": "measured in this run", "least": 0.5, "most": pytest.approx(1.0), "n_samples": 2}
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
    assert crowding(load) > 100
    load.write_text("0.01 1 1 1/2 3")
    assert busy_note(pressure, load) == ""
    assert crowding(load) == crowding(tmp_path / "none") == 1.0


def test_what_others_used_is_said(tmp_path):
    stat = tmp_path / "stat"
    stat.write_text("cpu  100 0 100 9999 50 0 0 300 0 0\ncpu0 1 1 1 1\n")
    found = processor_times(stat)
    assert found.all_s == pytest.approx(500 / os.sysconf("SC_CLK_TCK"))
    assert found.own_s > 0
    stat.write_text("nonsense")
    assert processor_times(stat) is None
    before, after = ProcessorTimes(10.0, 100.0, 5.0), ProcessorTimes(12.0, 104.0, 6.0)
    assert "used 1.5 of 2 processors during the run" in others_note(before, after, "during the run", 2)
    assert others_note(before, after, "during the run", 16) == ""
    assert others_note(None, after, "", 2) == others_note(before, before, "", 2) == ""


def test_ceilings_say_where_they_are_from_and_what_their_samples_differ_by(capsys):
    spans = [Mark("read", 0, S, GB, "MainThread")]
    around = Environment(
        ceilings={"disk_gbps": 1.5, "copy_gbps": 2.0},
        samples={"disk_gbps": (1.0, 1.5), "copy_gbps": (2.0,)},
        measured=("disk_gbps",),
    )
    found = load_session(make_report(2.0, GB), spans, around)
    assert found.ceiling_details["disk_gbps"] == {
        "origin": "measured after the run",
        "least": 1.0,
        "most": 1.5,
        "n_samples": 2,
    }
    assert found.ceiling_details["copy_gbps"]["origin"] == "measured before"
    print_session(PlainConsole(), found)
    assert "disk 1.5 GB/s (1 .. 1.5), copy 2 GB/s" in " ".join(capsys.readouterr().out.split())
