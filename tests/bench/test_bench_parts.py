"""The pure parts: places, statistics, documents, pictures, the throttle, the comparison of tensors."""

import ctypes
import io
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from wan_loader.bench import sample as bench_sample
from wan_loader.bench import storage
from wan_loader.bench.check import compare_tensors
from wan_loader.bench.contract import LoadTask, Outcome
from wan_loader.bench.document import to_document
from wan_loader.bench.loaders import LOADERS, find_loaders
from wan_loader.bench.markdown import to_markdown
from wan_loader.bench.picture import to_png, to_svg
from wan_loader.bench.runner import Case, LoaderSetup, Result, Settings, distinct_names
from wan_loader.bench.statistics import case_warnings, summarize_samples
from wan_loader.bench.storage import Place, copied_files, parse_place, part_of, scratch
from wan_loader.bench.table import HEADERS, case_rows, columns
from wan_loader.bench.throttle import Throttle, throttle_reads
from wan_loader.errors import OptionError, OutputError
from wan_loader.formats import open_checkpoint
from wan_loader.system.posix_aio import AioRequest, PosixAio
from wan_loader.system.read_threads import ReadThreads, ThreadRequest
from wan_loader.warming.evict import evict as source_evict


def test_loaders_by_name():
    assert [x.name for x in find_loaders(["torch,ours", "torch"])] == ["torch", "ours"]
    assert find_loaders([]) == find_loaders(["all"]) == list(LOADERS.values())
    assert {"ours", "safetensors", "safetensors-cuda", "torch", "diffusers"} <= set(LOADERS)
    assert {"fastsafetensors", "instanttensor", "runai", "flashpack"} <= set(LOADERS)
    assert {"safetensors-prefetch", "diffusers-parallel", "diffusers-flashpack", "transformers"} <= set(LOADERS)


def test_places(tmp_path):
    assert parse_place(f"ssd={tmp_path}").directory == tmp_path
    assert parse_place("disk=simulated:150MB/s").rate == 150e6
    assert parse_place("hdd=simulated").rate == 180e6
    assert parse_place("x=simulated:sata").rate == 530e6
    assert "simulated" in parse_place("hdd=simulated").label
    for wrong in ("", "x", "=y", "x=", "x=simulated:quick"):
        with pytest.raises(OptionError):
            parse_place(wrong)


def test_a_part_is_whole_files(tmp_path):
    for i in range(3):
        save_file({f"w{i}": torch.zeros(1000)}, tmp_path / f"m-{i + 1:05d}-of-00003.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    assert len(part_of(checkpoint, None)) == 3
    assert len(part_of(checkpoint, 1)) == 1
    assert len(part_of(checkpoint, 5000)) == 2


def test_names_tell_paths_apart():
    assert distinct_names(["/a/x", "/a/y"]) == ["x", "y"]
    assert distinct_names(["/a/x", "/b/x/"]) == ["a/x", "b/x"]
    assert distinct_names(["/a/x"]) == ["x"]


def test_staged_copies_are_equal_and_removed(checkpoint, tmp_path):
    (checkpoint / "config.json").write_text("{}")
    (checkpoint / "model.safetensors.index.json").write_text("{}")
    place = tmp_path / "place"
    place.mkdir()
    source = checkpoint / "model.safetensors"
    with copied_files(parse_place(f"a={place}"), [str(source)]) as copies:
        (home,) = place.iterdir()
        assert home.name.startswith(storage.PREFIX)
        assert Path(copies[0]).read_bytes() == source.read_bytes()
        assert (home / "config.json").exists()
        assert (home / "model.safetensors.index.json").exists()  # diffusers finds no shards without it
    assert list(place.iterdir()) == []


def test_cold_is_cold_and_warm_is_warm(checkpoint, evict, resident):
    path = checkpoint / "model.safetensors"
    evict(path)  # skips where the file system keeps its pages
    storage.read_into_cache([str(path)])
    assert resident(path) == path.stat().st_size
    source_evict([str(path)])
    assert resident(path) == 0


def test_scratch_is_removed_after_an_error_and_refuses_what_does_not_fit(tmp_path):
    with pytest.raises(ZeroDivisionError), scratch(tmp_path, 1):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(OutputError) as error, scratch(tmp_path, 1 << 60):
        pass
    assert error.value.path == str(tmp_path)
    assert "has no room" in error.value.reason
    assert "--part" in error.value.remedy


def test_the_throttle_serves_one_after_the_other():
    now, slept = [0], []
    throttle = Throttle(1e9, clock=lambda: now[0], sleep=slept.append)
    first, second = throttle.reserve(500), throttle.reserve(500)
    assert (first, second) == (500, 1000), "requests that wait at the same time share the device"
    now[0] = 400
    throttle.wait(second)
    assert slept == [600 / 1e9]
    now[0] = 5000
    assert throttle.reserve(100) == 5100, "an idle device does not catch up"


@pytest.mark.parametrize(("backend", "kind"), [(PosixAio(), AioRequest), (ReadThreads(), ThreadRequest)])
def test_the_throttle_holds_reads_however_they_are_carried_out(tmp_path, monkeypatch, backend, kind):
    for name in ("start", "result"):
        for each in (AioRequest, ThreadRequest):
            monkeypatch.setattr(each, name, getattr(each, name))  # comes back afterwards
    throttle_reads(1e6)
    (tmp_path / "f").write_bytes(bytes(50_000))
    memory = ctypes.create_string_buffer(50_000)
    request, start = backend.request(), time.monotonic()
    assert isinstance(request, kind)
    with open(tmp_path / "f", "rb") as file:
        request.start(file.fileno(), ctypes.addressof(memory), 50_000, 0)
        backend.wait_any([request], 5)
        assert request.result() == 50_000
    assert time.monotonic() - start >= 0.05


def test_looking_for_children_is_not_the_loaders_cpu_time(checkpoint, monkeypatch):
    def slow():
        end = time.process_time() + 0.1
        while time.process_time() < end:
            pass
        return []

    monkeypatch.setattr(bench_sample, "_descendants", slow)
    files = (str(checkpoint / "model.safetensors"),)
    task = {"files": files, "format": "safetensors", "file_dtype": "float32", "device": "cpu"}
    answer = bench_sample.take_sample({"loader": "safetensors", "task": task})
    assert answer["cpu_seconds"] < 0.08


def test_summary_counts_good_samples_only(make_sample):
    samples = [make_sample(1.0), make_sample(3.0), make_sample(2.0), {"status": "crashed", "reason": ""}]
    summary = summarize_samples(samples)
    assert (summary.n, summary.median_s, summary.min_s, summary.spread) == (3, 2.0, 1.0, 1.0)
    assert summary.pinned_bytes is None
    assert summarize_samples(samples[3:]) is None


@pytest.mark.parametrize(
    ("cache", "seconds", "other", "word"),
    [
        ("warm", [1.0], {}, "--repeat 5"),
        ("warm", [1.0, 1.5, 1.0, 1.2], {}, "idle"),
        ("warm", [3.0, 1.0, 1.0, 1.0], {}, "first sample"),
        ("warm", [1.0, 1.0, 1.0], {"others_share": 0.7}, "other processes"),
        ("cold", [1.0, 1.0, 1.0], {"resident_before": 50}, "not cold"),
        ("warm", [1.0, 1.0, 1.0], {"resident_before": 50}, "not warm"),
        ("cold", [1.0, 1.0, 1.0], {"resident_before": None}, "not proved"),
    ],
)
def test_warnings_name_the_remedy(make_sample, cache, seconds, other, word):
    (warning,) = case_warnings("disk", cache, {"ours": [make_sample(s, **other) for s in seconds]})
    assert word in warning
    assert "ours" in warning


def test_too_few_samples_are_told_once(make_sample):
    two = {"ours": [make_sample(1.0), make_sample(1.0)]}
    assert case_warnings("disk", "warm", two, repeat=2) == [], "the document says it for all cases"
    assert "too few" in case_warnings("disk", "warm", two, repeat=5)[0]


def test_a_simulated_disk_reads_from_the_page_cache(make_sample):
    samples = [make_sample(1.0, resident_before=50) for _ in range(3)]
    assert "not warm" in case_warnings("hdd", "simulated", {"ours": samples})[0]


@pytest.mark.parametrize(("gbps", "dtype", "told"), [(0.5, None, True), (0.5, "bfloat16", True), (1.0, None, False)])
def test_faster_than_the_ceiling_cannot_be(make_sample, gbps, dtype, told):
    entry = LoaderSetup("ours", LOADERS["ours"])
    case = Case("m", "m", Place("here"), "cold", nbytes=10**9, ceilings={"disk_gbps": gbps})
    cold = {"resident_before": 0}
    case.results = [Result(entry, samples=[make_sample(1.0, **cold) for _ in range(3)])]
    case.results.append(
        Result(LoaderSetup("packed", LOADERS["flashpack"]), samples=case.results[0].samples, conversion_s=1.0)
    )
    settings = Settings(paths=["m"], entries=[entry], places=[], caches=["cold"], device="cuda:0", dtype=dtype)
    warnings = to_document(settings, [case], argv=[], machine={}, created="")["warnings"]
    assert any("faster than the disk was measured (ours: 2.00)" in w for w in warnings) is told
    assert len(warnings) == told


def test_good_samples_need_no_warning(make_sample):
    good = [make_sample(s) for s in (1.0, 1.02, 1.05)]
    assert case_warnings("disk", "warm", {"ours": good, "failed": []}) == []


def test_comparison_finds_every_kind_of_difference(checkpoint):
    file = str(checkpoint / "model.safetensors")
    task = LoadTask(files=(file,), format="safetensors", file_dtype="float32", device="cpu")
    assert compare_tensors(task, Outcome(load_file(file))) == (12, [])
    tensors = load_file(file)
    del tensors["w0"]
    tensors["w1"] = tensors["w1"].double()
    tensors["w2"] = tensors["w2"].reshape(-1)
    tensors["w3"][1, 1] += 1
    tensors["zz"] = torch.zeros(1)
    _, problems = compare_tensors(task, Outcome(tensors))
    for name, problem in zip(("w0", "w1", "w2", "w3", "zz"), sorted(problems, key=lambda p: p[-4:]), strict=True):
        assert name in problem


def test_comparison_wants_the_dtype_asked_for(checkpoint):
    file = str(checkpoint / "model.safetensors")
    task = LoadTask(files=(file,), format="safetensors", file_dtype="float32", device="cpu", dtype="bfloat16")
    as_in_file = load_file(file)
    converted = {n: t.bfloat16() if t.is_floating_point() else t for n, t in as_in_file.items()}
    assert compare_tensors(task, Outcome(converted)) == (12, [])
    assert compare_tensors(task, Outcome(as_in_file))[1], "not converted at all"
    assert compare_tensors(task, Outcome({**converted, "w1": as_in_file["w1"]}, is_module=True)) == (12, [])


def test_rows_put_the_fastest_first_and_failures_last(document, make_result):
    case = document["cases"][0]
    case["results"].append(make_result("x", status="crashed", reason="killed by SIGSEGV"))
    case["results"].append(make_result("interrupted before it had a turn"))
    rows = case_rows(case)
    assert [row[0] for row in rows][:3] == ["ours", "safetensors", "x"]
    assert [row[1] for row in rows][2:] == ["crashed: killed by SIGSEGV", "not measured"]
    shown = columns(rows)
    assert [HEADERS[i] for i in shown][:2] == ["loader", "median"]
    assert [column.title for column in shown.values() if not column.drop] == ["loader", "median"]
    assert min(shown.values(), key=lambda column: column.drop or 99).title == "samples", "goes first"


def test_long_names_stay_inside_the_picture(document, make_result):
    case = document["cases"][0]
    case["results"] = [make_result("ours io=buffered threads=16", 1.9)]
    texts = [e for e in ElementTree.fromstring(to_svg(document)).iter() if e.tag.endswith("text")]
    for text in (t for t in texts if t.get("text-anchor") == "end"):
        assert float(text.get("x")) >= 0.65 * int(text.get("font-size")) * len(text.text), text.text
    (dashed,) = (t for t in texts if t.text.startswith("dashed"))
    assert all(t.get("y") != dashed.get("y") for t in texts if t is not dashed), "it lies on nothing else"


def test_the_picture_as_png(document):
    image = pytest.importorskip("PIL.Image").open(io.BytesIO(to_png(document)))
    assert image.width == 2000
    colours = {colour for _, colour in image.getcolors(1 << 20)}
    assert (0x2F, 0xA3, 0x6B) in colours, "our bar"
    assert (0x8F, 0xA9, 0xC8) in colours, "a rival's"


def test_markdown_shows_the_winner_its_spread_and_its_samples(document, make_result):
    case = document["cases"][0]
    case["results"].append(make_result("rival", 0.5))
    case["results"][-1]["summary"] |= {"n": 1, "min_s": 0.5}
    text = to_markdown(document)
    first, second, *_ = [line for line in text.splitlines() if "5 equal" in line]
    assert first.startswith("| **rival** | 0.5 s | 0.5 s |")
    assert second.startswith("| ours | 1 s | 0.9 s .. 1 s |")
    assert "**ours** 1, y 2: `call`" in text, "packages that a loader needs are named with their versions"


def test_nobody_wins_without_a_time(document, make_result):
    document["cases"][0]["results"] = [make_result("x", status="crashed", reason="killed")]
    assert "| x | crashed: killed |" in to_markdown(document)


def test_small_loads_show_their_cpu_seconds(document):
    results = document["cases"][0]["results"]
    results[0]["summary"]["cpu_s"], results[1]["summary"]["cpu_s"] = 12.345, 0.01234
    column = HEADERS.index("CPU s")
    assert [row[column] for row in case_rows(document["cases"][0])] == ["0.0123", "12.35"]


def test_markdown_and_picture_show_everything(document, make_result):
    case = document["cases"][0]
    case["results"].append(make_result("x|y", status="hung", reason="<no> end"))
    case["name"] = "<m>\x1b[31m"
    document["cases"].append({**case, "failure": "no room"})
    text = to_markdown(document)
    for word in ("ours", "x\\|y", "hung", "beware", "no room", "pinned copies"):
        assert word in text
    assert "\x1b" not in text
    svg = to_svg(document)
    root = ElementTree.fromstring(svg)
    words = " ".join(e.text or "" for e in root.iter())
    for word in ("ours", "hung: <no> end", "no room", "pinned copies", "1 s, 2 GB/s"):
        assert word in words
    assert "inside ours" in words
