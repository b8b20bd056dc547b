"""Saved sessions: what is written is read back, and nothing else is accepted."""

import io
import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from wan_loader.errors import SessionError
from wan_loader.loading.report import Bottleneck, IoReport, LoadReport, MemoryReport
from wan_loader.profiler.analysis.assemble import Environment, load_session
from wan_loader.profiler.analysis.session import Process, Sample, Session, read_session
from wan_loader.profiler.render.page import to_page
from wan_loader.profiler.render.terminal import print_session
from wan_loader.profiler.render.trace import to_trace
from wan_loader.spans import Mark, summarize
from wan_loader.verdict import Verdict

S = 1_000_000_000


def make_report(seconds=2.0, nbytes=1_000_000_000, **changes):
    fields = {
        "command": "profile",
        "target": "model.safetensors",
        "device": "cpu",
        "dtype": None,
        "seconds": seconds,
        "nbytes_file": nbytes,
        "nbytes_device": nbytes,
        "n_tensors": 3,
        "io": IoReport("direct", "nothing is in the page cache", 0, nbytes_direct=nbytes),
        "phases": (),
        "bottleneck": Bottleneck("read", ""),
        "memory": MemoryReport(10, 20, 30),
        "settings": {"slot_bytes": 8 << 20, "n_slots": 24},
    }
    return LoadReport(**{**fields, **changes})


def make_session():
    spans = [
        Mark("header", 0, S // 10, 0, "MainThread"),
        Mark("read", S // 10, 2 * S, 1_000_000_000, "reader 0"),
        Mark("h2d", S, 2 * S, 1_000_000_000, "MainThread"),
    ]
    return load_session(make_report(), spans, Environment(ceilings={"disk_gbps": 1.0, "copy_gbps": 2.0}))


def test_round_trip(tmp_path):
    session = make_session()
    (tmp_path / "run.json").write_text(json.dumps(session.to_json()))
    again = read_session(tmp_path / "run.json")
    assert again.to_json() == session.to_json()
    assert again.spans == session.spans
    assert again.verdict == session.verdict


def test_load_and_profile_name_the_same_bottleneck(tmp_path):
    import torch
    from safetensors.torch import save_file

    import wan_loader
    from wan_loader.events import Recorder

    save_file({f"{i}": torch.zeros(1 << 18) for i in range(8)}, tmp_path / "model.safetensors")
    loaded = wan_loader.load(tmp_path / "model.safetensors", io="buffered", observer=Recorder())
    session = load_session(loaded.report, loaded.spans, Environment())
    assert loaded.report.bottleneck == session.report.bottleneck
    assert loaded.report.bottleneck.phase == session.verdict.phase


def test_phases_that_are_not_known_are_other(tmp_path):
    """Of a later version, in the saved document and in spans of a program's own."""
    session = make_session()
    spans = (*session.spans, Mark("decrypt", S, 3 * S, 5, "MainThread"), Mark("other", 2 * S, 4 * S, 2, "MainThread"))
    assert [(p.name, p.busy_s, p.nbytes) for p in summarize(spans)][-1] == ("other", 3.0, 7)
    session = replace(session, processes=(replace(session.processes[0], spans=spans),))
    document = json.loads(json.dumps(session.to_json()))
    assert len(document["processes"][0]["spans"]) == 5
    document["processes"][0]["names"] = [f"new {name}" for name in document["processes"][0]["names"]]
    document["phases"] += [{"name": n, "busy_s": 1.5, "nbytes": 4, "gbps": 0.0} for n in ("decrypt", "unzip")]
    document["verdict"]["phase"] = document["bottleneck"]["phase"] = "decrypt"
    path = tmp_path / "run.json"
    path.write_text(json.dumps(document))
    again = read_session(path)
    assert {span.name for span in again.spans} == {"other"}
    assert again.verdict.phase == "other"
    assert [(p.busy_s, p.nbytes) for p in again.report.phases if p.name == "other"] == [(3.0, 8)]
    print_session(Console(file=io.StringIO()), again)
    assert "other" in to_page(again)
    assert to_trace(again)


def test_the_repr_is_one_short_line():
    session = replace(make_session(), report=make_report(warnings=("a\nb" * 999,), target="a\nb"))
    assert len(repr(session)) < 1000
    assert "\n" not in repr(session)
    assert len(repr(session.processes)) < 500


def test_what_is_unknown_stays_unknown(tmp_path):
    report = make_report(io=IoReport("direct", "unknown", None, nbytes_direct=1_000_000_000))
    session = load_session(report, [], Environment())
    (tmp_path / "run.json").write_text(json.dumps(session.to_json()))
    assert read_session(tmp_path / "run.json").report.io.resident_before is None


def test_the_contract_stays():
    document = make_session().to_json()
    keys = "schema_version command target device dtype seconds nbytes_file nbytes_device gbps n_tensors io phases"
    assert set(keys.split()) | {"bottleneck", "memory", "machine", "settings", "warnings"} <= set(document)
    assert document["bottleneck"]["phase"] == document["verdict"]["phase"] == "read"
    assert document["bottleneck"]["reached"] == pytest.approx(1 / 1.9, rel=0.01)


@given(
    st.dictionaries(
        st.sampled_from(sorted(make_session().to_json())),
        st.none() | st.integers() | st.text() | st.lists(st.integers()),
    )
)
def test_any_damage_is_one_error_or_still_a_session(tmp_path_factory, damage):
    path = tmp_path_factory.mktemp("s") / "run.json"
    path.write_text(json.dumps({**make_session().to_json(), **damage}))
    try:
        read_session(path)
    except SessionError as error:
        found = str(error)
    else:
        return
    assert str(path) in found


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}",
        b"[]",
        b"null",
        b"\xff\xfe",
        b"{" * 100_000,
        b'{"schema_version": 2}',
        b'{"schema_version": 1}',
        b"1e999",
        b'{"schema_version": 1, "command": []}',
    ],
)
def test_foreign_files(tmp_path, content):
    path = tmp_path / "run.json"
    path.write_bytes(content)
    with pytest.raises(SessionError, match=r"run\.json"):
        read_session(path)


@pytest.mark.parametrize(
    ("command", "shown"), [("bench", "wan-loader compare"), ("load", "wan-loader compare"), ("generate", "JSON")]
)
def test_the_result_of_another_command_is_called_that(tmp_path, command, shown):
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"schema_version": 1, "command": command}))
    with pytest.raises(SessionError) as error:
        read_session(path)
    assert error.value.path == str(path)
    assert f"is a result of `{command}`, not a session" in error.value.reason
    assert shown in error.value.remedy


def test_missing_and_directory(tmp_path):
    for path, said in ((tmp_path / "none.json", "none.json does not exist"), (tmp_path, "cannot be read")):
        with pytest.raises(SessionError, match=said):
            read_session(path)


@pytest.mark.parametrize(
    "row", [[0, 5, 4, 0, 0, 0], [99, 0, 1, 0, 0, 0], [0, 0, 1, -1, 0, 0], [0, 0, 1, 0, 7, 0], [0, 0]]
)
def test_damaged_spans(tmp_path, row):
    document = make_session().to_json()
    document["processes"][0]["spans"].append(row)
    path = tmp_path / "run.json"
    path.write_text(json.dumps(document))
    with pytest.raises(SessionError):
        read_session(path)


def put(document, value, *keys):
    """Put a value where the keys lead, as JSON has it."""
    for key in keys[:-1]:
        document = document[key]
    document[keys[-1]] = value


ABSURD = [10**400, -(10**400), 1 << 63, 1e308, float("inf"), float("nan"), "x", {}, [[]], True]


@pytest.mark.parametrize("value", ABSURD, ids=lambda value: ascii(value)[:9])
def test_absurd_numbers_are_session_errors(tmp_path, value):
    """Wherever something is computed with them: a time, a size, a rate, a count."""
    path = tmp_path / "run.json"
    for keys in (
        ("seconds",),
        ("nbytes_file",),
        ("n_tensors",),
        ("phases", 0, "nbytes"),
        ("phases", 0, "busy_s"),
        ("memory", "host_peak_bytes"),
        ("verdict", "lost_s"),
        ("ceilings", "disk_gbps"),
        ("processes", 0, "end_ns"),
        ("processes", 0, "spans", 0, 2),
        ("subject",),
    ):
        document = make_session().to_json()
        put(document, value, *keys)
        path.write_text(json.dumps(document))
        with pytest.raises(SessionError) as error:
            read_session(path)
        assert error.value.path == str(path)


@pytest.mark.parametrize("key", ["machine", "settings", "storage"])
@pytest.mark.parametrize("value", [10**400, float("nan"), json.loads("[" * 50 + "]" * 50)], ids=["huge", "nan", "deep"])
def test_what_is_only_shown_can_be_shown(tmp_path, key, value):
    document = make_session().to_json()
    document[key]["cores"] = value
    (tmp_path / "run.json").write_text(json.dumps(document))
    with pytest.raises(SessionError, match=f"{key} holds"):
        read_session(tmp_path / "run.json")


def test_numbers_at_the_border_are_numbers(tmp_path):
    document = make_session().to_json()
    put(document, (1 << 63) - 1, "nbytes_file")
    put(document, -0.5, "verdict", "lost_s")  # less was needed than at the ceiling
    put(document, -5, "processes", 0, "start_ns")
    (tmp_path / "run.json").write_text(json.dumps(document))
    session = read_session(tmp_path / "run.json")
    assert session.report.nbytes_file == (1 << 63) - 1
    assert session.verdict.lost_s == -0.5
    assert session.processes[0].start_ns == -5


def test_a_process_that_ends_before_it_begins(tmp_path):
    document = make_session().to_json()
    put(document, 3 * S, "processes", 0, "start_ns")
    (tmp_path / "run.json").write_text(json.dumps(document))
    with pytest.raises(SessionError, match="ends before it begins"):
        read_session(tmp_path / "run.json")


def make_program():
    """Two ranks and a launcher, with samples."""
    spans = (
        Mark("import", 0, S, 0, "MainThread", "torch"),
        Mark("random_init", S, 2 * S, 10_000_000, "MainThread", "uniform_"),
        Mark("read", 2 * S, 3 * S, 900_000_000, "MainThread", "page faults <b> & more"),
        Mark("read", 2 * S, 3 * S, 100_000_000, "worker", "safetensors"),
    )
    samples = tuple(Sample(i * S // 10, i * 30_000_000, i * 1_000_000) for i in range(31))
    launcher = Process(title="torchrun", pid=1, start_ns=0, end_ns=4 * S, ended="exit 0")
    ranks = [
        Process(title="python x.py", pid=r + 2, rank=r, start_ns=S // 2, end_ns=4 * S, spans=spans, samples=samples)
        for r in range(2)
    ]
    return Session(
        kind="program",
        report=make_report(4.0, target="torchrun <x>", phases=summarize(spans)),
        processes=(launcher, *ranks),
        subject=1,
        verdict=Verdict("slow", "random_init", "because <i>", 1.0, 0.25),
        notes=("a [bold]note[/bold]",),
    )


def test_program_round_trip(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps(make_program().to_json()))
    again = read_session(tmp_path / "run.json")
    assert again.to_json() == make_program().to_json()
    assert again.processes == make_program().processes
