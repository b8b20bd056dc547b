"""The benchmark of the stand-by server runs, with a program and a server that import next to nothing."""

import importlib
import json
import sys
import time
import types

from programs import ROOT

_SCRIPT = """
import json, os, time
seconds = (time.monotonic_ns() - int(os.environ["TURNS_START_NS"])) / 1e9
print(json.dumps({"seconds": {"loaded": seconds}, "sum": 5}))
"""


def test_it_takes_turns_and_writes_a_table(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.setenv("PYTHONPATH", ":".join(filter(None, sys.path)))
    script = importlib.import_module("standby")
    monkeypatch.setattr(script, "_SCRIPT", _SCRIPT)
    command = script.standby
    monkeypatch.setattr(
        script, "standby", lambda args, *words: command(args, *words, *["--only"][words[0] != "start" :])
    )
    clock = types.SimpleNamespace(sleep=lambda seconds: None, monotonic_ns=time.monotonic_ns)  # nothing is learned
    monkeypatch.setattr(script, "time", clock)
    words = ["--ckpt", str(tmp_path), "--pairs", "1", "--program", "script", "--device", "cpu"]
    words += ["--output", str(tmp_path / "out.json")]
    monkeypatch.setattr(sys, "argv", ["standby.py", str(tmp_path), *words])
    script.main()
    assert "| script | loaded | 0." in capsys.readouterr().out
    document = json.loads((tmp_path / "out.json").read_text())
    assert sorted(document["samples"]["script"]) == ["direct", "plain", "stand-by"]
    assert document["server"]["n_modules"] > 100
