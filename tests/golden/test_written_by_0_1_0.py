"""What version 0.1.0 has written is still read: sessions, results of bench and load, cache entries, staged copies,
downloads. The files in `written_by_0_1_0` are what it wrote, and are never written again.

Git keeps neither times nor modes, by which a changed file is told; tests put back those that the files name.
"""

import json
import os
import shutil

import pytest
from golden_cases import WRITTEN, run_here, run_started, small_hub, surroundings

KEY = "a010af472330bf0587ffeec8518f2076"


@pytest.fixture(autouse=True)
def quiet_place(tmp_path):
    with surroundings(tmp_path):
        yield


@pytest.fixture
def copy(tmp_path):
    """Copies a directory of `written_by_0_1_0`, modes as they were; a function sets times."""

    def copy(name, times):
        path = tmp_path / name
        shutil.copytree(WRITTEN / name, path)
        for directory, _, _ in os.walk(path):
            os.chmod(directory, 0o700)
        for file, mtime_ns in times.items():
            os.utime(path / file, ns=(mtime_ns, mtime_ns))
        return path

    return copy


def ok(*words, code=0):
    """The document that a command prints."""
    found, out, err = run_here("wan-loader", [*map(str, words), "--json"])
    assert found == code, err
    return json.loads(out)


def saved(name):
    return json.loads((WRITTEN / name).read_text())


@pytest.mark.parametrize("name", ["session.json", "program.json", "session.rank0.json", "session.rank1.json"])
def test_a_session_is_read_and_nothing_of_it_is_lost(name):
    session, again = saved(name), ok("report", WRITTEN / name)
    for field in ("target", "device", "dtype", "seconds", "nbytes_file", "phases", "io", "machine"):
        assert again[field] == session[field]
    for process, before in zip(again["processes"], session["processes"], strict=True):
        assert {key: process[key] for key in before} == before  # others have come since
    assert again["kind"] == session["kind"]


@pytest.mark.parametrize("name", ["session.json", "program.json"])
def test_a_session_is_judged_as_it_was(name):
    assert ok("report", WRITTEN / name)["verdict"]["phase"] == saved(name)["verdict"]["phase"]
    assert ok("report", WRITTEN / name)["bottleneck"]["phase"] == saved(name)["bottleneck"]["phase"]


@pytest.mark.parametrize("name", ["session.json", "program.json"])
def test_a_session_is_drawn(name, tmp_path):
    files = {"--html": tmp_path / "a.html", "--trace": tmp_path / "a.trace.json"}
    code, out, err = run_here(
        "wan-loader", ["report", str(WRITTEN / name), *(str(x) for i in files.items() for x in i)]
    )
    assert (code, bool(out)) == (0, True), err
    spans = sum(len(p["spans"]) for p in saved(name)["processes"])
    events = json.loads(files["--trace"].read_text())["traceEvents"]
    assert sum(e["ph"] == "X" for e in events) >= spans
    assert files["--html"].read_text().startswith("<!doctype html>")


def test_sessions_of_a_distributed_load_are_compared():
    found = ok("report", WRITTEN / "session.rank0.json", WRITTEN / "session.rank1.json")
    assert found["schema_version"] == 1


@pytest.mark.parametrize("name", ["bench.json", "session.json", "load.json"])
def test_results_are_compared(name):
    found = ok("compare", WRITTEN / name, WRITTEN / name, "--fail-if", "median:5%")
    assert found["regressions"] == 0
    assert found["comparisons"]
    assert {c["change"] for c in found["comparisons"]} == {0.0}


def test_a_result_that_is_slower_is_found(tmp_path):
    slower = saved("load.json")
    slower["seconds"] *= 3
    (tmp_path / "slower.json").write_text(json.dumps(slower))
    found = ok("compare", WRITTEN / "load.json", tmp_path / "slower.json", "--fail-if", "median:5%", code=3)
    assert found["regressions"] == 1
    assert found["comparisons"][0]["change"] == pytest.approx(2.0)


@pytest.fixture
def cache(copy):
    manifest = saved(f"cache/entries/{KEY}/manifest.json")
    times = {f"entries/{KEY}/{file['path']}": file["mtime_ns"] for file in manifest["files"]}
    path = copy("cache", times)
    for file in (path / "entries" / KEY).iterdir():
        file.chmod(0o400)
    return path


def test_a_cache_entry_is_listed_and_right(cache):
    (entry,) = ok("cache", "list", "--cache-dir", cache)["entries"]
    assert (entry["key"], entry["state"], entry["dtype"]) == (KEY, "complete", "bfloat16")
    assert entry["source"] == "model.safetensors"
    assert ok("cache", "verify", "--cache-dir", cache)["damaged"] == {}


def test_damage_in_a_cache_entry_is_found(cache):
    file = cache / "entries" / KEY / "model.safetensors"
    st = file.stat()
    file.chmod(0o600)
    with file.open("r+b") as f:
        f.seek(5000)
        f.write(b"\xff\xff")
    os.utime(file, ns=(st.st_atime_ns, st.st_mtime_ns))
    assert list(ok("cache", "verify", "--cache-dir", cache, code=1)["damaged"]) == [KEY]


def test_the_weights_in_a_cache_entry_are_those_of_its_source(cache):
    import torch

    import wan_loader

    kept = wan_loader.load_file(cache / "entries" / KEY / "model.safetensors")
    source = wan_loader.load_file(WRITTEN / "staged/model.safetensors")
    assert kept.keys() == source.keys()
    for name, tensor in source.items():
        assert torch.equal(kept[name], tensor.bfloat16() if tensor.is_floating_point() else tensor)


def test_a_cache_entry_is_kept_and_cleared(cache):
    assert ok("cache", "prune", "--max-size", "1GB", "--cache-dir", cache)["removed"] == []
    assert ok("cache", "clear", "--yes", "--cache-dir", cache)["removed"] == [KEY]


def test_a_staged_copy_is_known_and_removed(copy, tmp_path):
    (home,) = (WRITTEN / "staged/.wan-loader-stage").iterdir()
    (file,) = json.loads((home / "manifest.json").read_text())["files"]
    staged = copy("staged", {file["path"]: file["mtime_ns"]})
    source = "/tmp/model/model.safetensors"  # is gone: the copy is found by its name
    found = ok("stage", source, "--remove", "--to", staged)
    assert (found["n_files"], found["kept"]) == (1, [])
    assert not (staged / "model.safetensors").exists()


def test_a_download_goes_on(copy):
    manifest = saved("downloaded/.wan-loader-download/manifest.json")
    path = copy("downloaded", {file["path"]: file["checked"][2] for file in manifest["files"]})
    (path / "Wan2.1_VAE.pth").unlink()
    with small_hub() as address, pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_ENDPOINT", address)
        code, out, err = run_started("wan-loader", ["download", "a/b", "--to", str(path), "--json"])
    assert code == 0, err
    found = json.loads(out)
    assert (found["repository"], found["nbytes_received"], found["nbytes_hashed"]) == ("a/b", 15, 0)
