"""README's performance tables are what the committed result files give, with our losses in them."""

import importlib.util
import json
import re
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


@pytest.mark.parametrize("name", ["README.md", "README.zh.md"])
def test_readme_equals_the_result_files(report, name):
    text = (ROOT / name).read_text()
    assert report.replaced(text, report.section(report.READMES[name])) == text, "run python benchmarks/report.py"


@pytest.mark.parametrize("name", ["README.md", "README.zh.md"])
def test_the_picture_is_told_in_words_that_its_results_give(report, name):
    (words, path) = re.search(r"!\[([^\]]+)\]\(benchmarks/results/([^)]+)\.svg\)", (ROOT / name).read_text()).groups()
    document = json.loads((report.RESULTS / f"{path}.json").read_text())
    (ours, second, *others) = report.rows_of(document, {"file": path})
    assert re.findall(r"\d+\.\d+", words) == [report._digits(row.seconds) for row in (ours, second)]
    assert (ours.ours, second.loader) == (True, "safetensors-prefetch")
    assert len(others) == 8
    assert {ours.n, second.n} | {row.n for row in others} == {5, 3}


CHOSEN = {"file": "x.json", "title": "T", "cache": "warm"}


def enough(document):
    """The document, with as many samples as README wants."""
    for result in document["cases"][0]["results"]:
        if result["summary"]:
            result["summary"]["n"] = 5 if result["loader"] == "ours" else 3
    return document


def test_a_peer_that_wins_is_shown_winning_and_failures_stay_in(report, document, make_result):
    document["cases"][0]["results"] += [make_result("fast", 0.5), make_result("bad", status="crashed")]
    text = report.table(enough(document), CHOSEN)
    assert "Faster than wan-loader here: fast." in text
    assert "| bad | crashed | | | | | |" in text
    assert text.index("| **fast**") < text.index("| wan-loader") < text.index("| safetensors") < text.index("| bad")
    assert text.count("**") == 2, "only the best is in bold"
    assert "no GPU, 2 cores" in text


def test_who_failed_after_a_sample_has_not_won(report, document, make_result):
    document["cases"][0]["results"].append(make_result("frail", 0.5, status="crashed"))
    text = report.table(enough(document), CHOSEN)
    assert "| frail (crashed) |" in text
    assert "| **wan-loader** |" in text


def test_every_figure_shows_its_range_and_its_samples(report, document):
    ours = next(r for r in document["cases"][0]["results"] if r["loader"] == "ours")
    ours["summary"] |= {"min_s": 0.8, "max_s": 1.25}
    text = report.table(enough(document), CHOSEN)
    assert "| | seconds | min .. max | GB/s |" in text
    (line,) = [line for line in text.splitlines() if "wan-loader" in line]
    assert line == "| **wan-loader** | 1.00 | 0.800 .. 1.25 | 2.00 |  | 0.500 | 5 |"
    lines = text.splitlines()
    assert {line.count("|") for line in lines if line.startswith("|")} == {8}


@pytest.mark.parametrize(
    ("loader", "n", "told"), [("ours", 4, "wan-loader (4)"), ("safetensors", 2, "safetensors (2)")]
)
def test_too_few_samples_are_refused_unless_readme_says_so(report, document, loader, n, told):
    result = next(r for r in enough(document)["cases"][0]["results"] if r["loader"] == loader)
    result["summary"]["n"] = n
    with pytest.raises(ValueError, match="5 samples of ours and 3 of each rival") as error:
        report.table(document, CHOSEN)
    assert told in str(error.value)
    assert "Medians" in report.table(document, {**CHOSEN, "few": True})


def test_one_sample_each_is_said(report, document):
    for result in document["cases"][0]["results"]:
        result["summary"]["n"] = 1
    text = report.table(document, {**CHOSEN, "few": True})
    assert "One sample each, measured on" in text
    assert "min .. max" not in text


def test_versions_of_rivals_are_told_where_the_result_has_them(report, document):
    document["loaders"] += [
        {"name": "a", "packages": {"safetensors": "0.9.0rc1", "torch": "2"}},
        {"name": "b", "packages": {"safetensors": "0.9.0rc1", "flashpack": None}},
        {"name": "of an older bench"},
    ]
    text = report.table(enough(document), CHOSEN)
    assert "2 cores, torch 2, safetensors 0.9.0rc1 ([everything]" in text


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
