"""The benchmarks of what profile promises and estimate says: their own arithmetic, and their way through a case."""

import importlib
import json

import pytest
from programs import ROOT, TORCH


@pytest.fixture
def script(monkeypatch):
    """Import a script of benchmarks/."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module


EDIT = {"path": "start.py", "line": 2, "text": "w = a()", "replacement": "import b\nw = b.a()"}
SESSION = {
    "seconds": 10.0,
    "advice": [
        {"rule": "stand-by", "gain_s": 6.0, "beside_s": 6.0, "once": ["begin"], "command": "run start.py", "edits": []},
        {"rule": "fp32-file", "gain_s": 3.0, "beside_s": 2.0, "once": ["build"], "command": "", "edits": [EDIT]},
    ],
    "together": {"gain_s": 8.0},
}


class FakeHome:
    """A program that takes ten seconds, four under stand-by, seven with its line replaced, and two with both."""

    def __init__(self, advice, directory):
        self.real = advice.Home(directory, "import c\nw = a()")
        self.directory, self.typed = directory, []

    def warm(self):
        self.typed.append("warm")

    def write(self, edits):
        self.real.write(edits)

    def type(self, line, *, standby=True):
        self.typed.append(line)
        if "profile" in line:
            (self.directory / "run.json").write_text(json.dumps(SESSION))
        edited = "b.a()" in (self.directory / "start.py").read_text()
        seconds = {"python start.py": (10.0, 7.0), "run start.py": (4.0, 2.0)}.get(line, (0.0, 0.0))[edited]
        return seconds, "ready" if "status" in line else "42"


def test_advice_is_followed_to_the_letter(script, tmp_path, monkeypatch):
    advice = script("advice")
    monkeypatch.setattr(advice.time, "sleep", lambda _: None)
    home = FakeHome(advice, tmp_path)
    found = advice.measure(home, 3)
    assert {"begin", "build", "run start.py", "python start.py"} <= set(home.typed)
    outcome = {way: (row["promised_s"], row["came_s"], row["off"]) for way, row in found["outcome"].items()}
    assert outcome == {
        "stand-by": (pytest.approx(6), pytest.approx(6), pytest.approx(0)),
        "fp32-file": (pytest.approx(3), pytest.approx(3), pytest.approx(0)),
        "together": (pytest.approx(8), pytest.approx(8), pytest.approx(0)),
    }
    assert (tmp_path / "start.py").read_text().startswith("import c\n")


def test_only_lines_that_are_there_are_replaced(script, tmp_path):
    home = script("advice").Home(tmp_path, "import c\nw = a()\nprint(w)")
    home.write([EDIT])
    assert (tmp_path / "start.py").read_text() == "import c\nimport b\nw = b.a()\nprint(w)\n"
    with pytest.raises(AssertionError, match="not the program's line"):
        home.write([EDIT | {"line": 1}])


def test_an_estimate_beside_a_start(script, tmp_path, monkeypatch, benchmark_main, capfd):
    estimates = script("estimates")
    row = {"storage": "page cache", "seconds": 2.0, "fastest_s": 0.0, "slowest_s": 1000.0}
    document = {"estimates": [row], "rates": {}, "notes": []}
    monkeypatch.setattr(estimates, "run", lambda *words, environ: json.dumps(document))
    words = [tmp_path / "data", "--gb", "0.002", "--samples", "1", "--case", "four files fp32 to fp16"]
    benchmark_main("estimates", *words, "--output", tmp_path / "o.json", modules=TORCH)
    (case,) = json.loads((tmp_path / "o.json").read_text())["starts"].values()
    assert case["within_spread"]
    assert case["samples"][0]["seconds"] > case["samples"][0]["load_s"] > 0
    assert "four files fp32 to fp16" in capfd.readouterr().out


def test_an_estimate_is_judged(script):
    judged = script("estimates").judged
    samples = [{"seconds": seconds} for seconds in (9.0, 10.0, 30.0)]
    found = judged({"samples": samples, "estimate": {"seconds": 10.9, "fastest_s": 8.0, "slowest_s": 12.0}})
    assert (found["median_s"], found["within_10_percent"], found["within_spread"]) == (10.0, True, True)
    found = judged({"samples": samples, "estimate": {"seconds": 11.2, "fastest_s": 10.5, "slowest_s": 12.0}})
    assert (found["within_10_percent"], found["within_spread"]) == (False, False)
