"""Two documents compared: regressions fail, noise is named, foreign files are one clear error."""

import json

import pytest

from wan_loader import documents
from wan_loader.bench.compare import compare_runs, parse_limit, read_run, regressions
from wan_loader.errors import OptionError, SessionError
from wan_loader.profiler.analysis.session import read_session


@pytest.fixture
def write(tmp_path):
    def write(name, document):
        path = tmp_path / name
        path.write_text(document if isinstance(document, str) else json.dumps(document))
        return path

    return write


def scaled(document, factor):
    changed = json.loads(json.dumps(document))
    for result in changed["cases"][0]["results"]:
        result["summary"]["median_s"] *= factor
    return changed


def test_a_regression_exits_with_three(document, write, command):
    before, after = write("a.json", document), write("b.json", scaled(document, 1.5))
    assert command("compare", before, after).returncode == 0
    assert command("compare", before, after, "--fail-if", "median:60%").returncode == 0
    done = command("compare", before, after, "--fail-if", "median:5%", "--json")
    assert done.returncode == 3, done.stderr
    assert json.loads(done.stdout)["regressions"] == 2
    assert command("compare", after, before, "--fail-if", "median:5%").returncode == 0, "faster is no regression"


def test_noise_is_named(document, write):
    before, after = (read_run(write(n, d)) for n, d in (("a", document), ("b", scaled(document, 1.1))))
    found = compare_runs(before, after, ["median"])
    assert all(c.within_noise for c in found)
    assert [round(c.change, 6) for c in found] == [0.1, 0.1]
    assert regressions(found, [parse_limit("median:20%"), parse_limit("median:5%")]) == found


def test_loads_compare_by_wall_time(checkpoint, command, write):
    saved = write("load.json", command("load", checkpoint, "--json").stdout)
    run = read_run(saved)
    assert run.values["load"]["median"] > 0
    assert compare_runs(run, run, ["median"])[0].change == 0


def test_loads_of_other_things_are_named(checkpoint, command, write):
    load = json.loads(command("load", checkpoint, "--json").stdout)
    before = write("a.json", load)
    after = write("b.json", load | {"target": "/other.safetensors", "device": "cuda:0", "dtype": "bfloat16"})
    assert "not the same" not in command("compare", before, before).stderr
    done = command("compare", before, after, "--json")
    assert done.returncode == 0, "still compared"
    (warning,) = json.loads(done.stdout)["warnings"]
    assert warning.startswith(
        f"not the same was loaded (target: {load['target']}, /other.safetensors; device: cpu, cuda:0; "
    )
    assert "dtype: as stored, bfloat16" in warning
    assert "cuda:0" in done.stderr
    after.write_text(json.dumps(load | {"target": "\x1b[2J"}))
    assert "\x1b" not in command("compare", before, after).stderr, "a target comes from a file"


def test_a_checkpoint_of_another_size_is_named(document, write, command):
    other = json.loads(json.dumps(document))
    other["cases"][0] |= {"nbytes": 123, "n_tensors": 1}
    before, after = write("a.json", document), write("b.json", other)
    (warning,) = json.loads(command("compare", before, after, "--json").stdout)["warnings"]
    case = document["cases"][0]
    sizes = f"{case['name']}: {case['nbytes']} bytes in {case['n_tensors']} tensors, 123 bytes in 1 tensor"
    assert warning == f"not the same was loaded ({sizes}): changes may be due to that"
    assert json.loads(command("compare", before, before, "--json").stdout)["warnings"] == []


def test_nothing_in_common_is_an_error(document, write):
    other = json.loads(json.dumps(document))
    other["cases"][0]["name"] = "other"
    with pytest.raises(SessionError) as error:
        compare_runs(read_run(write("a", document)), read_run(write("b", other)), ["median"])
    assert "nothing in common" in error.value.reason
    assert error.value.remedy == "compare runs of the same command"


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"schema_version": 2}', '{"schema_version": 1, "command": "rm"}', "[" * 100_000, "\udcff"],
)
def test_foreign_files_are_refused(tmp_path, text):
    path = tmp_path / "x.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(SessionError, match=r"x\.json"):
        read_run(path)


@pytest.mark.parametrize(
    ("path", "value"),
    [(("cases",), 3), (("machine",), []), (("cases", 0, "results", 0, "summary"), []), (("device",), None)],
)
def test_damaged_documents_are_refused(document, write, path, value):
    place = document
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(SessionError, match=r"d\.json"):
        read_run(write("d.json", document))


@pytest.mark.parametrize("value", [-1.0, 1e300])
def test_numbers_that_nobody_measured_are_refused(document, write, value):
    document["cases"][0]["results"][0]["summary"]["median_s"] = value
    with pytest.raises(SessionError, match=r"d\.json.*median_s"):
        read_run(write("d.json", document))


@pytest.mark.parametrize("read", [read_run, read_session])
def test_a_file_without_an_end_is_refused(monkeypatch, read):
    monkeypatch.setattr(documents, "_MAX_BYTES", 1000)
    with pytest.raises(SessionError, match="larger than 1000 bytes"):
        read("/dev/zero")


def test_a_loader_that_fails_now_is_worse_than_any_limit(document, write, command):
    before = write("a.json", document)
    result = document["cases"][0]["results"][1]
    result.update(status="crashed", reason="SIGSEGV", summary=None)
    after = write("b.json", document)
    done = command("compare", before, after)
    assert done.returncode == 0
    assert "ours: crashed in the second" in done.stderr
    assert list(json.loads(command("compare", before, after, "--json").stdout)["broken"].values()) == ["crashed"]
    assert command("compare", before, after, "--fail-if", "median:5%").returncode == 3
    assert command("compare", after, after, "--fail-if", "median:5%").returncode == 0, "it failed before, too"
    result["status"] = "not installed"
    assert command("compare", before, write("c.json", document), "--fail-if", "median:5%").returncode == 0


def test_worse_by_less_than_the_noise_is_said(document, write, command):
    done = command("compare", write("a", document), write("b", scaled(document, 1.1)), "--fail-if", "median:5%")
    assert done.returncode == 3
    assert done.stdout.count("worse, within noise") == 2


@pytest.mark.parametrize("text", ["median", "median:5", "median:-5%", "speed:5%", "median:5%%"])
def test_limits_are_checked(text):
    with pytest.raises(OptionError):
        parse_limit(text)


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(SessionError, match="does not exist"):
        read_run(tmp_path / "none.json")
