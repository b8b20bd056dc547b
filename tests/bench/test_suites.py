"""The benchmark suites run, tiny and untimed, so that they cannot rot."""

import importlib
import json

import pytest
from programs import PIPELINE, ROOT, TORCH, run

BENCHMARKS = ROOT / "benchmarks"


@pytest.mark.parametrize("suite", ["test_stages.py", "test_loads.py"])
def test_suite_runs(suite):
    pytest.importorskip("pytest_benchmark")
    words = ["-m", "pytest", "--benchmark-disable", "-q", "-p", "no:cacheprovider", BENCHMARKS / suite]
    words += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # of modules that are imported before pytest begins
    done = run(*words, timeout=110, cwd=BENCHMARKS.parent, modules=PIPELINE, env={"WAN_LOADER_BENCH_MB": "2"})
    assert done.returncode == 0, done.stdout[-3000:]


def test_turns_of_one_checkout_with_itself(tmp_path, benchmark_main, capfd):
    words = [tmp_path / "data", ROOT, ROOT, "--pairs", "1", "--device", "cpu", "--size", "tiny"]
    words += ["--case", "fp32 to bf16", "--output", tmp_path / "turns.json"]
    benchmark_main("turns", *words, modules=TORCH)
    assert "after/before" in capfd.readouterr().out
    ((before,), (after,)) = json.loads((tmp_path / "turns.json").read_text())["turns"]["fp32 to bf16"].values()
    assert before["seconds"] > 0
    assert before["equal"] is after["equal"] is True


def test_a_load_beside_imports(tmp_path, benchmark_main, capfd):
    words = [tmp_path / "data", "--pairs", "1", "--device", "cpu", "--size", "tiny", "--output", tmp_path / "o.json"]
    benchmark_main("beside_imports", *words, modules=PIPELINE)
    lines = capfd.readouterr().out.splitlines()
    document = json.loads((tmp_path / "o.json").read_text())
    assert document["ways"]["load beside imports, 0.1 ms"] == {
        "loads": True,
        "main_thread": "import",
        "turn_s": 0.0001,
    }
    (samples,) = document["turns"].values()
    assert list(samples) == list(document["ways"])
    for case, (one,) in samples.items():
        assert (one["load_s"] is None) is (case == "imports alone")
        assert (one["imports_s"] is None) is ("imports" not in case)
        assert (one["loop_beside"] is None) is ("loop" not in case)
        assert one["cpu_seconds"] >= 0
    alone, beside = (next(line for line in lines if line.startswith(c)) for c in ("load alone", "load beside a loop"))
    assert "x alone" not in alone
    assert "x alone" in beside
    assert "of its rate alone" in beside


def test_a_checkpoint_is_loaded_where_it_lies_and_made_where_there_is_none(monkeypatch, checkpoint, tmp_path):
    monkeypatch.syspath_prepend(BENCHMARKS)
    beside = importlib.import_module("beside_imports")
    assert beside.checkpoint_in(checkpoint, "tiny") == checkpoint
    made = beside.checkpoint_in(tmp_path / "data", "tiny")
    assert made == tmp_path / "data" / "bf16"
    assert len(list(made.glob("*.safetensors"))) == 6


def test_the_table_of_loads_beside_imports(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    beside = importlib.import_module("beside_imports")
    one = {"load_s": 1.0, "imports_s": None, "loop_alone": None, "loop_beside": None}
    of_case = {
        "imports alone": {"load_s": None, "imports_s": 2.0},
        "load beside imports": {"load_s": 1.5, "imports_s": 3.0},
        "load beside a loop": {"load_s": 4.0, "loop_alone": 10.0, "loop_beside": 5.0},
    }
    before = {case: [one | of_case.get(case, {})] * 3 for case in beside.CASES}
    after = {case: [{**s, "load_s": s["load_s"] and s["load_s"] / 2} for s in found] for case, found in before.items()}
    lines = beside.told({"before": before, "after": after})
    (imports,) = (line for line in lines if line.startswith("load beside imports          before"))
    assert "load 1.5000 s (1.5000 .. 1.5000) = 1.50 x alone  imports 3.0000 s" in imports
    assert imports.endswith("= 1.50 x alone")
    (loop,) = (line for line in lines if line.startswith("load beside a loop           before"))
    assert loop.endswith("load 4.0000 s (4.0000 .. 4.0000) = 4.00 x alone  loop at 0.50 of its rate alone")
    assert "load beside a loop           load, after/before of each pair 0.500 .. 0.500 .. 0.500" in lines


def test_moves_of_memory(tmp_path, benchmark_main, capfd):
    words = ["--gb", "0.02", "--device", "cpu:0", "--rounds", "1", "--views", tmp_path, "--output", tmp_path / "o.json"]
    benchmark_main("bulk_moves", *words, modules=TORCH)
    (samples,) = json.loads((tmp_path / "o.json").read_text())["moves"].values()
    assert {"plain", "ours", "process_vm_readv"} < samples["there"].keys()
    assert all(sample["seconds"] > 0 for found in samples["there"].values() for sample in found)
    assert samples["with a file"].keys() == {"compared on the device", "next move"}
    assert "0.020 GB there" in capfd.readouterr().out


def test_the_python_of_from_pretrained(tmp_path, benchmark_main, capfd):
    words = [tmp_path / "data", "--samples", "1", "--size", "tiny", "--output", tmp_path / "o.json"]
    benchmark_main("from_pretrained", *words, modules=PIPELINE)
    plain, ours = capfd.readouterr().out.splitlines()
    assert "0 casts wait" in plain
    assert " 0 casts wait" not in ours
    samples = json.loads((tmp_path / "o.json").read_text())["samples"]
    assert samples["ours"][0]["nbytes"] < samples["plain"][0]["nbytes"]


def test_the_line_of_a_program_on_the_cpu(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    programs_on_cpu = importlib.import_module("programs_on_cpu")
    plain = [{"seconds": seconds, "cpu_s": 4.0} for seconds in (2.0, 4.0, 1.0)]
    run = [{"seconds": seconds, "cpu_s": 5.0} for seconds in (2.2, 4.0, 0.9)]
    line = programs_on_cpu.describe("torch.load", {"plain": plain, "run": run})
    numbers = ["2.00", "s", "2.20", "s", "1.000", "(0.90", "-", "1.10)", "4.00", "->", "5.00", "1.250"]
    assert line.split() == ["torch.load", *numbers]


def test_kept(benchmark_main, tmp_path, capsys):
    words = [tmp_path, "--samples", 1, "--device", "cpu", "--size", "tiny", "--blocks", 2]
    benchmark_main("kept", *words, "--output", tmp_path / "out.json", modules=TORCH)
    out = capsys.readouterr().out
    assert all(f"\n{way}" in out for way in ("load", "attach", "copy"))
    samples = json.loads((tmp_path / "out.json").read_text())["samples"]
    assert {len(found) for found in samples.values()} == {1}
    assert {sample["tensors"] for found in samples.values() for sample in found} == {36}
