"""README's performance tables are what the committed result files give, with our losses in them."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def report():
    spec = importlib.util.spec_from_file_location("benchmark_report", ROOT / "benchmarks" / "report.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_readme_equals_the_result_files(report):
    text = (ROOT / "README.md").read_text()
    assert report.replaced(text, report.section()) == text, "run python benchmarks/report.py"


def test_a_peer_that_wins_is_named_and_failures_stay_in(report, document, make_result):
    chosen = {"file": "x.json", "title": "T", "cache": "warm"}
    document["cases"][0]["results"] += [make_result("fast", 0.5), make_result("bad", status="crashed")]
    text = report.table(document, chosen)
    assert "Faster than wan-loader here: fast." in text
    assert "| bad | crashed |" in text
    assert text.index("| fast") < text.index("| **wan-loader**") < text.index("| safetensors") < text.index("| bad")
    assert "no GPU, 2 cores" in text


def test_a_choice_must_fit_one_case(report, document):
    with pytest.raises(ValueError, match="0 cases"):
        report.table(document, {"file": "x.json", "title": "T", "cache": "cold"})
    document["cases"] *= 2
    with pytest.raises(ValueError, match="2 cases"):
        report.table(document, {"file": "x.json", "title": "T"})


def test_every_result_of_a_bench_can_be_read(report):
    documents = [json.loads(path.read_text()) for path in sorted(report.RESULTS.glob("*/*.json"))]
    benches = [document for document in documents if "cases" in document]
    assert benches
    assert all(document["schema_version"] == 1 for document in benches)


def test_missing_markers_are_an_error(report):
    with pytest.raises(ValueError, match="lacks"):
        report.replaced("no markers", "x")
